"""Run by the distributed tests under mpiexec: training steps on real ranks, each rank's outcome to
a file.

The job has out, data_dir, and trainings, a list of settings that are taken one after the other; and
parts, the images of each rank in `norm_job`, which then comes first.
"""

from pathlib import Path

import keras
import norm_job
import numpy as np

from chexlib.data.cache import ImageStore
from chexlib.data.nih import load_radiographs
from chexlib.data.pipeline import training_batches
from chexlib.models.data_parallel import DataParallelTrainer
from chexlib.models.weights import create_model
from chexlib.training.optimizers import FusedAdam


def train(
    world,
    radiographs,
    out,
    *,
    name,
    topology,
    batch,
    steps,
    own_start=False,
    precision="float32",
    freeze=False,
    accumulation=1,
    rate=1e-3,
    size=32,
    keep="",
    **settings,
):
    """Take the steps; save what was fed, losses and all variables, averaged statistics and the
    optimizer's too.

    With `keep`, the weights also as Keras' own file of this path.
    """
    seed = world.rank if own_start else 0
    model = create_model(topology, size=size, seed=seed, precision=precision, **settings)
    if freeze:
        norms = [
            layer
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        assert norms
        for layer in norms:
            layer.trainable = False
    trainer = DataParallelTrainer(model, world, accumulation=accumulation)
    optimizer = (
        FusedAdam(1e-3)
        if precision == "mixed_bfloat16"
        else keras.optimizers.SGD(1e-4 if freeze else rate, momentum=0.9)
    )
    trainer.compile(optimizer=optimizer, jit_compile=False)
    optimizer.build(model.trainable_variables)
    world.broadcast([*model.variables, *optimizer.variables])
    before = [v.numpy() for v in model.trainable_variables]
    order = dict(global_batch=batch * world.ranks * accumulation, accumulation=accumulation)
    order |= dict(seed=0, rank=world.rank, ranks=world.ranks, mirror=False)
    store = ImageStore(radiographs.table["path"], size=size, gather=world.allgather_object)
    batches = training_batches(store, radiographs.labels, **order)
    fed = np.concatenate([pixels.numpy() for pixels, _, _ in batches.take(min(steps, 3))])
    losses = trainer.fit(
        batches, steps_per_epoch=steps, epochs=1, verbose=0, shuffle=False
    ).history["loss"]
    found = {f"w{i:04d}": v.numpy() for i, v in enumerate(model.trainable_variables)}
    world.average(model.non_trainable_variables)
    found |= {f"s{i:04d}": v.numpy() for i, v in enumerate(model.non_trainable_variables)}
    found |= {f"o{i:04d}": v.numpy() for i, v in enumerate(optimizer.variables)}
    moved = sum(
        not np.array_equal(a, v.numpy())
        for a, v in zip(before, model.trainable_variables, strict=True)
    )
    convolution = next(
        layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Conv2D)
    )
    facts = {
        "fed": fed,
        "losses": losses,
        "moved": moved / len(before),
        "types": convolution.compute_dtype,
        "squares": trainer.told()["squares"],  # of the last step
    }
    if keep and world.first:
        model.save_weights(keep)
    np.savez(Path(out) / f"{name}-{world.ranks}ranks-{world.rank}.npz", **facts, **found)


def take(world, job):
    """Do the job on this rank."""
    if job["parts"]:
        norm_job.save(world, job["out"], job["parts"])
    radiographs = load_radiographs(job["data_dir"])
    for training in job["trainings"]:
        train(world, radiographs, job["out"], **training)
        keras.utils.clear_session()
