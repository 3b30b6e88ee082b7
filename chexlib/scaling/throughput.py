"""What a training step costs, counted and measured.

python -m chexlib.scaling.throughput '{"topology": "densenet121", "size": 224, "batch_per_rank": 16}'

is a rank (under mpiexec: ranks) that reads numbers of steps from its input, 0 being the end, takes them with
`DataParallelTrainer.fit` on random radiographs or on `paths`, and answers with the seconds of each.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time

from chexlib.cluster.profiles import find_mpi, thread_environment
from chexlib.errors import ClusterError


def training_gflop(model) -> float:
    """Floating-point operations of one training step for one image, in 10^9, a multiply-add being two.

    Those of convolutions and dense layers, forward and backward: the gradient of the inputs and that of the kernel
    cost as much as the forward pass each, but the first convolution has no gradient of its inputs. What else there is
    (normalisation, activations, pooling) is under 2 % in these networks.

    Parameters
    ----------
    model : keras.Model
        Built for images of a fixed size.
    """
    counted = [layer_flops(layer) for layer in model._flatten_layers()]
    first = next(forward for forward, _ in counted if forward)
    return (sum(map(sum, counted)) - first) / 1e9


def layer_flops(layer) -> tuple[float, float]:
    """Operations of one Keras layer for one image, forward and backward; 0 of what is no convolution and not dense."""
    import keras

    if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
        return 0.0, 0.0
    *places, _ = layer.output.shape[1:]
    forward = 2.0 * math.prod(layer.kernel.shape) * math.prod(places)
    return forward, 2 * forward


def command(settings: dict, *, ranks: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves such steps on `ranks` MPI ranks of this host, and its environment's own variables.

    Parameters
    ----------
    settings : dict
        topology, size, batch_per_rank; optionally precision, and paths of images.
    """
    mpi = find_mpi()
    launch = [mpi.command, "-n", str(ranks), *mpi.flags()] if ranks > 1 else []
    serve = [sys.executable, "-m", "chexlib.scaling.throughput", json.dumps(settings)]
    return [*launch, *serve], thread_environment(threads)


def measure(settings: dict, *, ranks: int, threads: int, steps: int = 6, timeout: float = 900) -> dict:
    """Images per second of a layout on this host, the median over `steps` after two that do not count.

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
    process = subprocess.Popen(words, env={**os.environ, **own}, text=True, **pipes)
    layout = f"{ranks} ranks x {threads} threads, {settings}"
    try:
        said, errors = process.communicate(f"2\n{steps}\n0\n", timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{layout}: no answer within {timeout:g} s. Try smaller images or batches.") from None
    finally:
        process.terminate()
        process.wait()
    answers = [json.loads(line) for line in said.splitlines() if line.startswith(("[", "{"))]
    if process.returncode or len(answers) != 3:
        raise ClusterError(f"{layout}: the ranks ended with status {process.returncode}. {errors[-1500:]}")
    facts, _, seconds = answers
    speed = ranks * settings["batch_per_rank"] / statistics.median(seconds)
    return {**facts, "images_per_second": speed, "seconds": seconds}


def serve(settings: dict) -> None:
    """Be such a rank."""
    import keras
    import numpy as np
    import tensorflow as tf

    from chexlib.data.cache import ImageStore
    from chexlib.data.pipeline import training_batches
    from chexlib.models.weights import create_model
    from chexlib.training.collectives import join_world
    from chexlib.training.trainer import DataParallelTrainer

    world, size, batch = join_world(), settings["size"], settings["batch_per_rank"]
    model = create_model(settings["topology"], size=size, precision=settings.get("precision", "float32"))
    trainer = DataParallelTrainer(model, world)
    trainer.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=False)
    rng = np.random.default_rng(world.rank)
    if paths := settings.get("paths"):
        labels = rng.random((len(paths), 14)) > 0.9
        store = ImageStore(paths, size=size, gather=world.gather)
        share = {"global_batch": batch * world.ranks, "seed": 0, "rank": world.rank, "ranks": world.ranks}
        data = training_batches(store, labels, **share)
    else:
        pixels = tf.constant(rng.uniform(0, 255, (batch, size, size, 1)), tf.float32)
        labels = tf.constant(rng.random((batch, 14)) > 0.9, tf.float32)
        data = tf.data.Dataset.from_tensors((pixels, labels, tf.ones(batch))).cache().repeat()
    ends: list[float] = []  # of the steps: from one to the next the wait for the batch is counted too
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    if world.first:
        print(json.dumps({"gflop_per_image": training_gflop(model)}), flush=True)
    while steps := world.share(lambda: int(sys.stdin.readline() or 0)):
        ends[:] = [time.perf_counter()]
        trainer.fit(data, steps_per_epoch=steps, callbacks=[clock], verbose=0, shuffle=False)
        if world.first:
            print(json.dumps(np.diff(ends).tolist()), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
