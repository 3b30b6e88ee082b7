"""Where a training stands, shown to a person while it runs."""

from __future__ import annotations

import logging
import os

from chexlib.runs import BATCH

log = logging.getLogger(__name__)


class LiveLine:
    """Shows where a training stands: one bar that moves in JupyterLab, one line an epoch when headless.

    Pass it as `report` to `fit` or `Engines.run`.
    """

    def __init__(self):
        self.bar, self.lines = None, 0

    def __call__(self, numbers: dict) -> None:
        if os.environ.get(BATCH):
            for row in numbers["history"][self.lines :]:
                log.info("epoch %d/%d  %s", self.lines + 1, numbers["epochs"], self._words(row))
                self.lines += 1
            return
        from tqdm.auto import tqdm

        if self.bar is None:
            self.bar = tqdm(total=numbers["epochs"] * numbers["steps"], unit="step", desc="training")
        self.bar.n = (numbers["epoch"] - 1) * numbers["steps"] + numbers["step"]
        self.bar.set_postfix_str(self._words({**(numbers["history"] or [{}])[-1], "loss": numbers["loss"]}))
        if self.bar.n >= self.bar.total:
            self.bar.close()

    @staticmethod
    def _words(row: dict) -> str:
        shown = {
            "loss": "loss",
            "val_loss": "val loss",
            "val_auroc": "val AUROC",
            "images_per_second": "images/s",
        }
        return "  ".join(f"{name} {row[key]:.3g}" for key, name in shown.items() if row.get(key) is not None)
