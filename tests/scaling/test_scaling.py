"""The scaling model of notebooks 08 and 11: against messages passed one by one, against cases worked
by hand, and its fit.
"""

import ast
import itertools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit, least_squares
from scipy.stats import norm

from benchmarks.lab.emulated import EmulatedHosts, why_not
from benchmarks.lab.wires import (
    fit_wires,
    held_back,
    hold_whole,
    launches,
    measure_wires,
    wire_seconds,
)
from chexlib.app.execute import find_notebooks
from chexlib.files import ROOT
from chexlib.models.topologies import build_model
from chexlib.training.noise import NoiseScale

FABRIC = SimpleNamespace(
    inside=SimpleNamespace(latency=2e-6, bandwidth=4e9),
    between=SimpleNamespace(latency=30e-6, bandwidth=1e9),
)
REFERENCE = ROOT / "data" / "reference" / "11_scaling_appendix.json"


def run_cells(number, *beginnings, **names):
    """The names that some cells of a notebook set: those whose code begins so."""
    names |= {"np": np, "pd": pd, "norm": norm, "least_squares": least_squares}
    (path,) = find_notebooks([number])
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for beginning in beginnings:
        (source,) = (source for source in cells if source.startswith(beginning))
        exec(source, names)
    return names


class Ranks:
    """Ranks with real numbers and clocks of their own, which pass real messages."""

    def __init__(self, nodes, per_node, size, fabric):
        self.nodes, self.per_node, self.fabric, self.n = nodes, per_node, fabric, nodes * per_node
        self.bytes = size / (8 * 5040)  # of the fabric, for each byte that is held here
        self.values = np.random.default_rng(0).normal(size=(self.n, 5040))
        self.total, self.clocks = self.values.sum(axis=0), np.zeros(self.n)

    def exchange(self, messages):
        """Messages (from, to, slice, add) at once: those that leave one node share its card, and
        all wait for all.
        """
        leaving = [
            a // self.per_node for a, b, *_ in messages if a // self.per_node != b // self.per_node
        ]
        sent = [
            (b, part, add, self.values[a, part].copy(), self.clocks[a])
            for a, b, part, add in messages
        ]
        for (a, *_), (b, part, add, data, at) in zip(messages, sent, strict=True):
            size = data.nbytes * self.bytes
            if a // self.per_node == b // self.per_node:
                took = self.fabric.inside.latency + size / self.fabric.inside.bandwidth
            else:
                sharing = leaving.count(a // self.per_node)
                took = self.fabric.between.latency + size * sharing / self.fabric.between.bandwidth
            self.values[b, part] = self.values[b, part] + data if add else data
            self.clocks[b] = max(self.clocks[b], at + took)
        self.clocks[:] = self.clocks.max()

    def parts(self):
        edges = np.linspace(0, 5040, self.n + 1).astype(int)
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


def ring(world):
    parts, n = world.parts(), world.n
    for step in range(n - 1):
        world.exchange([(r, (r + 1) % n, parts[(r - step) % n], True) for r in range(n)])
    for step in range(n - 1):
        world.exchange([(r, (r + 1) % n, parts[(r + 1 - step) % n], False) for r in range(n)])


def recursive_doubling(world):
    all_, power = slice(None), 2 ** int(math.log2(world.n))
    extra = world.n - power  # rank 2i hands in to 2i + 1, for the first of them
    active = [*range(1, 2 * extra, 2), *range(2 * extra, world.n)]
    if extra:
        world.exchange([(2 * i, 2 * i + 1, all_, True) for i in range(extra)])
    for bit in range(int(math.log2(power))):
        pairs = [(active[i], active[i ^ (1 << bit)]) for i in range(power)]
        world.exchange([(a, b, all_, True) for a, b in pairs])
    if extra:
        world.exchange([(2 * i + 1, 2 * i, all_, False) for i in range(extra)])


LAYOUTS = [(2, 1), (3, 1), (4, 1), (7, 1), (2, 2), (2, 3), (2, 6), (3, 2), (4, 4), (4, 5), (5, 3)]
# A wire of FABRIC.between, and processors that cost nothing.
FREE = {"latency": 30e-6, "payload": 1.0, "handling": 0.0, "copying": 0.0}


def passed(simulate, nodes, per_node, size):
    """Seconds of an allreduce whose messages are really passed."""
    world = Ranks(nodes, per_node, size, FABRIC)
    simulate(world)
    np.testing.assert_allclose(
        world.values, np.tile(world.total, (world.n, 1)), atol=1e-9
    )  # it is an allreduce
    return world.clocks.max()


@pytest.mark.parametrize("size", [4e3, 1e8])
@pytest.mark.parametrize(("nodes", "per_node"), LAYOUTS)
def test_a_ring_takes_what_its_messages_take(nodes, per_node, size):
    took = passed(ring, nodes, per_node, size)
    allreduce = run_cells("08", "def allreduce", **FIT)["allreduce"]
    assert allreduce(size, nodes * per_node, 30e-6, 1e-9) == pytest.approx(took, rel=0.01)
    row = {"hosts": nodes, "per_host": per_node, "algorithm": "ring", "rate": 8e9, "compute": 0.0}
    assert wire_seconds(row, size, FREE, processors=nodes) == pytest.approx(took, rel=0.01)


@pytest.mark.parametrize("hosts", [2, 3, 4, 7])
def test_recursive_doubling_takes_what_its_messages_take(hosts):
    took = passed(recursive_doubling, hosts, 1, 1e8)
    row = {"hosts": hosts, "per_host": 1, "algorithm": "recursive doubling", "rate": 8e9}
    found = wire_seconds({**row, "compute": 0.0}, 1e8, FREE, processors=hosts)
    assert found == pytest.approx(took, rel=0.01)


# Notebook 08: what its cells need to be run without measuring
SIZES = 4 ** np.arange(5, 14)
FIT = {
    "sizes": SIZES,
    "seconds": 2 * 2e-5 + SIZES * 3e-10,
    "together": 2,
    "curve_fit": curve_fit,
}


def test_the_fit_finds_latency_and_bytes_of_an_allreduce():
    """On two ranks: two messages of half of the vector."""
    noise = np.random.default_rng(0).normal(1, 0.02, len(SIZES))
    fit = run_cells("08", "def allreduce", **{**FIT, "seconds": noise * FIT["seconds"]})["fit"]
    for value, truth in zip(fit.itertuples(), (2e-5, 3e-10), strict=True):
        assert value.low < truth < value.high and value.value == pytest.approx(truth, rel=0.05)


def test_a_step_is_compute_the_wait_for_the_slowest_and_a_ring():
    step = run_cells("08", "def allreduce", "SPREAD =", **FIT)["step_seconds"]
    how = dict(work=1.0, size=1e8, per_node=1, latency=0.0, per_byte=1e-9, spread=0.0)
    assert step(1, **how) == pytest.approx(1.0)
    assert step(2, **how) == pytest.approx(1.1)
    assert step(2, **{**how, "per_node": 2}) == pytest.approx(1.15)
    lag = step(64, **{**how, "spread": 0.1}) - step(64, **how)
    assert lag == pytest.approx(0.1 * 2.344, abs=0.002)  # of 64 normal numbers, by tables


@pytest.mark.parametrize("number", ["08", "11"])
def test_the_slowest_of_many_is_that_of_drawn_ones(number):
    beginnings = {"08": ("def allreduce", "SPREAD ="), "11": ("IMAGENET",)}[number]
    slowest = run_cells(number, *beginnings, **FIT)["slowest"]
    for n in (2, 64):
        drawn = np.random.default_rng(0).normal(size=(20_000, n)).max(axis=1).mean()
        assert slowest(n) == pytest.approx(drawn, abs=0.04)
    assert slowest(1) == 0


def test_the_parts_of_a_step_are_those_of_its_ranks():
    """Rank 1 comes last: only its sum is no wait. Milliseconds, the same in each of three steps."""
    by_rank = {"input_wait": (0.01, 0.01), "compute": (0.03, 0.05), "sum": (0.035, 0.015)}
    measured = {name: [[of_rank] * 3 for of_rank in each] for name, each in by_rank.items()}
    observed = {"weak": {"seconds": [0.1] * 3, **measured}}
    found = run_cells("08", "def parts_of", observed=observed)["steps"].loc["weak"]
    parts = {"input wait": 10, "compute": 40, "skew": 10, "allreduce": 15, "rest": 25}
    assert found.to_dict() == pytest.approx({**parts, "total": 100})


def test_the_plan_uses_the_noise_scale_that_was_given_or_that_notebook_04_measured():
    nodes = 2 ** np.arange(11)
    plan = pd.DataFrame({"global_batch": 64 * nodes, "efficiency": 0.99, "hours": 8 / nodes})
    plan.index = nodes
    of_04 = {"images": 300.0, "low": 200.0, "high": 500.0, "updates": 40}
    same = {"plan": plan, "NoiseScale": NoiseScale}
    for given, measured, scale, best in (
        (0.0, of_04, 300, 4),
        (1000.0, of_04, 1000, 8),
        (10.0, None, 10, 1),
        (0.0, None, np.nan, 1),
    ):
        found = run_cells(
            "08", "if plan_noise_scale", plan_noise_scale=given, noise_of_04=measured, **same
        )
        assert found["best"] == best
        assert found["noise_scale"] == pytest.approx(scale, nan_ok=True)
    # An update of as many images as the noise scale makes half of the progress per image.
    found = run_cells("08", "if plan_noise_scale", plan_noise_scale=64.0, noise_of_04=None, **same)
    assert found["plan"].loc[1, "same_loss_hours"] == pytest.approx(16)


# Notebook 11


def reference_wires():
    kept = json.loads(REFERENCE.read_text())
    measured = pd.DataFrame(kept["metrics"]["wires"]).T.infer_objects()
    return {"measured": measured, "processors": kept["environment"]["cores"]}


def test_the_cells_of_the_appendix_predict_the_wires_of_the_reference():
    """What was held back, from what was not, fitted anew."""
    cells = ("GRADIENTS", "def step_seconds", "UNKNOWN", "most, fastest")
    found = run_cells("11", *cells, **reference_wires())
    table, errors = found["table"], found["errors"]
    held = errors.loc["a chequerboard"]
    assert len(table) >= 12 and table["topology"].nunique() >= 2
    assert held["held back"] >= 12 and held["median"] <= 0.10 and held["worst"] <= 0.25
    assert (errors["median"] <= 0.25).all()
    unknown = {"latency": 1e-5, "payload": 0.9, "handling": 1e-9, "copying": 1e-9}
    theirs = [
        wire_seconds(row, row["bytes"], unknown, found["processors"])
        for row in table.to_dict("records")
    ]
    np.testing.assert_allclose(found["step_seconds"](table, **unknown), theirs)


@pytest.mark.parametrize("topology", ["densenet121", "resnet50", "vgg16"])
def test_the_notebooks_know_the_gradients_of_each_topology(topology):
    known = run_cells("11", "GRADIENTS", **reference_wires())["GRADIENTS"]
    trained = build_model(topology, size=32).trainable_variables
    assert known[topology] == sum(math.prod(v.shape) for v in trained)
    (path,) = find_notebooks(["08"])
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (line,) = re.findall(r"^GRADIENTS = (\{.*?\})", "\n".join(sources), re.M | re.S)
    assert ast.literal_eval(line) == known


def test_the_studys_hardware_efficiencies_follow_from_its_minutes_within_their_rounding():
    """The deck prints whole minutes. They give 12.34, 12.04, 6.51 where 12.36, 12.03 and 6.51 are
    printed.
    """
    peak = run_cells("11", "PEAKS")["peak"]
    assert peak["formula"].round(2).tolist() == [12.34, 12.04, 6.51]
    assert (peak["low"] < peak["printed"]).all() and (peak["printed"] < peak["high"]).all()


def test_nothing_in_the_projection_was_taken_from_an_efficiency_that_is_predicted():
    cells = ("IMAGENET", "unsure", "published", "def from_256")
    run = SimpleNamespace(save_figure=lambda *args, **kwargs: None)
    found = run_cells("11", *cells, plt=plt, run=run)
    assert found["SPEED"] == pytest.approx(90 * 1_281_167 / (58 * 60 * 448))
    for name, table in found["projection"].items():
        efficiency = table["efficiency"]
        assert efficiency[1] == 1 and efficiency.is_monotonic_decreasing
        band = found["bands"][name]
        assert (band["min"] <= efficiency).all() and (efficiency <= band["max"]).all()
        assert band.loc[512, "min"] < band.loc[512, "max"] < 1
    slow = [found["bands"][name].loc[512, "min"] for name in ("Stampede2", "MareNostrum 4")]
    assert slow[0] < slow[1]  # of the one whose rank 0 negotiates
    claims = found["claims"]
    assert (claims["least"] <= claims["model, %"]).all() and (
        claims["model, %"] <= claims["most"]
    ).all()


def test_published_speeds_are_predicted_from_the_first_point_alone():
    """A step of 1 s, and on two ranks a second more for 2 x 1/2 x 12.5e9 bytes at 12.5 GB/s."""
    cells = run_cells("11", "IMAGENET", "def slowed")
    predict = cells["predict"]
    cells["SPREAD"] = 0.0
    table = predict({1: 10.0, 2: 5.0}, {1: 10, 2: 10}, 12.5e9, ranks=1)
    assert table.loc[2, "all hidden"] == pytest.approx(10)
    assert table.loc[2, "nothing hidden"] == pytest.approx(5, rel=1e-5)
    assert table.loc[2, "error, all hidden"] == pytest.approx(1)


# Hosts and cables


def test_the_fit_finds_what_made_the_times_and_predicts_the_other_half():
    sizes = {"one": 3e7, "two": 9e7}
    truth = {"latency": 4e-4, "payload": 0.93, "handling": 2e-9, "copying": 1.5e-9}
    rows = [
        {**point, "rate": rate, "compute": 0.3}
        for point in launches(["one", "two"], [2, 3, 4], size=64, batch=2)
        for rate in (1e8, 1e9, 1e10)
    ]
    noise = np.random.default_rng(0).normal(1, 0.01, len(rows))
    seconds = [
        n * wire_seconds(row, sizes[row["topology"]], truth, processors=2)
        for n, row in zip(noise, rows, strict=True)
    ]
    table = pd.DataFrame(rows).assign(seconds=seconds)
    unknowns, predicted = fit_wires(table, sizes, processors=2)
    assert 12 < predicted["fitted"].sum() < len(rows) - 12
    assert predicted.loc[~predicted["fitted"], "error"].abs().max() < 0.05
    for name in ("payload", "handling", "copying"):
        assert unknowns.loc[name, "low"] < truth[name] < unknowns.loc[name, "high"], name
        assert unknowns.loc[name, "value"] == pytest.approx(truth[name], rel=0.1)
    found = held_back(predicted)
    assert found["settings"] == len(rows) and found["worst"] < 0.05
    assert len(hold_whole(table, sizes, processors=2)) == 2


@pytest.mark.cores
@pytest.mark.hosts
@pytest.mark.skipif(bool(reason := why_not()), reason=reason)
def test_pinned_hosts_have_a_processor_each_in_turn():
    ask = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    mine = sorted(os.sched_getaffinity(0))
    with EmulatedHosts(3, pinned=True) as hosts:
        found = [
            subprocess.run(hosts[i].wrap(ask), capture_output=True, text=True).stdout.split()
            for i in range(3)
        ]
    assert found == [[str(mine[i % len(mine)])] for i in range(3)]


@pytest.mark.cores
@pytest.mark.hosts
@pytest.mark.skipif(bool(reason := why_not()), reason=reason)
def test_steps_are_measured_between_hosts_and_a_slower_cable_shows(tmp_path):
    points = launches(["vgg16"], [2], size=32, batch=1)[:1]
    found = measure_wires(points, [3e8, 1e10], tmp_path / "wires.parquet", turns=1)
    slow, fast = found.sort_values("rate").itertuples()
    assert (slow.rate, fast.rate) == (3e8, 1e10) and slow.compute > 0
    least = 58.9e6 * 8 / 3e8  # seconds in which the gradients can cross
    assert slow.seconds > least > fast.seconds - fast.compute
