"""A linear model on small pixels: what a network must beat before anything is concluded of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs
from chexlib.evaluation.auroc import mean_auroc

PIXELS = 8  # side to which radiographs are averaged down
PENALTIES = np.logspace(0, 6, 13)  # of the squared weights; validation chooses


def ridge_scores(parts: Mapping[str, Radiographs], *, size: int) -> np.ndarray:
    """Scores of the test part by ridge regression on `PIXELS` x `PIXELS` pixels, (n, 14).

    Fitted on the train part, one regression per finding with one penalty for all: the one with the
    best mean AUROC on the validation part. Scores rank images; they are no probabilities.

    Parameters
    ----------
    parts : train, validation and test, as of `chexlib.training.input.divide`
    size : int
        Side in pixels at which the images are cached, a multiple of `PIXELS`.
    """
    pixels = {name: small_pixels(part, size=size) for name, part in parts.items()}
    labels = {name: part.labels for name, part in parts.items()}

    def fitted(penalty):
        return make_pipeline(StandardScaler(), Ridge(penalty)).fit(pixels["train"], labels["train"])

    models = [fitted(penalty) for penalty in PENALTIES]
    quality = [
        mean_auroc(labels["validation"], model.predict(pixels["validation"])) for model in models
    ]
    return models[int(np.nanargmax(quality))].predict(pixels["test"])


def small_pixels(radiographs: Radiographs, *, size: int) -> np.ndarray:
    """Radiographs averaged down to `PIXELS` x `PIXELS` pixels, (n, 64) float64."""
    store = ImageStore(radiographs.table["path"], size=size)
    images = store.take(range(len(store)))
    side = size // PIXELS
    blocks = images[:, : PIXELS * side, : PIXELS * side].reshape(-1, PIXELS, side, PIXELS, side)
    return blocks.mean(axis=(2, 4)).reshape(len(blocks), -1)
