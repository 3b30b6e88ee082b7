"""Models kept along a training, each of which knows where it was taken: where fine-tuning can start."""

from __future__ import annotations

from pathlib import Path

import keras
import pandas as pd

from chexlib.errors import WeightsError
from chexlib.models.topologies import NORMALIZATION
from chexlib.models.weights import read_card, save_model
from chexlib.training.config import TrainConfig
from chexlib.training.monitor import Position

FACTS = ("step", "images", "learning_rate", "global_batch", "epoch", "epochs", "optimizer")


class Snapshots(keras.callbacks.Callback):
    """At each epoch's end, after its checkpoint, writes `run_dir/snapshots/step-<step>.keras`.

    Its card's `snapshot` has step, images (seen until then), learning_rate (of the last update), global_batch, epoch,
    epochs, optimizer, val_loss and val_auroc.
    """

    def __init__(self, config: TrainConfig, at: Position):
        super().__init__()
        self.config, self.at = config, at

    def on_epoch_end(self, epoch, logs):
        if self.at.epoch == epoch:
            return  # stopped within the epoch
        config, at = self.config, self.at
        images = at.drawn if config.stream_images else at.epoch * at.images
        rate = float(logs["learning_rate"])
        values = (at.step, images, rate, at.global_batch, at.epoch, config.epochs)
        facts = dict(zip(FACTS, (*values, config.optimizer), strict=True))
        facts |= {name: float(logs[name]) for name in ("val_loss", "val_auroc")}
        card = {**config.network(), "normalization": NORMALIZATION[config.topology]}
        folder = Path(config.run_dir) / "snapshots"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{at.step:09d}.keras"
            save_model(self.model.model, path, card={**card, "config": config.to_dict(), "snapshot": facts})
        except OSError as error:
            raise WeightsError(
                f"the snapshot of step {at.step} could not be written to {folder} ({error.strerror or error}). Make "
                "room, and run again with resume=true."
            ) from error


def snapshots_of(run: str | Path) -> pd.DataFrame:
    """The snapshots of a run, in the order in which they were taken: path, and what the card of each says.

    Raises
    ------
    WeightsError
        There is none.
    """
    files = sorted(Path(run).glob("snapshots/step-*.keras"))
    if not files:
        raise WeightsError(f"{run} has no snapshots. Train with snapshots=true, or use `pretrain`.")
    return pd.DataFrame([{"path": str(path), **read_card(path).get("snapshot", {})} for path in files])
