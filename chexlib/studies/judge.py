"""How the studies judge the last weights of a training, and what its batch-norm statistics cost: the
moving ones, those of a batch, and those of the population.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs
from chexlib.data.pipeline import generator_for
from chexlib.data.splits import Split
from chexlib.errors import ChexlibError, DataError
from chexlib.evaluation.auroc import mean_auroc
from chexlib.models.statistics import (
    kept_statistics,
    moving_layers,
    population_statistics,
    recalibrate,
)
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training, learn
from chexlib.training.input import divide
from chexlib.training.trainer import Reuse

POPULATION = 1024  # training images, at most, for the statistics of the population
EVALUATED = 64  # images normalised together where a model is judged by batch statistics


def divide_to_judge(config: TrainConfig) -> tuple[Split, dict[str, Radiographs]]:
    """`divide`, for a study, which compares trainings by their mean AUROC on the test part.

    Raises
    ------
    DataError
        No finding has both positives and negatives there, so there is no AUROC.
    """
    split, parts = divide(config)
    labels = parts["test"].labels
    if not (labels.min(axis=0) < labels.max(axis=0)).any():
        raise DataError(
            f"None of the 14 findings has both positives and negatives among the {len(labels):,} "
            f"images of the test part ({split.name} split of {config.data_dir}): no AUROC is "
            "defined, and there is nothing to compare. Use more images, or others."
        )
    return split, parts


def judge_scores(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean AUROC over the findings that have both classes, and binary cross-entropy, of (n, k)
    labels and scores.
    """
    columns = zip(np.asarray(labels).T, np.asarray(scores, float).T, strict=True)
    losses = [log_loss(y, p, labels=[0, 1]) for y, p in columns]
    return {"auroc": mean_auroc(labels, scores), "loss": float(np.mean(losses))}


def recalibrate_on_train(training: Training) -> None:
    """`recalibrate` a training's model on `POPULATION` training images, each rank on its share.

    They are drawn at random, the same ones for every training on these images.
    """
    world = training.world
    paths = training.parts["train"].table["path"]
    store = ImageStore(paths, size=training.config.size, gather=world.allgather_object)
    chosen = _draw_population(len(store))
    cuts = world.batches(len(chosen), batch=EVALUATED)
    batches = (store.take(chosen[cut])[..., None].astype(np.float32) for cut in cuts)
    recalibrate(training.model, batches, world, forward=training.trainer.infer_by_batch)


def _draw_population(n: int) -> np.ndarray:
    """Rows of at most `POPULATION` of n images, drawn at random, as a table is in the order of its
    patients' numbers.
    """
    return generator_for("recalibration", seed=0).permutation(n)[:POPULATION]


@dataclass(frozen=True)
class NormReport:
    """AUROC of a model by kind of batch-norm statistics, and how far its moving ones are off.

    `scores` has the rows moving, batch and recalibrated, and the columns auroc (mean over findings
    that have both classes) and loss (binary cross-entropy). `layers` has a row a batch-norm layer,
    from input to output.
    """

    scores: pd.DataFrame
    layers: pd.DataFrame


def report_after(config: TrainConfig, *, reuse: Reuse) -> NormReport:
    """Train, and look at the batch norm of the last weights: `bn_report` on the test part, by local
    batches.
    """
    training = learn(config, reuse=reuse)
    if training.stopped:
        raise ChexlibError("the training for this report was stopped. Run it again.")
    gather = training.world.allgather_object

    def pixels(paths):
        store = ImageStore(paths, size=config.size, gather=gather)
        return store.take(range(len(store)))[..., None].astype(np.float32)

    train, test = training.parts["train"], training.parts["test"]
    population = train.table["path"].iloc[_draw_population(len(train))]
    return bn_report(
        training.model,
        pixels(test.table["path"]),
        test.labels,
        population=pixels(population),
        batch=config.batch_size,
        world=training.world,
        infer=training.trainer.infer,
        forward=training.trainer.infer_by_batch,
    )


def bn_report(
    model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    population: np.ndarray,
    batch: int,
    world,
    infer: Callable,
    forward: Callable,
) -> NormReport:
    """Judge a model by its moving statistics, by those of each batch, and by those of the
    population.

    Parameters
    ----------
    model : keras.Model
        Any that gives (n, k) probabilities. It is left as it is.
    images, labels : (n, ...) float32, (n, k) 0 or 1
        What it is judged on.
    population : (m, ...) float32
        Images of the training part for the population's statistics, each rank's own.
    batch : int
        Images normalised together, where it is by their own statistics.
    world : chexlib.collectives.World
    infer, forward : callable
        `model(images, training=False)` and `training=True`, compiled or not.

    Returns
    -------
    NormReport
        Its `layers` have the columns layer, and, as means over channels: `drift_mean`, by how many
        standard deviations of the population the moving mean is off; `drift_variance`, by what
        factor the moving variance is off, as the absolute natural logarithm; `disagreement`, the
        standard deviation over batches of a batch's mean, in those of the population: by how much
        ranks with so many images each normalise differently.
    """

    def score(predict):
        scores = [np.asarray(predict(part)) for part in _batches_of(images, batch)]
        return judge_scores(labels, np.concatenate(scores))

    judged = {"moving": score(infer)}
    with kept_statistics(model):
        judged["batch"] = score(forward)
    layers = moving_layers(model)
    moving = [(layer.moving_mean.numpy(), layer.moving_variance.numpy()) for layer in layers]
    parts = _batches_of(population, batch)
    truth = population_statistics(model, parts, world, forward=forward)
    rows = []
    for layer, (mean, variance), true in zip(layers, moving, truth, strict=True):
        true_variance = true.variance + layer.epsilon
        deviation = np.sqrt(true_variance)
        factor = np.log((variance + layer.epsilon) / true_variance)
        row = {
            "layer": layer.name,
            "drift_mean": np.mean(np.abs(mean - true.mean) / deviation),
            "drift_variance": np.mean(np.abs(factor)),
            "disagreement": np.mean(np.sqrt(true.between) / deviation),
        }
        rows.append(row)
    with kept_statistics(model):
        recalibrate(model, parts, world, forward=forward)
        judged["recalibrated"] = score(infer)
    numbers = ["drift_mean", "drift_variance", "disagreement"]
    table = pd.DataFrame(rows, columns=["layer", *numbers])  # without rows for VGG-16
    return NormReport(pd.DataFrame(judged).T, table.astype(dict.fromkeys(numbers, float)))


def _batches_of(images: np.ndarray, batch: int) -> list[np.ndarray]:
    """Batches of nearly equal size, at most `batch`: none of a few images, whose statistics mean
    nothing.
    """
    return np.array_split(images, -(-len(images) // batch))
