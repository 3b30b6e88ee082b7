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

import numpy as np

from chexlib.cluster.cleanup import no_longer_than_this
from chexlib.errors import ClusterError
from chexlib.machine import import_tensorflow
from chexlib.mpi import find_mpi, thread_environment

TIMEOUT = 900  # seconds for the steps of one measurement


def command(settings: dict, *, ranks: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves such steps on `ranks` MPI ranks of this host, and its environment's
    own variables.

    Parameters
    ----------
    settings : dict
        topology, size, batch_per_rank; optionally precision, paths of images, and detail (True).
    """
    mpi = find_mpi()
    launch = [*mpi.start(), "-n", str(ranks), *mpi.flags()] if ranks > 1 else []
    serve = [sys.executable, "-m", "chexlib.scaling.throughput", json.dumps(settings)]
    return [*launch, *serve], thread_environment(threads)


def measure(settings: dict, *, ranks: int, threads: int, steps: int = 6) -> dict:
    """Images per second of a layout on this host, the median over `steps` after two that do not
    count.

    Returns
    -------
    dict
        images_per_second; seconds of each step; gflop_per_image; gradient_bytes. With
        `settings["detail"]` also three lists by rank and step of seconds: input_wait, for the
        batch; compute; and sum, from its end until the sum over ranks is there.

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
                env={**os.environ, "TMPDIR": tempfile.gettempdir(), **variables, **guarded},
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
    facts, _, found = answers
    found = found if settings.get("detail") else {"seconds": found}
    speed = ranks * settings["batch_per_rank"] / statistics.median(found["seconds"])
    return {**facts, "images_per_second": speed, **found}


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
    import keras

    kinds = keras.layers.Conv2D | keras.layers.Dense
    forward = []
    for layer in _ordered_layers(model):
        if isinstance(layer, kinds):
            *places, _ = layer.output.shape[1:]
            forward.append(2.0 * math.prod(layer.kernel.shape) * math.prod(places))
    return (3 * sum(forward) - forward[0]) / 1e9


def _ordered_layers(model):
    """The layers of a network, those of a network inside it in its place.

    Keras' own `_flatten_layers` gives the layers of a network inside another one last layer first.
    """
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _ordered_layers(layer)
        else:
            yield layer


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

    from chexlib.collectives import World, join_world
    from chexlib.models.data_parallel import DataParallelTrainer
    from chexlib.models.weights import create_model

    def pass_through(tensors, note):
        """The tensors, of which nothing is used before the time at which all are there is noted."""
        with tf.control_dependencies(tensors):
            now = tf.timestamp()
        note.assign(now)
        with tf.control_dependencies([now]):
            return [tf.identity(tensor) for tensor in tensors]

    class TimedWorld(World):
        """Notes when this rank's gradients were there, and when those of all were."""

        def allreduce(self, tensors):
            return pass_through(super().allreduce(pass_through(tensors, ready)), summed)

    class ObservedTrainer(DataParallelTrainer):
        """Notes when it had its batch, before it computes."""

        def __init__(self, model, world):
            super().__init__(model, world)
            self.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=False)

        def train_step(self, data):
            return super().train_step(pass_through(data, fed))

    class StepTimes(keras.callbacks.Callback):
        """Begin and end of each step, and what this rank notes in it."""

        def __init__(self, trainer):
            super().__init__()
            self.trainer, self.begins, self.ends = trainer, [], [time.perf_counter()]
            self.parts = {"input_wait": [], "compute": [], "sum": []}

        def on_train_batch_begin(self, batch, logs=None):
            if self.trainer is alone:
                world.barrier()  # ranks that share processors share them in a step
            self.began = time.time()
            self.begins.append(time.perf_counter())

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())
            times = [self.began, *(float(note.numpy()) for note in notes)]
            for own, seconds in zip(self.parts.values(), np.diff(times), strict=True):
                own.append(seconds)

    world = TimedWorld(**vars(join_world()))
    fed, ready, summed = notes = [tf.Variable(0.0, dtype=tf.float64) for _ in range(3)]
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
            ranks = world.allgather_object(times.parts)
            answer = {"seconds": answer}
            answer |= {name: [each[name] for each in ranks] for name in times.parts}
        if world.first:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
