"""Radiographs in, `{finding: probability}` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import WeightsError
from chexlib.findings import FINDINGS


def predict(images: Sequence[str | Path], *, weights: str | Path, batch: int = 32) -> pd.DataFrame:
    """Score image files with a trained model.

    Parameters
    ----------
    images : paths of PNG or JPEG files, grey or RGB, of any size
    weights : path of a `model.keras` that chexlib wrote

    Returns
    -------
    DataFrame
        (images, 14) float32 probabilities, indexed by path, one column a finding.

    Raises
    ------
    DataError
        An image cannot be read; it is named.
    WeightsError
        The weights cannot be used.

    Examples
    --------
    >>> predict(["radiograph.png"], weights="runs/latest/03_train_baseline/model.keras").loc["radiograph.png"].to_dict()
    """
    from chexlib.data.cache import resize_area
    from chexlib.data.nih import read_image
    from chexlib.models.weights import load_model

    # Images first: a wrong path is told before the slow import of TensorFlow.
    decoded = [read_image(path) for path in images]
    model, card = load_model(weights)
    pixels = np.stack([resize_area(image, card["size"]) for image in decoded])[..., None].astype(np.float32)
    scores = [model(pixels[i : i + batch], training=False) for i in range(0, len(pixels), batch)]
    return pd.DataFrame(np.concatenate(scores), index=[str(path) for path in images], columns=list(FINDINGS))


def newest_weights(runs_dir: str | Path) -> Path:
    """The `model.keras` that was written last under `runs_dir`.

    Raises
    ------
    WeightsError
        No run has trained a model yet.
    """
    found = sorted(Path(runs_dir).glob("*/*/model.keras"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise WeightsError(f"no run under {runs_dir} has a model.keras. Train with `make run`, or name --weights FILE.")
    return found[-1].resolve()
