"""How the studies judge the last weights of a training, and what its batch-norm statistics cost: the
moving ones, those of a batch, and those of the population.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import log_loss

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs
from chexlib.data.pipeline import generator_for
from chexlib.data.splits import Split
from chexlib.errors import DataError
from chexlib.evaluation.auroc import mean_auroc
from chexlib.models.statistics import (
    recalibrate,
)
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training
from chexlib.training.input import divide

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
            f"images of the test part ({split.name} split of {config.data_dir}), so no AUROC is "
            "defined. Use more images, or others."
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
