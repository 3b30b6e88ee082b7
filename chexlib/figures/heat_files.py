"""Heat maps as files: what `predict --heatmaps` writes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.data.pictures import read_picture
from chexlib.errors import ConfigError
from chexlib.evaluation.explain import heat_maps
from chexlib.evaluation.operating import read_by_card
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS


class HeatMapFiles:
    """Writes `<image>.png` to a folder, the findings with the highest probabilities; for
    `predict_all(each=...)`.

    Parameters
    ----------
    folder : path
    count : int
        Findings an image.
    card : dict, optional
        Of the weights: where it calibrates a finding, the title has the calibrated probability, and
        says so.

    Raises
    ------
    ConfigError
        Nothing can be written to the folder.
    """

    def __init__(self, folder: str | Path, *, count: int = 3, card: Mapping | None = None):
        self.folder, self.count, self.written = Path(folder), count, []
        self.card = card or {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{folder!s:.300} cannot hold heat maps ({reason}). Name another folder."
            ) from error

    def __call__(self, model, paths: Sequence[str], pixels: np.ndarray, scores: np.ndarray) -> None:
        from chexlib.figures.overlays import heat_figure

        scores = read_by_card(pd.DataFrame(scores, columns=list(FINDINGS)), self.card)[0].to_numpy()
        # Not of every finding, if isotonic.
        curves = (self.card.get("calibration") or {}).get("curves", ())
        named = [
            f"{f.replace('_', ' ')} {{:.2f}}{', calibrated' if f in curves else ''}"
            for f in FINDINGS
        ]
        top = np.argsort(-scores, axis=1, kind="stable")[:, : self.count]
        asked = [FINDINGS[i] for i in top.ravel()]
        maps = heat_maps(model, np.repeat(pixels, top.shape[1], axis=0), asked).reshape(
            *top.shape, *pixels.shape[1:3]
        )
        for path, row, order, heat in zip(paths, scores, top, maps, strict=True):
            titles = [named[i].format(row[i]) for i in order]
            image = read_picture(path)[0]
            name, number = f"{Path(path).stem}.png", 2
            while name in self.written:  # of another folder
                name, number = f"{Path(path).stem}-{number}.png", number + 1
            with atomic_write(self.folder / name) as file:
                heat_figure([image] * len(heat), heat, titles).savefig(file, format="png", dpi=100)
            self.written.append(name)
