"""A rank of our training, `DataParallelTrainer.fit` as `chexlib train` has it, on random radiographs or on files.

Serves bench.py: reads a number of steps from its input, takes them, and answers with the seconds of each.
"""

import json
import sys
import time

import numpy as np

settings = json.loads(sys.argv[1])

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from chexlib.data.cache import ImageStore  # noqa: E402
from chexlib.data.pipeline import training_batches  # noqa: E402
from chexlib.models.weights import create_model  # noqa: E402
from chexlib.scaling.throughput import training_gflop  # noqa: E402
from chexlib.training.collectives import join_world  # noqa: E402
from chexlib.training.trainer import DataParallelTrainer  # noqa: E402


class Clock(keras.callbacks.Callback):
    """Seconds of each step, from the end of the one before: the wait for the next batch is in it."""

    def on_train_begin(self, logs=None):
        self.seconds, self.last = [], time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.last, before = time.perf_counter(), self.last
        self.seconds.append(self.last - before)


world = join_world()
size, batch = settings["size"], settings["batch_per_rank"]
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
model = create_model(settings["topology"], size=size, precision=settings["precision"])
trainer = DataParallelTrainer(model, world)
trainer.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=False)
if paths := settings.get("paths"):
    labels = np.random.default_rng(0).random((len(paths), 14)) > 0.9
    store = ImageStore(paths, size=size, gather=world.gather)
    share = {"global_batch": batch * world.ranks, "seed": 0, "rank": world.rank, "ranks": world.ranks}
    data = training_batches(store, labels, **share)
else:
    rng = np.random.default_rng(world.rank)
    pixels = tf.constant(rng.uniform(0, 255, (batch, size, size, 1)), tf.float32)
    labels = tf.constant(rng.random((batch, 14)) > 0.9, tf.float32)
    data = tf.data.Dataset.from_tensors((pixels, labels, tf.ones(batch))).cache().repeat()
clock = Clock()
if world.first:
    print(json.dumps({"gflop_per_image": training_gflop(model)}), flush=True)
while True:
    steps = world.share(lambda: int(sys.stdin.readline() or 0))
    if not steps:
        break
    trainer.fit(data, steps_per_epoch=steps, callbacks=[clock], verbose=0, shuffle=False)
    if world.first:
        print(json.dumps(clock.seconds), flush=True)
