"""Input data of a training run: its training images, and the head's start."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from chexlib.collectives import World
from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs, check_images, load_radiographs
from chexlib.data.pipeline import generator_for, training_batches
from chexlib.data.splits import Split, audit, make_split
from chexlib.findings import FINDINGS
from chexlib.models.arrays import HEAD
from chexlib.training.callbacks import Position
from chexlib.training.config import TrainConfig


class Feed:
    """This rank's batches of a training part, with labels (n, 14) float32, from wherever it stands."""

    def __init__(self, config: TrainConfig, world: World, train: Radiographs, labels: np.ndarray):
        self.config, self.labels, self.world = config, labels, world
        paths = train.table["path"]
        self.store = ImageStore(paths, size=config.size, gather=world.allgather_object)

    def batches(self, at: Position, *, when: np.ndarray | None):
        """Endless tf.data from a position on; `when` as for `training_batches`."""
        config = self.config
        common = {"global_batch": at.global_batch, "seed": config.seed}
        common |= {"rank": self.world.rank, "ranks": self.world.ranks}
        place = {
            "first_epoch": at.epoch,
            "first_image": at.image,
            "images": at.images,
            "when": when,
        }
        how = {
            "accumulation": config.accumulation,
            "mirror": config.mirror,
            "augment": config.augment,
        }
        return training_batches(self.store, self.labels, **common, **place, **how)

    def first(self, images: int) -> Iterator[np.ndarray]:
        """So many images of the training part, or all there are, as (batch, size, size, 1) float32
        of this rank.

        Drawn at random, and not those that epoch 0 begins with.
        """
        generator = generator_for("recalibration", seed=self.config.seed)
        chosen = generator.permutation(len(self.store))[:images]
        for places in self.world.batches(len(chosen), batch=self.config.batch_size):
            yield self.store.take(chosen[places])[..., None].astype(np.float32)


def start_head(model, labels: np.ndarray, *, bias: float | None = None) -> None:
    """Biases of 14 fresh sigmoids at `bias`; of None at the log-odds of each finding (Lin et al.
    2017, section 4.1), one pseudo-count each.

    A head whose biases are all 0 is fresh; one that was loaded stays as it is.
    """
    positives = labels.sum(0) + 1
    kernel, biases = model.get_layer(HEAD).get_weights()
    if not biases.any():
        odds = np.log(positives / (len(labels) + 2 - positives))
        biases = odds if bias is None else np.full(len(odds), bias, np.float32)
        model.get_layer(HEAD).set_weights([kernel, biases])


def divide(config: TrainConfig) -> tuple[Split, dict[str, Radiographs]]:
    """The audited split that a config asks for, and the radiographs of each of its parts."""
    seed = config.seed if config.split_seed is None else config.split_seed
    radiographs = load_radiographs(config.data_dir, max_images=config.max_images, seed=seed)
    if config.skip_broken:
        radiographs = check_images(radiographs, skip_broken=True)
    split = make_split(radiographs, kind=config.split, seed=seed)
    audit(split, radiographs, allow_leak=config.allow_leak)
    parts = {part: radiographs.select(split.images(part)) for part in split.parts}
    if 0 < config.train_images < len(parts["train"]):
        names = parts["train"].table["image"].to_numpy()
        drawn = generator_for("train images", seed=seed).permutation(names)
        parts["train"] = radiographs.select(drawn[: config.train_images])
    return split, parts


def predictions_of(radiographs: Radiographs, scores: np.ndarray, part: str) -> pd.DataFrame:
    """One row per image: image, patient, part, the 14 labels as `label_*` and the 14 probabilities
    as `score_*`.
    """
    table = radiographs.table
    frame = table[["image", "patient"]].assign(part=part)
    frame[[f"label_{f}" for f in FINDINGS]] = table[list(FINDINGS)].to_numpy()
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame
