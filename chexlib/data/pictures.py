"""Image files of one's own: found by name, folder or pattern, and read whatever their format."""

from __future__ import annotations

import functools
import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from chexlib.data.dicom import is_dicom, read_dicom
from chexlib.data.nih import read_image
from chexlib.errors import DataError

# In folders; a file that is named may have any.
ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


def find_pictures(wanted: Iterable[str | Path]) -> list[str]:
    """Paths of image files: those named, those that a pattern fits, and those below a folder.

    In folders, files count that end as `ENDINGS`, or have no ending and are DICOM; each folder is
    entered once, wherever links lead. What is found twice, however its folder was spelt, comes
    once, as it was spelt first. A name that stands for nothing, and a folder that cannot be listed,
    is returned as it is, and told when it is read.
    """
    found: list[str] = []
    for name in map(str, wanted):
        fits = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        for path in fits or [name]:
            found += _below(path) if os.path.isdir(path) else [path]
    folder_of = functools.cache(os.path.realpath)
    first: dict[tuple[str, str], str] = {}
    for path in found:
        first.setdefault((folder_of(os.path.dirname(path)), os.path.basename(path)), path)
    return list(first.values())


def read_picture(path: str | Path) -> tuple[np.ndarray, float]:
    """Read a PNG, JPEG or DICOM radiograph, told apart by content.

    Returns
    -------
    image : (height, width) uint8
    colour : float
        Mean difference of the strongest and the weakest of red, green and blue, in grey levels; 0
        for grey files.

    Raises
    ------
    DataError
        There is no such file, or it cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            # The reason why it has no images may be that it cannot be listed.
            os.scandir(path).close()
        if not stat.S_ISREG(mode):
            raise DataError(
                f"{path} is no file. Name image files, folders, or patterns such as 'films/*.png'."
            )
        dicom = is_dicom(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Name image files, folders, or "
            "patterns."
        ) from error
    return (read_dicom(path), 0.0) if dicom else (read_image(path), _colour(path))


def _colour(path: str | Path) -> float:
    with Image.open(path) as image:
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            return 0.0
        image.draft("RGB", (128, 128))  # of JPEG, decode no more than is needed
        rgb = np.asarray(image.convert("RGB").resize((64, 64)), np.int16)
    return float(np.ptp(rgb, axis=-1).mean())


def _below(folder: str) -> list[str]:
    """Image files below a folder, by name."""
    found, entered = [], {os.path.realpath(folder)}

    def unlisted(error):
        found.append(error.filename)

    for parent, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        places = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, place in places.items() if place not in entered]
        entered.update(places.values())
        found += [
            os.path.join(parent, name)
            for name in sorted(names)
            if _wanted(os.path.join(parent, name))
        ]
    return found or [folder]


def _wanted(path: str) -> bool:
    ending = os.path.splitext(path)[1].lower()
    if os.path.basename(path).startswith("."):  # such as macOS' ._NAME.png
        return False
    try:
        return ending in ENDINGS or (not ending and os.path.isfile(path) and is_dicom(path))
    except OSError:
        return False
