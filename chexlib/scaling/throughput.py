"""What a training step costs, measured.

python -m chexlib.scaling.throughput '{"topology": "densenet121", "size": 224, "batch_per_rank": 16}'

is a rank (under mpiexec: ranks) that reads numbers of steps from its input, 0 being the end, takes
them with `DataParallelTrainer.fit` on random radiographs or on `paths`, and answers with the
seconds of each. Of a number below 0 the steps are taken by every rank for itself, begun together
and with nothing communicated, and the seconds are the slowest rank's.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.cluster.cleanup import no_longer_than_this
from chexlib.errors import ClusterError, ConfigError
from chexlib.files import ROOT, read_text
from chexlib.machine import import_tensorflow
from chexlib.mpi import find_mpi, thread_environment
from chexlib.scaling.workload import training_gflop

TIMEOUT = 900  # seconds for the steps of one measurement
# Of Horovod's timeline.
_PHASES = {
    "MEMCPY_IN_FUSION_BUFFER": "copy_in",
    "MPI_ALLREDUCE": "allreduce",
    "MEMCPY_OUT_FUSION_BUFFER": "copy_out",
}
_BYTES = {"float32": 4, "float16": 2, "float64": 8, "int32": 4, "int64": 8, "uint8": 1}


def command(settings: dict, *, ranks: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves such steps on `ranks` MPI ranks of this host, and its environment's
    own variables.

    Parameters
    ----------
    settings : dict
        topology, size, batch_per_rank; optionally precision, and paths of images.
    """
    mpi = find_mpi()
    launch = [*mpi.start(), "-n", str(ranks), *mpi.flags()] if ranks > 1 else []
    serve = [sys.executable, "-m", "chexlib.scaling.throughput", json.dumps(settings)]
    return [*launch, *serve], thread_environment(threads)


def measure(
    settings: dict, *, ranks: int, threads: int, steps: int = 6, **environment: str
) -> dict:
    """Images per second of a layout on this host, the median over `steps` after two that do not
    count.

    Further names are environment variables of the ranks.

    Returns
    -------
    dict
        images_per_second; seconds of each step; gflop_per_image.

    Raises
    ------
    ClusterError
        The ranks ended, or did not answer in time; the message has their last words.
    """
    words, variables = command(settings, ranks=ranks, threads=threads)
    layout = f"{ranks} ranks x {threads} threads, {settings}"
    with no_longer_than_this() as guarded:
        try:
            done = subprocess.run(
                words,
                # Python's choice for temporary files, where TMPDIR names none that can be used.
                env={
                    **os.environ,
                    "TMPDIR": tempfile.gettempdir(),
                    **variables,
                    **guarded,
                    **environment,
                },
                encoding="utf-8",
                errors="replace",
                input=f"2\n{steps}\n0\n",
                capture_output=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{layout}: no answer within {TIMEOUT:g} s. Try smaller images or batches."
            ) from None
    output, errors = done.stdout, done.stderr
    answers = [json.loads(line) for line in output.splitlines() if line.startswith(("[", "{"))]
    if done.returncode or len(answers) != 3:
        raise ClusterError(
            f"{layout}: the ranks ended with status {done.returncode}. {errors[-1500:]}"
        )
    facts, _, seconds = answers
    if isinstance(seconds, dict):  # asked for in detail
        facts, seconds = {**facts, **seconds}, seconds["seconds"]
    speed = ranks * settings["batch_per_rank"] / statistics.median(seconds)
    return {**facts, "images_per_second": speed, "seconds": seconds}


def observe(
    settings: dict, *, ranks: int, threads: int, steps: int = 6, **environment: str
) -> dict:
    """Where the time of a step goes on this host, the median over `steps`; names that follow are
    the ranks' variables.

    Returns
    -------
    dict
        In seconds: step; compute, of the mean rank; skew, from the mean to the slowest rank;
        input_wait, for the batch on rank 0; allreduce, with copy (to and from the fusion buffer),
        both from Horovod's timeline; rest. Besides allreduces and allreduce_bytes of a step,
        request (see `read_timeline`), images_per_second, gflop_per_image. Under mpi4py the copies
        are part of rest (0 here), and request is NaN: there is no negotiation.

    Raises
    ------
    ClusterError
        As `measure`.
    """
    layout = {"ranks": ranks, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timeline.json"
        if ranks > 1:
            environment["HOROVOD_TIMELINE"] = str(file)
        found = measure({**settings, "detail": True}, **layout, steps=steps, **environment)
        if file.exists():
            reduced, request = read_timeline(file)
        elif ranks > 1 and not found["sums"]:
            raise ClusterError(f"Horovod wrote no timeline to {file}. Is there room in {folder}?")
        else:
            reduced, request = pd.DataFrame(found["sums"]), math.nan
    step = statistics.median(found["seconds"])
    busy = np.array(found["busy"])
    mean = busy.mean(axis=1)
    parts = {
        "input_wait": statistics.median(found["wait"]),
        "compute": float(np.median(mean)),
        "skew": float(np.median(busy.max(axis=1) - mean)),
        "allreduce": 0.0,
        "copy": 0.0,
    }
    counts = {"allreduces": 0, "allreduce_bytes": 0}
    if ranks > 1:
        # Keras' and ours, not what is shared besides.
        gradients = reduced[reduced["bytes"] > found["gradient_bytes"] / 100]
        counted = gradients.iloc[2 * len(gradients) // (steps + 2) :]  # after the first two steps
        parts["allreduce"] = float(counted["allreduce"].sum()) / steps
        parts["copy"] = float((counted["copy_in"] + counted["copy_out"]).sum()) / steps
        counts["allreduces"] = len(counted) / steps
        counts["allreduce_bytes"] = float(counted["bytes"].sum()) / steps
    return {
        **settings,
        **layout,
        "step": step,
        **parts,
        "rest": step - sum(parts.values()),
        **counts,
        "request": request,
        "images_per_second": ranks * settings["batch_per_rank"] / step,
        "gflop_per_image": found["gflop_per_image"],
    }


def read_timeline(path: str | Path) -> tuple[pd.DataFrame, float]:
    """Horovod's timeline (HOROVOD_TIMELINE=FILE), as rank 0 writes it.

    Returns
    -------
    allreduces : DataFrame
        A row each: start (seconds), tensors (how many were fused), bytes, and seconds of copy_in,
        allreduce, copy_out.
    request : float
        Seconds that rank 0 took for one gradient of one rank, the median over requests that came
        together; NaN if none did.
    """
    text = read_text(path).rstrip().rstrip(",")
    if not text.endswith("]"):  # of a job that was killed
        text += "]"
    events = [event for event in json.loads(text) if event]
    return _allreduces(events), _request(events)


def _phases(events: list[dict]) -> tuple[pd.DataFrame, dict[int, int]]:
    """The phases of every tensor (its pid), in the order of their ends, and the bytes of each."""
    begun, sizes, rows = {}, {}, []
    for event in events:
        tensor = event.get("pid")
        if event.get("ph") == "B":
            begun.setdefault(tensor, []).append((event["name"], event["ts"]))
        elif event.get("ph") == "E" and begun.get(tensor):
            name, begin = begun[tensor].pop()
            if shape := event.get("args", {}).get("shape"):
                sides = [int(side) for side in shape.strip("[]").replace(",", " ").split()]
                sizes[tensor] = math.prod(sides) * _BYTES[event["args"]["dtype"]]
            if name in _PHASES:
                rows.append((tensor, _PHASES[name], begin, event["ts"]))
    phases = pd.DataFrame(rows, columns=["tensor", "phase", "begin", "end"])
    phases["turn"] = phases.groupby(["tensor", "phase"]).cumcount()
    return phases, sizes


def _allreduces(events: list[dict]) -> pd.DataFrame:
    phases, sizes = _phases(events)
    sent = phases[phases["phase"] == "allreduce"]
    # Tensors of one buffer begin and end together, to the writer's few microseconds.
    starts, until = [], -math.inf
    for begin, end in zip(sent["begin"], sent["end"], strict=True):
        if begin > until:
            start, until = begin, end
        starts.append(start)
    sent = sent.assign(start=starts, bytes=[sizes.get(tensor, 0) for tensor in sent["tensor"]])
    table = sent.groupby("start").agg(tensors=("tensor", "size"), bytes=("bytes", "sum"))
    in_buffers = phases.merge(sent[["tensor", "turn", "start"]], on=["tensor", "turn"])
    spans = in_buffers.groupby(["start", "phase"]).agg(begin=("begin", "max"), end=("end", "min"))
    for phase in _PHASES.values():
        rows = spans[spans.index.get_level_values("phase") == phase].droplevel("phase")
        seconds = (rows["end"] - rows["begin"]) / 1e6
        table[phase] = seconds.reindex(table.index).fillna(0.0)
    table.insert(0, "start", table.index / 1e6)
    return table.reset_index(drop=True)


def _request(events: list[dict]) -> float:
    """Requests of one rank come in one message, and are gone through one after the other."""
    marks = [(event["name"], event["ts"]) for event in events if event.get("ph") == "X"]
    noted = pd.DataFrame(marks, columns=["rank", "time"])
    another_rank = noted["rank"] != noted["rank"].shift()
    message = (another_rank | (noted["time"].diff() > 1000)).cumsum()
    each = noted.groupby(message)["time"].agg(["count", "min", "max"])
    each = each[each["count"] >= 20]
    if each.empty:
        return math.nan
    gaps = (each["max"] - each["min"]) / (each["count"] - 1)
    return float(gaps.median()) / 1e6


def horovod_costs(observed: dict) -> tuple[float, float, str]:
    """What Horovod costs beside the allreduce itself, for the scaling model.

    Parameters
    ----------
    observed : dict
        What `observe` found on two ranks or more.

    Returns
    -------
    request, copying : float
        Seconds that rank 0 takes for one gradient of one rank, and for a byte to the fusion buffer
        and back.
    source : str
        "measured here", or the file of the reference run where mpi4py carries and has neither.
    """
    source = "measured here"
    if math.isnan(observed["request"]):
        file = ROOT / "data" / "reference" / "08_scale_out.json"
        observed = next(iter(json.loads(read_text(file))["metrics"]["observed"].values()))
        source = f"from {file.relative_to(ROOT)}, since mpi4py carries here"
        if observed["request"] is None:
            raise ConfigError(
                f"{file} was made where mpi4py carried, so it does not know Horovod's costs. Put "
                "back the project's."
            )
    return observed["request"], observed["copy"] / observed["allreduce_bytes"], source


def _batches(settings: dict, world):
    """Batches of one rank: of the images at `paths`, or the same random one again and again."""
    import tensorflow as tf

    from chexlib.data.cache import ImageStore
    from chexlib.data.pipeline import training_batches

    size, batch = settings["size"], settings["batch_per_rank"]
    rng = np.random.default_rng(world.rank)
    if paths := settings.get("paths"):
        labels = rng.random((len(paths), 14)) > 0.9
        return training_batches(
            ImageStore(paths, size=size, gather=world.allgather_object),
            labels,
            global_batch=batch * world.ranks,
            seed=0,
            rank=world.rank,
            ranks=world.ranks,
        )
    pixels = tf.constant(rng.uniform(0, 255, (batch, size, size, 1)), tf.float32)
    labels = tf.constant(rng.random((batch, 14)) > 0.9, tf.float32)
    return tf.data.Dataset.from_tensors((pixels, labels, tf.ones(batch))).cache().repeat()


def serve(settings: dict) -> None:
    """Be such a rank."""
    import_tensorflow()
    import keras
    import tensorflow as tf

    from chexlib.collectives import World, join_world, seconds_of_sums
    from chexlib.models.data_parallel import DataParallelTrainer
    from chexlib.models.weights import create_model

    class ObservedTrainer(DataParallelTrainer):
        """Notes when it had its batch."""

        def __init__(self, model, world):
            super().__init__(model, world)
            self.fed = tf.Variable(0.0, trainable=False, dtype=tf.float64)
            self.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=False)

        def train_step(self, data):
            with tf.control_dependencies([data[0]]):
                self.fed.assign(tf.timestamp())
            return super().train_step(data)

    class StepTimes(keras.callbacks.Callback):
        """Begin and end of each step, what it was busy, and how long it waited for its batch."""

        def __init__(self, trainer):
            super().__init__()
            self.trainer, self.begins, self.ends = trainer, [], [time.perf_counter()]
            self.busy, self.wait = [], []

        def on_train_batch_begin(self, batch, logs=None):
            if self.trainer is alone:
                world.barrier()  # ranks that share processors share them in a step
            self.began = time.time()
            self.begins.append(time.perf_counter())

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())
            self.busy.append(self.trainer.told()["busy"])
            self.wait.append(float(self.trainer.fed.numpy()) - self.began)

    world = join_world()
    precision = settings.get("precision", "float32")
    model = create_model(settings["topology"], size=settings["size"], precision=precision)
    together, alone = ObservedTrainer(model, world), ObservedTrainer(model, World())
    data = _batches(settings, world)
    if world.first:
        gradients = 4 * sum(v.value.shape.num_elements() for v in model.trainable_variables)
        facts = {"gflop_per_image": training_gflop(model), "gradient_bytes": gradients}
        print(json.dumps(facts), flush=True)
    while steps := world.broadcast_object(lambda: int(sys.stdin.readline() or 0)):
        trainer = together if steps > 0 else alone
        times = StepTimes(trainer)
        trainer.fit(data, steps_per_epoch=abs(steps), callbacks=[times], verbose=0, shuffle=False)
        # From one end of a step to the next the wait for the batch is counted too.
        seconds = np.diff(times.ends)
        if steps < 0:
            each = world.allgather_object(np.subtract(times.ends[1:], times.begins))
            seconds = np.max(each, axis=0)
        answer = seconds.tolist()
        if settings.get("detail"):
            answer = {
                "seconds": answer,
                "busy": times.busy,
                "wait": times.wait,
                "sums": seconds_of_sums(),
            }
        if world.first:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
