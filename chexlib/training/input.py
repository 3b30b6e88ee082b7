"""Input data of a training run: its training images, or the phantom stream, and the head's start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.collectives import World
from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs, check_images, load_radiographs
from chexlib.data.pipeline import generator_for, training_batches
from chexlib.data.splits import Split, audit, make_split
from chexlib.data.stream import stream_batches
from chexlib.errors import DataError
from chexlib.files import read_json
from chexlib.findings import FINDINGS
from chexlib.models.arrays import HEAD
from chexlib.training.callbacks import Position
from chexlib.training.config import TrainConfig


class Feed:
    """This rank's batches of a training, from wherever it stands.

    Parameters
    ----------
    train : Radiographs
        Its training part; under `stream_images` a phantom's, like which the stream draws.
    labels : (n, 14) float32
    """

    def __init__(self, config: TrainConfig, world: World, train: Radiographs, labels: np.ndarray):
        self.config, self.labels = config, labels
        self.world = world
        self.drawing = drawing_of(train.root) if config.stream_images else {}
        self.store = None
        if not config.stream_images or config.recalibrate:
            self.store = ImageStore(
                train.table["path"], size=config.size, gather=world.allgather_object
            )

    def batches(self, at: Position, *, when: np.ndarray | None):
        """Endless tf.data from a position on; `when` as for `training_batches`."""
        config = self.config
        common = {"global_batch": at.global_batch, "seed": config.seed}
        common |= {"rank": self.world.rank, "ranks": self.world.ranks}
        if config.stream_images:
            place = {"size": config.size, "first_image": at.drawn, "mirror": config.mirror}
            return stream_batches(**place, **common, **self.drawing)
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


def drawing_of(folder: Path) -> dict:
    """How a phantom in `folder` was drawn, as `stream_batches` takes it.

    Raises
    ------
    DataError
        It is no phantom, or one with a difficulty of its own.
    """
    try:
        drawn = read_json(folder / "phantom.json")["parameters"]
        chosen = {name: drawn[name] for name in ("difficulty", "min_prevalence")}
    except (DataError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no phantom, like which a stream could be drawn. Make one: `python -m "
            "chexlib phantom DIR`."
        ) from error
    return chosen


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
