"""Run by the distributed tests under mpiexec: a few training steps on real ranks, each rank's outcome to a file."""

import json
import sys
from pathlib import Path

import keras
import numpy as np

from chexlib.data.nih import load_radiographs
from chexlib.data.pipeline import ImageStore, training_batches
from chexlib.models.weights import create_model
from chexlib.training.collectives import join_world
from chexlib.training.trainer import DataParallelTrainer

job = json.loads(sys.argv[1])
world = join_world()
radiographs = load_radiographs(job["data_dir"])
model = create_model(job["topology"], size=32, seed=world.rank if job["own_start"] else 0)
trainer = DataParallelTrainer(model, world)
trainer.compile(optimizer=keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=False)
trainer.optimizer.build(model.trainable_variables)
world.broadcast([*model.variables, *trainer.optimizer.variables])
batches = training_batches(
    ImageStore(radiographs.table["path"], size=32),
    radiographs.labels,
    global_batch=job["batch"] * world.ranks,
    seed=0,
    rank=world.rank,
    ranks=world.ranks,
    mirror=False,
)
fed = np.concatenate([pixels.numpy() for pixels, _, _ in batches.take(job["steps"])])
losses = trainer.fit(batches, steps_per_epoch=job["steps"], epochs=1, verbose=0, shuffle=False).history["loss"]
weights = {f"w{i}": v.numpy() for i, v in enumerate(model.trainable_variables)}
np.savez(Path(job["out"]) / f"{world.ranks}ranks-{world.rank}.npz", fed=fed, losses=losses, **weights)
