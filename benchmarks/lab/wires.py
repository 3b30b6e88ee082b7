"""The model on real wires: hosts made of namespaces, cables of a known rate, real Horovod steps
between them.

A launch is one topology on some hosts; its ranks stay while the cables' rate is changed under them.
Half of the settings give the model its few unknowns, by least squares; the other half are
predicted.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, stats

from benchmarks.lab.emulated import EmulatedHosts, why_not
from chexlib.errors import ClusterError
from chexlib.machine import cores, hardware
from chexlib.mpi import find_mpi, thread_environment
from chexlib.studies.grid import run_grid

# Open MPI's numbers of the algorithms; without a fixed one it chooses by size, and its module han
# by level.
_MCA = {"ring": 4, "recursive doubling": 3}
LAUNCH = ["topology", "hosts", "per_host", "algorithm"]  # whose ranks stay while the rate changes
log = logging.getLogger(__name__)
UNKNOWN = {  # where the fit begins, and between what it looks
    "latency": (1e-3, 1e-6, 1.0),
    "payload": (0.9, 0.3, 1.0),
    "handling": (1e-9, 1e-11, 1e-6),
    "copying": (1e-9, 1e-11, 1e-6),
}


def launches(
    topologies: Sequence[str], hosts: Sequence[int], *, size: int, batch: int
) -> list[dict]:
    """One rank a host on all numbers of hosts; on the largest by recursive doubling too; two ranks
    on the smallest.
    """
    layouts = [(n, 1, "ring") for n in hosts] + [
        (max(hosts), 1, "recursive doubling"),
        (min(hosts), 2, "ring"),
    ]
    names = ("topology", "size", "batch", "hosts", "per_host", "algorithm")
    return [
        dict(zip(names, (topology, size, batch, *layout), strict=True))
        for topology, layout in itertools.product(topologies, layouts)
    ]


def measure_wires(
    points: Sequence[Mapping], rates: Sequence[float], table: str | Path, *, turns: int = 4
):
    """Seconds of a step in every launch at every rate; a launch that `table` has, of this machine,
    is not repeated.

    Parameters
    ----------
    points : from `launches`
    rates : bits a second
    table : Parquet file of finished launches
    turns : in each, first every rank steps for itself and then all together: one to five steps, as
        many as fit into 5
        seconds of all turns, the median counting, after one that does not count. The mean over
        turns is told.

    Returns
    -------
    DataFrame
        A row a setting: topology, size, batch, hosts, per_host, algorithm, rate, compute (seconds,
        of the same ranks at the same time with nothing communicated), seconds; measured, the day of
        it.

    Raises
    ------
    ClusterError
        Hosts cannot be made here; the ranks ended or did not answer.
    """
    if reason := why_not():
        raise ClusterError(
            f"no networks can be emulated: {reason}. Without them the committed reference can be "
            "read."
        )
    how = {
        "rates": ",".join(f"{rate:g}" for rate in rates),
        "turns": turns,
        "spent": 5,
        **hardware(),
    }
    asked = [{**point, **how} for point in points]
    rows = run_grid(asked, table, lambda point, folder: _launch(point))
    keep = [*LAUNCH, "size", "batch", "measured"]
    long = pd.wide_to_long(
        rows, ["seconds", "compute"], keep, "rate", sep="_", suffix=".+"
    ).reset_index()
    return long.sort_values([*LAUNCH, "rate"], ignore_index=True)[
        [*keep, "rate", "compute", "seconds"]
    ]


def _launch(point: Mapping, timeout: float = 900) -> dict:
    try:
        return _served(point, timeout)
    except ClusterError as error:  # once seen, on a crowded machine: a rank starved
        log.warning("%s Once more ...", error)
        return _served(point, timeout)


def _served(point: Mapping, timeout: float) -> dict:
    settings = {
        "topology": point["topology"],
        "size": point["size"],
        "batch_per_rank": point["batch"],
    }
    settings["precision"], turns, mpi = "float32", point["turns"], find_mpi()
    own = {
        **thread_environment(1),
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll": "^han",
    }
    own["OMPI_MCA_coll_tuned_allreduce_algorithm"] = str(_MCA[point["algorithm"]])
    passed = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ]
    with (
        EmulatedHosts(point["hosts"], pinned=True) as hosts,
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
    ):
        flags = [*mpi.flags(hosts.slots(point["per_host"]), hosts.network, [*own, *passed])]
        command = [
            mpi.command,
            "-n",
            str(point["hosts"] * point["per_host"]),
            *flags,
            *hosts.agent_flags,
        ]
        serve = [sys.executable, "-m", "chexlib.scaling.throughput", json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen(
            hosts[0].wrap([*command, *serve]), env={**os.environ, **own}, **pipes
        )
        timer = threading.Timer(timeout, hosts.close)
        timer.start()

        def take(n: int) -> list[float]:
            process.stdin.write(f"{n}\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("["):
                    return json.loads(line)
            said.seek(0)
            raise ClusterError(
                f"{dict(point)}: the ranks ended, or took more than {timeout} s. "
                f"{said.read()[-1500:]}"
            )

        try:
            take(-2)
            take(2)
            found = {"measured": f"{datetime.now(UTC):%Y-%m-%d}"}
            for rate in map(float, point["rates"].split(",")):
                hosts.limit(rate)  # in turns, so that a machine that slows down does so in both
                n = max(1, min(5, int(point["spent"] / turns / take(2)[1])))
                pairs = [
                    [statistics.median(take(sign * (n + 1))[1:]) for sign in (-1, 1)]
                    for _ in range(turns)
                ]
                found[f"compute_{rate:g}"], found[f"seconds_{rate:g}"] = np.mean(
                    pairs, axis=0
                ).tolist()
            return found
        except BrokenPipeError:
            said.seek(0)
            raise ClusterError(f"{dict(point)}: the ranks ended. {said.read()[-1500:]}") from None
        finally:
            timer.cancel()
            hosts.close()
            process.communicate()


def messages(ranks: int, algorithm: str) -> tuple[int, float]:
    """How many messages follow one another in an allreduce, and the share of the vector in each.

    In a ring each rank sends a P-th to its neighbour, P-1 times to add up and P-1 times to hand
    round (Patarasuk and Yuan 2009). In recursive doubling pairs at distances 1, 2, 4, ... exchange
    all they have; ranks beyond a power of two hand in before, and get back after.
    """
    if algorithm == "ring":
        return 2 * (ranks - 1), 1 / ranks
    doublings = int(math.log2(ranks))
    return doublings + 2 * (ranks > 2**doublings), 1.0


def wire_seconds(row: Mapping, size: float, unknown: Mapping, processors: int) -> float:
    """The model's word on a setting, for gradients of `size` bytes: notebook 11 shows it.

    Hosts are dealt to processors, and ranks that share one handle and copy slower. In a ring one
    rank of a host sends to another host, in recursive doubling all do: one rank a host.
    """
    shared = row["per_host"] * math.ceil(row["hosts"] / processors)
    count, share = messages(row["hosts"] * row["per_host"], row["algorithm"])
    piece = share * size
    wire = piece / (row["rate"] / 8 * unknown["payload"])
    message = unknown["latency"] + max(wire, shared * unknown["handling"] * piece)
    return row["compute"] + count * message + shared * unknown["copying"] * size


def fit_wires(
    table: pd.DataFrame,
    sizes: Mapping[str, float],
    *,
    processors: int = 0,
    fitted: np.ndarray | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit the model to some of the settings, and predict all.

    Parameters
    ----------
    sizes : bytes of the gradients, by topology
    fitted : array of bool, optional
        To which rows. Else to half of them, a chequerboard over topology, layout and rate: each of
        these is in both.

    Returns
    -------
    unknowns : DataFrame
        A row an unknown: value, and low and high of its 95 % interval, no further than `UNKNOWN`
        looks: latency (seconds a message), payload (share of the rate), handling and copying
        (seconds a byte that the processor spends beside the wire,
        and after it for fusion buffer and addition). It is the wider of two, in logarithms: from the curvature,
        and from the jackknife over launches (Tukey 1958), since the settings of a launch share its
        processes and what the model misses of them.
    predicted : DataFrame
        The table with fitted (bool), predicted (seconds) and error, predicted over measured less 1:
        of the step, and as communication_error of what it has beside its compute, which was
        measured and not predicted.
    """
    processors = processors or cores()
    launch = table.groupby(LAUNCH, sort=False).ngroup().to_numpy()
    if fitted is None:
        layouts = table["hosts"].astype(str) + table["per_host"].astype(str) + table["algorithm"]
        places = [
            pd.factorize(column, sort=True)[0]
            for column in (table["topology"], layouts, table["rate"])
        ]
        fitted = sum(places) % 2 == 0
    rows = table.to_dict("records")
    begin, least, most = np.log(list(UNKNOWN.values())).T

    def predict(logs, rows):
        unknown = dict(zip(UNKNOWN, np.exp(logs), strict=True))
        return np.array(
            [wire_seconds(row, sizes[row["topology"]], unknown, processors) for row in rows]
        )

    def fit(keep, begin):
        own = list(itertools.compress(rows, keep))
        measured = np.log([row["seconds"] for row in own])
        how = {"bounds": (least, most), "loss": "soft_l1", "f_scale": 0.1}
        return optimize.least_squares(
            lambda logs: np.log(predict(logs, own)) - measured, begin, **how
        )

    found = fit(fitted, begin)
    free = max(1, sum(fitted) - len(UNKNOWN))
    flat = 1e-9 * np.eye(len(UNKNOWN))  # what the settings say nothing of is left as wide as it was
    covariance = np.linalg.inv(found.jac.T @ found.jac + flat) * 2 * found.cost / free
    reach = stats.t.ppf(0.975, free) * np.sqrt(np.diag(covariance))
    without = np.array(
        [fit(fitted & (launch != one), found.x).x for one in np.unique(launch[fitted])]
    )
    if (n := len(without)) > 1:
        jackknife = np.sqrt((n - 1) * without.var(axis=0))
        reach = np.maximum(reach, stats.t.ppf(0.975, n - 1) * jackknife)
    ends = np.clip([found.x - reach, found.x + reach], least, most)
    values = {"value": np.exp(found.x), "low": np.exp(ends[0]), "high": np.exp(ends[1])}
    predicted = table.assign(fitted=fitted, predicted=predict(found.x, rows))
    predicted["error"] = predicted["predicted"] / predicted["seconds"] - 1
    ours, theirs = (predicted[name] - predicted["compute"] for name in ("predicted", "seconds"))
    predicted["communication_error"] = (ours / theirs - 1).where(theirs > 0)
    return pd.DataFrame(values, index=list(UNKNOWN)), predicted


def held_back(predicted: pd.DataFrame) -> dict:
    """How many settings there are and were held back, and median and worst error of these, from
    `fit_wires`.
    """
    held = predicted[~predicted["fitted"].astype(bool)]
    step, communication = (
        held[name].astype(float).abs() for name in ("error", "communication_error")
    )
    told = {
        "settings": len(predicted),
        "held_back": len(held),
        "median": step.median(),
        "worst": step.max(),
    }
    return told | {
        "communication_median": communication.median(),
        "communication_worst": communication.max(),
    }


def hold_whole(
    table: pd.DataFrame, sizes: Mapping[str, float], *, processors: int = 0
) -> pd.DataFrame:
    """`held_back` where what is held back is not between settings that were fitted, but beyond all
    of them.
    """
    most, fastest = table["hosts"] == table["hosts"].max(), table["rate"] == table["rate"].max()
    kept = {
        f"all on {table['hosts'].max()} hosts": ~most,
        f"all at {table['rate'].max() / 1e9:g} Gbit/s": ~fastest,
    }
    fits = {
        name: fit_wires(table, sizes, processors=processors, fitted=keep.to_numpy())
        for name, keep in kept.items()
    }
    return pd.DataFrame({name: held_back(predicted) for name, (_, predicted) in fits.items()}).T
