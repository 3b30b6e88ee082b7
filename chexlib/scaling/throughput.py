"""What a training step costs, counted and measured.

python -m chexlib.scaling.throughput '{"topology": "densenet121", "size": 224, "batch_per_rank":
16}'

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

from chexlib.errors import ClusterError, ConfigError
from chexlib.files import ROOT
from chexlib.machine import import_tensorflow
from chexlib.mpi import find_mpi, thread_environment
from chexlib.scaling.timeline import read_timeline


def training_gflop(model) -> float:
    """Floating-point operations of one training step for one image, in 10^9, a multiply-add being
    two.

    Those of convolutions and dense layers, forward and backward: the gradient of the inputs and
    that of the kernel cost as much as the forward pass each, but the first convolution has no
    gradient of its inputs. What else there is (normalisation, activations, pooling) is under 2 % in
    these networks.

    Parameters
    ----------
    model : keras.Model
        Built for images of a fixed size.
    """
    return sum(forward + backward for _, forward, backward in layer_costs(model)) / 1e9


def layer_costs(model) -> list[tuple]:
    """The layers of a network in the order of its forward pass, with what each costs a step.

    Returns
    -------
    list of (keras.Layer, float, float)
        Operations for one image, forward and backward. The backward pass of the first layer that
        has any is that of its kernel alone: nothing needs the gradient of the pixels.
    """
    costs = [(layer, *layer_flops(layer)) for layer in _ordered_layers(model)]
    for place, (layer, forward, backward) in enumerate(costs):
        if forward:
            costs[place] = (layer, forward, backward - forward)
            break
    return costs


def _ordered_layers(model):
    """The layers of a network, those of a network inside it in its place.

    Keras' own `_flatten_layers` gives the layers of a network inside another one last layer first.
    """
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _ordered_layers(layer)
        else:
            yield layer


def layer_flops(layer) -> tuple[float, float]:
    """Operations of one Keras layer for one image, forward and backward; 0 of what is no
    convolution and not dense.
    """
    import keras

    if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
        return 0.0, 0.0
    *places, _ = layer.output.shape[1:]
    forward = 2.0 * math.prod(layer.kernel.shape) * math.prod(places)
    return forward, 2 * forward


def command(settings: dict, *, ranks: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves such steps on `ranks` MPI ranks of this host, and its environment's
    own variables.

    Parameters
    ----------
    settings : dict
        topology, size, batch_per_rank; optionally precision, and paths of images.
    """
    mpi = find_mpi()
    launch = [mpi.command, "-n", str(ranks), *mpi.flags()] if ranks > 1 else []
    serve = [sys.executable, "-m", "chexlib.scaling.throughput", json.dumps(settings)]
    return [*launch, *serve], thread_environment(threads)


def measure(
    settings: dict,
    *,
    ranks: int,
    threads: int,
    steps: int = 6,
    timeout: float = 900,
    **environment: str,
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
    words, own = command(settings, ranks=ranks, threads=threads)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(words, env={**os.environ, **own, **environment}, text=True, **pipes)
    layout = f"{ranks} ranks x {threads} threads, {settings}"
    try:
        said, errors = process.communicate(f"2\n{steps}\n0\n", timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{layout}: no answer within {timeout:g} s. Try smaller images or batches."
        ) from None
    finally:
        process.terminate()
        process.wait()
    answers = [json.loads(line) for line in said.splitlines() if line.startswith(("[", "{"))]
    if process.returncode or len(answers) != 3:
        raise ClusterError(
            f"{layout}: the ranks ended with status {process.returncode}. {errors[-1500:]}"
        )
    facts, _, seconds = answers
    if isinstance(seconds, dict):  # asked for in detail
        facts, seconds = {**facts, **seconds}, seconds["seconds"]
    speed = ranks * settings["batch_per_rank"] / statistics.median(seconds)
    return {**facts, "images_per_second": speed, "seconds": seconds}


def observe(
    settings: dict,
    *,
    ranks: int,
    threads: int,
    steps: int = 6,
    timeout: float = 900,
    **environment: str,
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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timeline.json"
        own = {**environment, **({"HOROVOD_TIMELINE": str(file)} if ranks > 1 else {})}
        found = measure(
            {**settings, "detail": True},
            ranks=ranks,
            threads=threads,
            steps=steps,
            timeout=timeout,
            **own,
        )
        if ranks > 1 and not found["sums"] and not file.exists():
            raise ClusterError(f"Horovod wrote no timeline to {file}. Is there room in {folder}?")
        reduced, request = (
            read_timeline(file) if file.exists() else (pd.DataFrame(found["sums"]), math.nan)
        )
    busy = np.array(found["busy"])
    seen = {
        "step": statistics.median(found["seconds"]),
        "input_wait": statistics.median(found["wait"]),
    }
    seen |= {"compute": float(np.median(busy.mean(axis=1)))}
    seen |= {
        "skew": float(np.median(busy.max(axis=1) - busy.mean(axis=1))),
        "allreduce": 0.0,
        "copy": 0.0,
    }
    counts = {"allreduces": 0, "allreduce_bytes": 0}
    if ranks > 1:
        # Keras' and ours, not what is shared besides.
        mine = reduced[reduced["bytes"] > found["gradient_bytes"] / 100]
        each = mine.iloc[2 * len(mine) // (steps + 2) :]  # the first two steps do not count
        seen["allreduce"] = float(each["allreduce"].sum()) / steps
        seen["copy"] = float((each["copy_in"] + each["copy_out"]).sum()) / steps
        counts = {
            "allreduces": len(each) / steps,
            "allreduce_bytes": float(each["bytes"].sum()) / steps,
        }
    seen["rest"] = seen["step"] - sum(value for name, value in seen.items() if name != "step")
    speed = ranks * settings["batch_per_rank"] / seen["step"]
    told = {"images_per_second": speed, "gflop_per_image": found["gflop_per_image"]}
    return {
        **settings,
        "ranks": ranks,
        "threads": threads,
        **seen,
        **counts,
        "request": request,
        **told,
    }


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
        observed = next(iter(json.loads(file.read_text())["metrics"]["observed"].values()))
        source = f"from {file.relative_to(ROOT)}, since mpi4py carries here"
        if observed["request"] is None:
            raise ConfigError(
                f"{file} was made where mpi4py carried, so it does not know Horovod's costs. Put "
                "back the project's."
            )
    return observed["request"], observed["copy"] / observed["allreduce_bytes"], source


def serve(settings: dict) -> None:
    """Be such a rank."""
    import_tensorflow()
    import keras
    import tensorflow as tf

    from chexlib.collectives import World, join_world, seconds_of_sums
    from chexlib.data.cache import ImageStore
    from chexlib.data.pipeline import training_batches
    from chexlib.models.data_parallel import DataParallelTrainer
    from chexlib.models.weights import create_model

    class Observed(DataParallelTrainer):
        """Notes when it had its batch."""

        def train_step(self, data):
            with tf.control_dependencies([data[0]]):
                self.fed.assign(tf.timestamp())
            return super().train_step(data)

    world, size, batch = join_world(), settings["size"], settings["batch_per_rank"]
    model = create_model(
        settings["topology"], size=size, precision=settings.get("precision", "float32")
    )

    def trainer_in(place):
        trainer = Observed(model, place)
        trainer.fed = tf.Variable(0.0, trainable=False, dtype=tf.float64)
        trainer.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=False)
        return trainer

    together, alone = trainer_in(world), trainer_in(World())
    rng = np.random.default_rng(world.rank)
    if paths := settings.get("paths"):
        labels = rng.random((len(paths), 14)) > 0.9
        store = ImageStore(paths, size=size, gather=world.allgather_object)
        share = {
            "global_batch": batch * world.ranks,
            "seed": 0,
            "rank": world.rank,
            "ranks": world.ranks,
        }
        data = training_batches(store, labels, **share)
    else:
        pixels = tf.constant(rng.uniform(0, 255, (batch, size, size, 1)), tf.float32)
        labels = tf.constant(rng.random((batch, 14)) > 0.9, tf.float32)
        data = tf.data.Dataset.from_tensors((pixels, labels, tf.ones(batch))).cache().repeat()
    began, ends, busy, wait = [], [], [], []

    def note(trainer):
        def begin(step, logs=None):
            if trainer is alone:
                world.barrier()  # ranks that share processors share them in a step
            began.append((time.perf_counter(), time.time()))

        def end(step, logs=None):
            ends.append(time.perf_counter())
            busy.append(trainer.told()["busy"])
            wait.append(float(trainer.fed.numpy()) - began[-1][1])

        return keras.callbacks.LambdaCallback(on_train_batch_begin=begin, on_train_batch_end=end)

    if world.first:
        gradients = 4 * sum(v.value.shape.num_elements() for v in model.trainable_variables)
        facts = {"gflop_per_image": training_gflop(model), "gradient_bytes": gradients}
        print(json.dumps(facts), flush=True)
    while steps := world.broadcast_object(lambda: int(sys.stdin.readline() or 0)):
        trainer = together if steps > 0 else alone
        began[:], ends[:], busy[:], wait[:] = [], [time.perf_counter()], [], []
        trainer.fit(
            data, steps_per_epoch=abs(steps), callbacks=[note(trainer)], verbose=0, shuffle=False
        )
        # From one end of a step to the next the wait for the batch is counted too.
        seconds = np.diff(ends)
        if steps < 0:
            seconds = np.max(
                world.allgather_object(np.subtract(ends[1:], [start for start, _ in began])), axis=0
            )
        if world.first:
            detail = {
                "seconds": seconds.tolist(),
                "busy": busy,
                "wait": wait,
                "sums": seconds_of_sums(),
            }
            print(json.dumps(detail if settings.get("detail") else seconds.tolist()), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
