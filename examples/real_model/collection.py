"""Several folders of one release as one folder in the NIH layout: every image once, its patients as
they are.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from chexlib.data.nih import (
    BOX_SIDE,
    COLUMNS,
    EDITIONS,
    Radiographs,
    first_few,
    load_radiographs,
    rows_of,
)
from chexlib.data.splits import LISTS, read_list
from chexlib.errors import DataError
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS, NO_FINDING

log = logging.getLogger(__name__)


def collect(folders: Sequence[str | Path], directory: str | Path) -> Path:
    """Make `directory` a folder in the NIH layout of all images of `folders`, by links to them.

    An image that lies in several folders, which the release's name tells, is taken from the first
    of them. Patients have the same number in all folders of the release, so a split by patient
    keeps them apart whatever folder their images are from.

    Parameters
    ----------
    folders : folders in the NIH layout, the one whose pixels and labels count first
    directory : made if missing; its images are replaced

    Returns
    -------
    Path
        `directory`, with a CSV, boxes, lists as far as the folders have them, and `images`.

    Raises
    ------
    DataError
        A folder cannot be read; its labels know no name of one of its lists; or the folders do not
        agree on whose image it is, so that they are of two releases.
    """
    directory, parts = Path(directory).absolute(), [load_radiographs(folder) for folder in folders]
    if not parts:
        raise DataError("there is no folder to collect. Name one or more in the NIH layout.")
    every = pd.concat([part.table for part in parts], ignore_index=True)
    if (strange := every.groupby("image")["patient"].nunique()).gt(1).any():
        names = first_few(strange.index[strange > 1].tolist())
        raise DataError(
            f"{names} are of other patients in another folder. Collect folders of one release only."
        )
    table = every.drop_duplicates("image").sort_values("image", ignore_index=True)
    log.info(
        "%d images of %d folders, %d of them once: %s",
        len(every),
        len(parts),
        len(table),
        directory,
    )
    shutil.rmtree(directory / "images", ignore_errors=True)
    (directory / "images").mkdir(parents=True)
    for name, path in zip(table["image"], table["path"], strict=True):
        os.symlink(path, directory / "images" / name)
    _write(directory / EDITIONS[0], _entries(table))
    chosen = [
        rows_of(set(part.table["image"][part.table["path"].isin(table["path"])]), part.boxes)
        for part in parts
    ]
    boxes = pd.concat(chosen)
    boxes = boxes.assign(**{side: boxes[side] * BOX_SIDE for side in ("x", "y", "width", "height")})
    _write(directory / "BBox_List_2017.csv", boxes)
    for name in LISTS:
        listed = {image for part in parts for image in _listed(part, name)}
        with atomic_write(directory / name) as file:
            file.write(
                "".join(f"{image}\n" for image in table["image"] if image in listed).encode()
            )
    return directory


def _entries(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table as the release's file has them."""
    found = table[list(FINDINGS)].to_numpy(bool)
    labels = [
        "|".join(f for f, there in zip(FINDINGS, row, strict=True) if there) or NO_FINDING
        for row in found
    ]
    return pd.DataFrame(
        {theirs: labels if ours == "labels" else table[ours] for theirs, ours in COLUMNS.items()}
    )


def _listed(part: Radiographs, name: str) -> tuple[str, ...]:
    return read_list(part.root / name, part) if (part.root / name).is_file() else ()


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False)
