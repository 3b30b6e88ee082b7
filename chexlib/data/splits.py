"""Which radiograph trains, validates or tests: splits by patient, and the audit that finds a leak.

A patient's radiographs (up to 184) resemble each other, so a network recognises in the test part
whom it saw in training. The official split and ours keep a patient in one part; `audit` checks any
split.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.data.nih import NEXT_STEP, Radiographs, base_name, first_few, rows_of
from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS

PARTS = ("train", "validation", "test")
# Of images, as for CheXNet (Rajpurkar et al. 2017) and Wang et al. 2017.
FRACTIONS = (0.7, 0.1, 0.2)
LISTS = ("train_val_list.txt", "test_list.txt")  # the release has no validation part
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """`parts` has the image names of "train", "validation", "test"; `name` and `seed` tell how
    chosen.
    """

    name: str
    seed: int | None
    parts: dict[str, tuple[str, ...]]

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that change when an image changes its part; order does not matter."""
        return digest_of(self.parts)

    def images(self, part: str) -> tuple[str, ...]:
        """Image names of one part."""
        if part not in self.parts:
            raise ConfigError(
                f"The split has no part {part!r}. Use one of {', '.join(self.parts)}."
            )
        return self.parts[part]

    def _repr_html_(self) -> str:
        counts = pd.DataFrame({"images": {part: len(names) for part, names in self.parts.items()}})
        counts["share"] = counts["images"] / counts["images"].sum()
        rows = counts.to_html(border=0, float_format="{:.1%}".format)
        return f"<p><b>{html.escape(self.name)} split</b>, seed {self.seed}, digest {self.digest}</p>{rows}"


@dataclass(frozen=True, eq=False)
class Audit:
    """What `audit` found.

    Attributes
    ----------
    images, patients : dict, part to count
        Of the images that the label file has, as all that follows.
    unknown : dict, part to count
        Images of the part that the label file does not have, for instance as it is a subset's.
    shared : DataFrame
        One row per pair of parts: part_a, part_b, patients (in both), images_a, images_b (of those
        patients).
    duplicates : tuple of image names that are listed more than once
    prevalence, positives : DataFrame
        Index FINDINGS, one column per part: fraction and count of images with the finding.
    digest : str, as `Split.digest`
    """

    images: dict[str, int]
    patients: dict[str, int]
    unknown: dict[str, int]
    shared: pd.DataFrame
    duplicates: tuple[str, ...]
    prevalence: pd.DataFrame
    positives: pd.DataFrame
    digest: str

    @property
    def leaks(self) -> bool:
        """Whether two parts share a patient, or an image is listed twice."""
        return bool(self.shared["patients"].any() or self.duplicates)

    def __str__(self) -> str:
        found = [
            f"{a} and {b} share {n:,} patient{'s'[: n != 1]} ({n_a:,} of {self.images[a]:,} images "
            f"in {a}, {n_b:,} of {self.images[b]:,} in {b})"
            for a, b, n, n_a, n_b in self.shared[self.shared["patients"] > 0].itertuples(
                index=False
            )
        ]
        if self.duplicates:
            found.append(
                f"{len(self.duplicates):,} images are listed repeatedly: "
                f"{first_few(self.duplicates)}"
            )
        found = found or ["no patient is in two parts, no image is listed twice"]
        unknown = [f"{n:,} in {part}" for part, n in self.unknown.items() if n]
        if unknown:
            found.append(f"not checked, as the label file does not have them: {', '.join(unknown)}")
        return "; ".join(found)

    def _repr_html_(self) -> str:
        verdict = f"<p><b>{'LEAK' if self.leaks else 'No leak'}</b>: {html.escape(str(self))}</p>"
        sizes = pd.DataFrame({"images": self.images, "patients": self.patients}).to_html(border=0)
        return verdict + sizes + self.prevalence.to_html(border=0, float_format="{:.2%}".format)


OFFICIAL_VALIDATION = 0.125  # share of the official training list, of patients


def official_split(radiographs: Radiographs, *, seed: int = 0) -> Split:
    """The release's split: test_list.txt tests; train_val_list.txt is cut by patient, stratified.

    Only present images are kept. DataError for a missing list, one of which no name is in the label
    file, an image in both, or an empty part.
    """
    training, testing = (read_list(radiographs.root / name, radiographs) for name in LISTS)
    if both := sorted(set(training) & set(testing)):
        raise DataError(
            f"{' and '.join(LISTS)} share images: {first_few(both)}. Use the release's lists."
        )
    table = radiographs.table
    test, rest = rows_of(testing, table)["image"], rows_of(training, table)
    if unlisted := len(table) - len(test) - len(rest):
        _log.warning("%d present images are in neither official list: left out", unlisted)
    part = stratify_patients(rest, (1 - OFFICIAL_VALIDATION, OFFICIAL_VALIDATION), seed)
    parts = dict(
        zip(PARTS, (*(tuple(rest["image"][part == i]) for i in range(2)), tuple(test)), strict=True)
    )
    if empty := [name for name in PARTS if not parts[name]]:
        none = f"the {len(table):,} images present in {radiographs.root}, none is in {' and '.join(empty)}"
        raise DataError(
            f"Official split: of {none}. Use `patient_split(radiographs)`, or download more."
        )
    return Split("official", seed, parts)


def patient_split(
    radiographs: Radiographs, *, fractions: Sequence = FRACTIONS, seed: int = 0
) -> Split:
    """Split by patient, each part with its fraction of the images and of every finding's positives.

    `fractions` of train, validation, test: positive, summing to 1. DataError with fewer than 3
    patients.
    """
    _check(radiographs, fractions, radiographs.table["patient"].nunique(), "patients")
    part, names = stratify_patients(radiographs.table, fractions, seed), radiographs.table["image"]
    return Split("patient", seed, {name: tuple(names[part == i]) for i, name in enumerate(PARTS)})


def image_split(
    radiographs: Radiographs, *, fractions: Sequence = FRACTIONS, seed: int = 0
) -> Split:
    """Split by image, which leaks patients: to show what `audit` catches, not to train on."""
    n, names = len(radiographs), radiographs.table["image"]
    _check(radiographs, fractions, n, "images")
    first, second = np.clip(
        np.rint(np.cumsum(fractions[:2]) * n).astype(int), (1, 2), (n - 2, n - 1)
    )
    cut = np.split(np.random.default_rng(seed).permutation(n), [first, max(first + 1, second)])
    parts = {name: tuple(names.iloc[np.sort(rows)]) for name, rows in zip(PARTS, cut, strict=True)}
    return Split("image", seed, parts)


def make_split(radiographs: Radiographs, *, kind: str = "auto", seed: int = 0) -> Split:
    """A split by its kind: "official", "patient", "image" or "auto".

    "auto" is official if no part is then empty and at least 2 findings of the test part have both
    positives and negatives; else patient. Where there are lists that are not used, that is told as
    a warning; lists of which no name is in the label file are an error.
    """
    makers = {"official": official_split, "patient": patient_split, "image": image_split}
    if kind in makers:
        return makers[kind](radiographs, seed=seed)
    if kind != "auto":
        raise ConfigError(
            f"There is no split of kind {kind!r}. Use one of auto, {', '.join(makers)}."
        )
    files = [radiographs.root / name for name in LISTS if (radiographs.root / name).is_file()]
    listed = [read_list(file, radiographs) for file in files]
    try:
        split = official_split(radiographs, seed=seed)
        share = radiographs.select(split.images("test")).labels.mean(axis=0)
        if ((share > 0) & (share < 1)).sum() >= 2:
            return split
        reason = "fewer than 2 findings have both positives and negatives in its test part"
    except DataError as error:
        reason = str(error)
    level = logging.WARNING if any(listed) else logging.INFO
    _log.log(level, "splitting by patient, not officially: %s", reason)
    return patient_split(radiographs, seed=seed)


def audit(
    parts: Split | Mapping[str, Iterable[str]], radiographs: Radiographs, *, allow_leak=False
) -> Audit:
    """Count the patients that are in two parts, by the label file; images need not be present.

    Names that the label file does not have are counted: the lists of the release are longer than a
    subset's labels.

    Raises
    ------
    DataError
        A leak, with its numbers (`allow_leak` logs it instead); a part that is empty, or of which
        no name is known.
    """
    given = parts.parts if isinstance(parts, Split) else parts
    parts = {name: tuple(images) for name, images in given.items()}
    if not parts or not all(parts.values()):
        raise DataError(
            f"No part may be empty: { {p: len(i) for p, i in parts.items()} }. Add image names."
        )
    by_name = radiographs.listed.set_index("image")
    every = pd.Series([image for images in parts.values() for image in images], dtype=object)
    rows, unknown, pairs = {}, {}, []
    for name, images in parts.items():
        place = by_name.index.get_indexer(pd.Index(images, dtype=object))
        _refuse_strangers(images, place, name, radiographs)
        rows[name], unknown[name] = by_name.iloc[place[place >= 0]], int((place < 0).sum())
    if any(unknown.values()):
        counted = ", ".join(
            f"{n:,} of {len(parts[name]):,} in {name}" for name, n in unknown.items() if n
        )
        _log.warning(
            "not checked, as the label file of %s does not have them: %s", radiographs.root, counted
        )
    patients = {name: part["patient"] for name, part in rows.items()}
    for a, b in itertools.combinations(parts, 2):
        both = set(patients[a]) & set(patients[b])
        touched = (int(patients[part].isin(both).sum()) for part in (a, b))
        pairs.append((a, b, len(both), *touched))
    result = Audit(
        images={name: len(part) for name, part in rows.items()},
        patients={name: ids.nunique() for name, ids in patients.items()},
        unknown=unknown,
        shared=pd.DataFrame(
            pairs, columns=["part_a", "part_b", "patients", "images_a", "images_b"]
        ),
        duplicates=tuple(sorted(every[every.duplicated()].unique())),
        prevalence=pd.DataFrame({name: part[list(FINDINGS)].mean() for name, part in rows.items()}),
        positives=pd.DataFrame({name: part[list(FINDINGS)].sum() for name, part in rows.items()}),
        digest=digest_of(parts),
    )
    if result.leaks and not allow_leak:
        step = "Split by patient (`patient_split(radiographs)`), or go on all the same with `allow_leak=True`"
        raise DataError(f"The split leaks: {result}. Scores on it would be too good. {step}.")
    if result.leaks:
        _log.warning("going on with a split that leaks: %s", result)
    return result


def read_list(path: str | Path, radiographs: Radiographs | None = None) -> tuple[str, ...]:
    """Image names of a text file, one a line; blank lines are ignored.

    A folder before a name is left out, and what follows it: many lists have the 14 labels there.

    Raises
    ------
    DataError
        The file cannot be read; or it has names, and `radiographs` lists none of them. Some that
        they do not list are no error: the official lists are longer than a subset's labels.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The image list {path} cannot be read: {error}. Name a text file with one image name "
            "a line."
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    if radiographs is None:
        return tuple(_name_in(line) for line in lines)
    known = pd.Index(radiographs.listed["image"])
    names = tuple(line if line in known else _name_in(line) for line in lines)
    if names:
        _refuse_strangers(
            names, known.get_indexer(pd.Index(names, dtype=object)), path, radiographs
        )
    return names


def _name_in(line: str) -> str:
    """The image name in a line of a list, such as `images/00000001_000.png 0 1 0`."""
    picture = re.match(
        r"""["']?(.*?\.(?:png|jpe?g|dcm|dicom))(?=["'\s,;]|$)""", line, re.IGNORECASE
    )
    if picture:
        return base_name(picture[1])
    first = re.split(r"[,;\t]", line)[0]
    return base_name(re.sub(r"(\s+[-+]?\d+(\.\d*)?)+\s*$", "", first).strip("\"'"))


def _refuse_strangers(
    names: Sequence[str], place: np.ndarray, where, radiographs: Radiographs
) -> None:
    """DataError if none of the names has a place in the label file."""
    if not (place >= 0).any():
        raise DataError(
            f"{where}: none of its {len(names):,} images is in the label file of "
            f"{radiographs.root}: {first_few(names)}. Names such as "
            f"{radiographs.listed['image'].iloc[0]!r} are expected. Put them right, or remove the "
            "list."
        )


def stratify_patients(table: pd.DataFrame, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Part, (rows,) int, of every row, by iterative stratification (Sechidis et al. 2011, algorithm
    1) of patients.

    A patient counts with the images per finding and in all. The finding with the fewest images left
    goes first; each of its patients, in random order, goes to the part that lacks most of it, then
    most images.
    """
    row, ids = pd.factorize(table["patient"])  # in the table's order, that of the image names
    counts = np.zeros((len(ids), len(FINDINGS) + 1))
    np.add.at(counts, row, np.column_stack([table[list(FINDINGS)], np.ones(len(table))]))
    lack = np.outer(fractions, counts.sum(axis=0))
    part, free = np.full(len(ids), -1), np.random.default_rng(seed).permutation(len(ids))
    while len(free):
        left = counts[free, :-1].sum(axis=0)
        label = np.argmin(np.where(left > 0, left, np.inf)) if left.any() else -1
        for patient in free[counts[free, label] > 0]:
            part[patient] = np.lexsort((lack[:, -1], lack[:, label]))[-1]
            lack[part[patient]] -= counts[patient]
        free = free[part[free] < 0]
    for empty in (
        sorted(set(range(len(fractions))) - set(part)) if len(ids) >= len(fractions) else ()
    ):
        crowded = np.flatnonzero(part == np.bincount(part).argmax())
        part[crowded[counts[crowded, -1].argmin()]] = empty
    return part[row]


def _check(radiographs: Radiographs, fractions: Sequence[float], n: int, unit: str) -> None:
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"fractions={fractions} are not three positive numbers with sum 1, like {FRACTIONS}."
        )
    if n < 3:
        raise DataError(f"A split needs at least 3 {unit}; {radiographs.root} has {n}. {NEXT_STEP}")


def digest_of(parts: Mapping[str, Iterable[str]]) -> str:
    text = json.dumps({name: sorted(images) for name, images in parts.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Of what a fold leaves: enough to see a training go wrong, too little to choose by.
VALIDATION = 1 / 16


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
        raise ConfigError(
            f"split={kind!r} is no fold. Write for instance fold-1-of-5, which are counted from 1."
        )
    return fold, folds


def fold_kind(fold: int, folds: int) -> str:
    """ "fold-2-of-5": what `fold_of` reads."""
    return f"fold-{fold}-of-{folds}"


def fold_split(radiographs: Radiographs, *, kind: str, seed: int = 0) -> Split:
    """The split of one fold of a cross-validation by patient, stratified by finding.

    Parameters
    ----------
    kind : str
        Such as "fold-2-of-5": its test part is the second of five that together are all images,
        each once.
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
        raise DataError(
            f"{folds} folds need {folds + 1} patients or more; {radiographs.root} has fewer. Use "
            "fewer."
        )
    tested = stratify_patients(table, np.full(folds, 1 / folds), seed) == fold - 1
    rest = table[~tested]
    checked = stratify_patients(rest, (1 - VALIDATION, VALIDATION), seed) == 1
    images = rest["image"][~checked], rest["image"][checked], table["image"][tested]
    return Split(
        kind, seed, {part: tuple(names) for part, names in zip(PARTS, images, strict=True)}
    )
