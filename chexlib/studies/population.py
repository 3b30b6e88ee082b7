"""Is a model held back by its batch norm? What its statistics cost, and what better ones would
give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from chexlib.evaluation.auroc import mean_auroc
from chexlib.models.statistics import (
    kept_statistics,
    moving_layers,
    norm_layers,
    population_statistics,
    recalibrate,
)


@dataclass(frozen=True)
class NormReport:
    """What `bn_report` found.

    `scores` has the rows moving, batch and recalibrated, and the columns auroc (mean over findings
    that have both classes) and loss (binary cross-entropy). `layers` has a row a batch-norm layer,
    from input to output.
    """

    count: int
    scores: pd.DataFrame
    layers: pd.DataFrame

    @property
    def lag(self) -> float:
        """AUROC that the moving statistics cost, against those of each batch itself."""
        return float(self.scores.loc["batch", "auroc"] - self.scores.loc["moving", "auroc"])

    @property
    def recovered(self) -> float:
        """AUROC that recalibration brings back."""
        return float(self.scores.loc["recalibrated", "auroc"] - self.scores.loc["moving", "auroc"])

    def _repr_html_(self) -> str:
        drift = self.layers[["drift_mean", "drift_variance", "disagreement"]].median()
        words = f"{self.count} batch-norm layers; AUROC {self.lag:+.3f} with batch statistics, "
        words += f"{self.recovered:+.3f} after recalibration, both against moving statistics. "
        words += f"Median over layers: {drift.round(3).to_dict()}"
        return f"<p>{words if self.count else 'No batch-norm layer.'}</p>{self.scores.round(4).to_html()}"


def bn_report(
    model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    population: np.ndarray | None = None,
    batch: int = 32,
    world=None,
    infer: Callable | None = None,
    forward: Callable | None = None,
) -> NormReport:
    """Judge a model by its moving statistics, by those of each batch, and by those of the
    population.

    Parameters
    ----------
    model : keras.Model
        Any that gives (n, k) probabilities. It is left as it is.
    images, labels : (n, ...) float32, (n, k) 0 or 1
        What it is judged on.
    population : (m, ...) float32, optional
        Images of the training part for the population's statistics, each rank's own; `images` if
        not given.
    batch : int
        Images normalised together, where it is by their own statistics.
    world : chexlib.collectives.World, optional
    infer, forward : callable, optional
        `model(images, training=False)` and `training=True`, where they are compiled already.

    Returns
    -------
    NormReport
        Its `layers` have the columns layer, and, as means over channels: `drift_mean`, by how many
        standard deviations of the population the moving mean is off; `drift_variance`, by what
        factor the moving variance is off, as the absolute natural logarithm; `disagreement`, the
        standard deviation over batches of a batch's mean, in those of the population: by how much
        ranks with so many images each normalise differently; `ranks`, the same of the ranks' moving
        means, 0 for one rank.
    """
    import tensorflow as tf

    infer = infer or tf.function(lambda part: model(part, training=False), reduce_retracing=True)
    forward = forward or tf.function(lambda part: model(part, training=True), reduce_retracing=True)
    images, population = (
        np.asarray(images),
        np.asarray(images if population is None else population),
    )
    found = {"moving": _score(infer, images, batch)}
    layers = moving_layers(model)
    with kept_statistics(model):
        found["batch"] = _score(forward, images, batch)
    moving = [np.stack([n.moving_mean.numpy(), n.moving_variance.numpy()]) for n in layers]
    everywhere = world.allgather_object(moving) if world else [moving]
    truth = population_statistics(model, _cut(population, batch), world, forward=forward)
    rows = []
    for i, (layer, true) in enumerate(zip(layers, truth, strict=True)):
        variance, epsilon = true.variance + layer.epsilon, layer.epsilon
        spread = np.std([rank[i][0] for rank in everywhere], axis=0)
        off = [np.abs(moving[i][0] - true.mean), np.sqrt(true.between), spread]
        drift_mean, disagreement, ranks = (
            float(np.mean(values / np.sqrt(variance))) for values in off
        )
        drift = float(np.mean(np.abs(np.log((moving[i][1] + epsilon) / variance))))
        rows.append((layer.name, drift_mean, drift, disagreement, ranks))
    with kept_statistics(model):
        recalibrate(model, _cut(population, batch), world, forward=forward)
        found["recalibrated"] = _score(infer, images, batch)
    scores = pd.DataFrame({name: judge_scores(labels, values) for name, values in found.items()}).T
    columns = ["layer", "drift_mean", "drift_variance", "disagreement", "ranks"]
    return NormReport(len(norm_layers(model)), scores, pd.DataFrame(rows, columns=columns))


def judge_scores(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean AUROC over the findings that have both classes, and binary cross-entropy, of (n, k)
    labels and scores.
    """
    columns = zip(np.asarray(labels).T, np.asarray(scores, float).T, strict=True)
    loss = np.mean([log_loss(y, p, labels=[0, 1]) for y, p in columns])
    return {"auroc": mean_auroc(labels, scores), "loss": float(loss)}


def _cut(images: np.ndarray, batch: int) -> Sequence[np.ndarray]:
    """Batches of nearly equal size, at most `batch`: none of a few images, whose statistics mean
    nothing.
    """
    return np.array_split(images, -(-len(images) // batch))


def _score(predict: Callable, images: np.ndarray, batch: int) -> np.ndarray:
    return np.concatenate([np.asarray(predict(part)) for part in _cut(images, batch)])
