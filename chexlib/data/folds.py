"""Cross-validation over patients: each image is tested once, by a network that has seen none of its patient."""

from __future__ import annotations

import re

import numpy as np

from chexlib.data.nih import Radiographs
from chexlib.data.splits import PARTS, Split, stratify_patients
from chexlib.errors import ConfigError, DataError

VALIDATION = 1 / 16  # of what a fold leaves: enough to see a training go wrong, too little to choose by


def fold_of(kind: str) -> tuple[int, int] | None:
    """(2, 5) for "fold-2-of-5"; None for what is no fold.

    Raises
    ------
    ConfigError
        A fold that there is not.
    """
    if not kind.startswith("fold"):
        return None
    found = re.fullmatch(r"fold-(\d{1,3})-of-(\d{1,3})", kind)
    fold, folds = map(int, found.groups()) if found else (0, 0)
    if not (folds >= 2 and 1 <= fold <= folds):
        raise ConfigError(f"split={kind!r} is no fold. Write for instance fold-1-of-5, which are counted from 1.")
    return fold, folds


def fold_kind(fold: int, folds: int) -> str:
    """ "fold-2-of-5": what `fold_of` reads."""
    return f"fold-{fold}-of-{folds}"


def fold_split(radiographs: Radiographs, *, kind: str, seed: int = 0) -> Split:
    """The split of one fold of a cross-validation by patient, stratified by finding.

    Parameters
    ----------
    kind : str
        Such as "fold-2-of-5": its test part is the second of five that together are all images, each once.
    seed : int
        Of the folds, which are the same for all `kind`s of it.

    Raises
    ------
    ConfigError
        No such fold.
    DataError
        Fewer patients than parts.
    """
    fold, folds = fold_of(kind) or (0, 0)
    table = radiographs.table
    if table["patient"].nunique() < folds + 1:
        raise DataError(f"{folds} folds need {folds + 1} patients or more; {radiographs.root} has fewer. Use fewer.")
    tested = stratify_patients(table, np.full(folds, 1 / folds), seed) == fold - 1
    rest = table[~tested]
    checked = stratify_patients(rest, (1 - VALIDATION, VALIDATION), seed) == 1
    images = rest["image"][~checked], rest["image"][checked], table["image"][tested]
    return Split(kind, seed, {part: tuple(names) for part, names in zip(PARTS, images, strict=True)})
