"""The parts of a training's data, and the table of what a model says of them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from chexlib.data.folds import fold_of, fold_split
from chexlib.data.nih import Radiographs, check_images, load_radiographs
from chexlib.data.splits import Split, audit, make_split
from chexlib.findings import FINDINGS
from chexlib.training.config import TrainConfig


def divide(config: TrainConfig) -> tuple[Split, dict[str, Radiographs]]:
    """The audited split that a config asks for, and the radiographs of each of its parts."""
    seed = config.seed if config.split_seed is None else config.split_seed
    radiographs = load_radiographs(config.data_dir, max_images=config.max_images, seed=seed)
    if config.skip_broken:
        radiographs = check_images(radiographs, skip_broken=True)
    make = fold_split if fold_of(config.split) else make_split
    split = make(radiographs, kind=config.split, seed=seed)
    audit(split, radiographs, allow_leak=config.allow_leak)
    return split, {part: radiographs.select(split.images(part)) for part in split.parts}


def predictions_of(radiographs: Radiographs, scores: np.ndarray, part: str) -> pd.DataFrame:
    """One row an image: image, patient, part, the 14 labels as `label_*` and the 14 probabilities as `score_*`."""
    table = radiographs.table
    frame = table[["image", "patient"]].assign(part=part)
    frame[[f"label_{f}" for f in FINDINGS]] = table[list(FINDINGS)].to_numpy()
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame
