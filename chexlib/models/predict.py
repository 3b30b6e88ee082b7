"""Prediction: the probability of each finding, from radiograph files and a trained model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.data.cache import resize_area
from chexlib.data.pictures import find_pictures, frontal_doubt, read_picture
from chexlib.errors import DataError, WeightsError, one_line
from chexlib.findings import FINDINGS
from chexlib.machine import cores

BATCH = 32  # images at once, of at most `BATCH_SIDE`
# Px; of larger images as many as have no more pixels, as activations take memory by the pixel.
BATCH_SIDE = 224


def batch_of(size: int) -> int:
    """How many images of this side in pixels a network is given at once, with which each stays
    below 4 GiB.
    """
    return max(1, min(BATCH, BATCH * BATCH_SIDE**2 // size**2))


@dataclass
class Predictions:
    """Probabilities, doubts and errors of many image files, by `predict_all`.

    Attributes
    ----------
    probabilities : DataFrame
        (images, 14) float32, indexed by path, one column a finding.
    doubts : dict
        Path to the reason why an image does not look like an upright frontal chest radiograph.
    errors : dict
        Path to the reason why an image has no probabilities.
    """

    probabilities: pd.DataFrame
    doubts: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def to_table(self) -> pd.DataFrame:
        """A row per image, read or not: image, doubt, error, then a probability a finding; empty
        where there is none.
        """
        images = _names([*self.probabilities.index, *self.errors])
        rows = self.probabilities.reindex(images)
        rows.insert(0, "image", images)
        rows.insert(1, "doubt", _names(self.doubts.get(image, "") for image in images))
        rows.insert(2, "error", _names(self.errors.get(image, "") for image in images))
        return rows.reset_index(drop=True)


def predict(
    images: Sequence[str | Path], *, weights: str | Path, batch: int | None = None
) -> pd.DataFrame:
    """Score image files with a trained model.

    Parameters
    ----------
    images : paths of PNG, JPEG or DICOM files, grey or RGB, of any size
    weights : path of a `model.keras` that chexlib wrote, or of its run's folder
    batch : int, optional
        Images at once; `batch_of` the network's size if not given.

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
    paths = [str(path) for path in images]
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise DataError(f"there is no file {missing[0]}. Name PNG, JPEG or DICOM files.")
    return _score(paths, weights, batch, strict=True).probabilities


def predict_all(
    images: Sequence[str | Path],
    *,
    weights: str | Path,
    batch: int | None = None,
    each: Callable | None = None,
) -> Predictions:
    """Score files, folders and patterns; an image that cannot be read is told, and the others are
    scored.

    Parameters
    ----------
    images : paths of PNG, JPEG or DICOM files, of folders of them, or patterns such as
        `films/*.dcm`
    weights : path of a `model.keras` that chexlib wrote, or of its run's folder
    batch : int, optional
        Images at once; `batch_of` the network's size if not given.
    each : callable, optional
        Called after every batch with the model, paths, pixels (k, size, size, 1) and probabilities
        (k, 14).

    Raises
    ------
    WeightsError
        The weights cannot be used.
    """
    return _score(find_pictures(images), weights, batch, each=each)


def _score(
    paths: list[str], weights: str | Path, batch: int | None, *, each=None, strict: bool = False
) -> Predictions:
    from chexlib.models.weights import load_model, read_card

    size, model = read_card(weights)["size"], None
    batch = batch or batch_of(size)
    scores, names, doubts, errors = [], [], {}, {}
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(paths), batch):
            pixels = []
            chunk = paths[start : start + batch]
            for path, found in zip(
                chunk, pool.map(lambda path: _read(path, size), chunk), strict=True
            ):
                if isinstance(found, DataError):
                    if strict:
                        raise found
                    errors[path] = str(found)
                    continue
                image, doubt = found
                pixels.append(image)
                names.append(path)
                if doubt:
                    doubts[path] = doubt
            if not pixels:
                continue
            # Images first: a wrong path is told before the slow import of TensorFlow.
            if model is None:
                model, _ = load_model(weights)
                infer = _compiled(model)
            pixels = np.stack(pixels)[..., None].astype(np.float32)
            scores.append(infer(pixels).numpy())
            if each is not None:
                each(model, names[-len(pixels) :], pixels, scores[-1])
    values = np.concatenate(scores) if scores else np.empty((0, len(FINDINGS)), np.float32)
    table = pd.DataFrame(values, index=_names(names), columns=list(FINDINGS))
    return Predictions(table, doubts, errors)


def _names(names: Iterable[str]) -> pd.Index:
    """Names as they are: pandas' own type for text takes nothing but UTF-8."""
    return pd.Index(list(names), dtype=object)


def _compiled(model):
    """The network as a graph, which lets go of each layer's output as soon as it can: DenseNet-121
    needs a sixth.
    """
    import tensorflow as tf

    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
    return tf.function(lambda pixels: model(pixels, training=False), input_signature=[pixels])


def _read(path: str, size: int) -> tuple[np.ndarray, str] | DataError:
    """An image of (size, size) and the doubt about it; or the error."""
    try:
        image, colour = read_picture(path)
        return resize_area(image, size), frontal_doubt(image, colour=colour)
    except DataError as error:
        return error
    except Exception as error:  # whatever a damaged file brings about is an error of this file
        return DataError(f"{path} cannot be read: {one_line(error)}")


def newest_weights(runs_dir: str | Path) -> Path:
    """The `model.keras` that was written last under `runs_dir`.

    Raises
    ------
    WeightsError
        No run has trained a model yet.
    """
    found = sorted(Path(runs_dir).glob("*/*/model.keras"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise WeightsError(
            f"no run in {runs_dir} has a model.keras. Train one with `make run`, or name a file with "
            "--weights FILE."
        )
    return found[-1].resolve()
