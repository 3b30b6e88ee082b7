"""Train, validation and test splits by patient, and an audit for patients in two parts.

A patient's radiographs (up to 184) resemble each other, so a network recognises in the test part
whom it saw in training. The official split and `patient_split` keep a patient in one part; `audit`
checks any split.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.data.nih import NEXT_STEP, Radiographs, base_name, first_few, rows_of
from chexlib.errors import ConfigError, DataError, first_line
from chexlib.files import read_text
from chexlib.findings import FINDINGS

PARTS = ("train", "validation", "test")
# Of images, as for CheXNet (Rajpurkar et al. 2017) and Wang et al. 2017.
FRACTIONS = (0.7, 0.1, 0.2)
LISTS = ("train_val_list.txt", "test_list.txt")  # the release has no validation part
OFFICIAL_VALIDATION = 0.125  # share of the official training list, of patients
# Of what a fold leaves: enough to see a training go wrong, too little to choose by.
VALIDATION = 1 / 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Image names of "train", "validation" and "test", and how they were chosen."""

    name: str
    seed: int | None
    parts: dict[str, tuple[str, ...]]

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that change when an image changes its part; order does not matter."""
        parts = {name: sorted(images) for name, images in self.parts.items()}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

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
        name = html.escape(self.name)
        return f"<p><b>{name} split</b>, seed {self.seed}, digest {self.digest}</p>{rows}"


@dataclass(frozen=True, eq=False)
class Audit:
    """Counts of images and patients per part, and what two parts share.

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
        statements = []
        leaking = self.shared[self.shared["patients"] > 0]
        for pair in leaking.itertuples():
            a, b = pair.part_a, pair.part_b
            patients = "1 patient" if pair.patients == 1 else f"{pair.patients:,} patients"
            in_a = f"{pair.images_a:,} of {self.images[a]:,} images in {a}"
            in_b = f"{pair.images_b:,} of {self.images[b]:,} in {b}"
            statements.append(f"{a} and {b} share {patients} ({in_a}, {in_b})")
        if self.duplicates:
            named = first_few(self.duplicates)
            statements.append(f"{len(self.duplicates):,} images are listed repeatedly: {named}")
        if not statements:
            statements.append("no patient is in two parts, no image is listed twice")
        if any(self.unknown.values()):
            unknown = [f"{n:,} in {part}" for part, n in self.unknown.items() if n]
            statements.append(
                f"not checked, as the label file does not have them: {', '.join(unknown)}"
            )
        return "; ".join(statements)

    def _repr_html_(self) -> str:
        verdict = "LEAK" if self.leaks else "No leak"
        sizes = pd.DataFrame({"images": self.images, "patients": self.patients}).to_html(border=0)
        prevalence = self.prevalence.to_html(border=0, float_format="{:.2%}".format)
        return f"<p><b>{verdict}</b>: {html.escape(str(self))}</p>{sizes}{prevalence}"


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
        no name is in the label file.
    """
    if not isinstance(parts, Split):
        parts = Split("audited", None, {name: tuple(images) for name, images in parts.items()})
    parts, digest = parts.parts, parts.digest
    if not parts or not all(parts.values()):
        sizes = {name: len(images) for name, images in parts.items()}
        raise DataError(f"A part of the split is empty: {sizes}. Add image names to its list.")
    row_of = {image: row for row, image in enumerate(radiographs.listed["image"].tolist())}
    patients: dict[str, pd.Series] = {}
    unknown: dict[str, int] = {}
    prevalence, positives = pd.DataFrame(), pd.DataFrame()
    for name, images in parts.items():
        rows = radiographs.listed.iloc[[row_of[image] for image in images if image in row_of]]
        if rows.empty:
            raise _none_listed(images, radiographs, name)
        labels = rows[list(FINDINGS)]
        patients[name] = rows["patient"]
        unknown[name] = len(images) - len(rows)
        prevalence[name] = labels.mean()
        positives[name] = labels.sum()
    result = Audit(
        images={name: len(ids) for name, ids in patients.items()},
        patients={name: ids.nunique() for name, ids in patients.items()},
        unknown=unknown,
        shared=_shared_patients(patients),
        duplicates=_duplicates(parts),
        prevalence=prevalence,
        positives=positives,
        digest=digest,
    )
    if any(unknown.values()):
        counts = [f"{n:,} of {len(parts[name]):,} in {name}" for name, n in unknown.items() if n]
        _log.warning(
            "images that the label file of %s does not have are not checked: %s",
            radiographs.root,
            ", ".join(counts),
        )
    if result.leaks and not allow_leak:
        raise DataError(
            f"The split leaks: {result}. Scores on it would be too good. Split by patient (without "
            f"{' and '.join(LISTS)} that is done), or train all the same with allow_leak=True."
        )
    if result.leaks:
        _log.warning("this split leaks: %s", result)
    return result


def _shared_patients(patients: Mapping[str, pd.Series]) -> pd.DataFrame:
    """`Audit.shared`, from the patient of each image of each part."""
    pairs = []
    for a, b in itertools.combinations(patients, 2):
        shared = set(patients[a].tolist()) & set(patients[b].tolist())
        images_a = int(patients[a].isin(shared).sum())
        images_b = int(patients[b].isin(shared).sum())
        pairs.append((a, b, len(shared), images_a, images_b))
    return pd.DataFrame(pairs, columns=["part_a", "part_b", "patients", "images_a", "images_b"])


def _duplicates(parts: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    counts = Counter(itertools.chain(*parts.values()))
    return tuple(sorted(image for image, n in counts.items() if n > 1))


# ---- splits


def official_split(radiographs: Radiographs, *, seed: int = 0) -> Split:
    """The release's split: test_list.txt tests; train_val_list.txt is cut by patient, stratified.

    Only present images are kept. DataError for a missing list, one of which no name is in the label
    file, an image in both, or an empty part.
    """
    lists = [read_list(radiographs.root / name, radiographs) for name in LISTS]
    return _official_split(radiographs, lists, seed)


def _official_split(radiographs: Radiographs, lists: Sequence, seed: int) -> Split:
    training, testing = lists
    if both := sorted(set(training) & set(testing)):
        raise DataError(
            f"{' and '.join(LISTS)} share images: {first_few(both)}. Use the lists of the NIH release."
        )
    table = radiographs.table
    test, rest = rows_of(testing, table), rows_of(training, table)
    if unlisted := len(table) - len(test) - len(rest):
        _log.warning("%d images are left out, as neither official list has them", unlisted)
    part = stratify_patients(rest, (1 - OFFICIAL_VALIDATION, OFFICIAL_VALIDATION), seed)
    parts = {
        "train": tuple(rest["image"][part == 0].tolist()),
        "validation": tuple(rest["image"][part == 1].tolist()),
        "test": tuple(test["image"].tolist()),
    }
    if empty := [name for name in PARTS if not parts[name]]:
        raise DataError(
            f"Of the {len(table):,} images in {radiographs.root}, the official split puts none into "
            f"{' and '.join(empty)}. Split by patient (split='patient'), or download more."
        )
    return Split("official", seed, parts)


def patient_split(radiographs: Radiographs, *, seed: int = 0) -> Split:
    """Split by patient, each part with its fraction of the images and of every finding's positives.

    DataError with fewer than 3 patients.
    """
    table = radiographs.table
    _require_three(table["patient"].nunique(), "patients", radiographs)
    return _assemble("patient", seed, table["image"], stratify_patients(table, FRACTIONS, seed))


def image_split(radiographs: Radiographs, *, seed: int = 0) -> Split:
    """Split by image, which leaks patients: to show what `audit` catches, not to train on."""
    n = len(radiographs)
    _require_three(n, "images", radiographs)
    cuts = np.rint(np.cumsum(FRACTIONS[:2]) * n).astype(int)
    first, second = np.clip(cuts, (1, 2), (n - 2, n - 1))
    order = np.random.default_rng(seed).permutation(n)
    part = np.zeros(n, int)
    part[order[first:]] = PARTS.index("validation")
    part[order[max(first + 1, second) :]] = PARTS.index("test")
    return _assemble("image", seed, radiographs.table["image"], part)


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
    fold, folds = fold_of(kind)
    table = radiographs.table
    if table["patient"].nunique() < folds + 1:
        raise DataError(
            f"{folds} folds need {folds + 1} patients or more; {radiographs.root} has fewer. Use "
            "fewer."
        )
    tested = stratify_patients(table, np.full(folds, 1 / folds), seed) == fold - 1
    part = np.full(len(table), PARTS.index("test"))
    part[~tested] = stratify_patients(table[~tested], (1 - VALIDATION, VALIDATION), seed)
    return _assemble(kind, seed, table["image"], part)


def fold_of(kind: str) -> tuple[int, int] | None:
    """(2, 5) for "fold-2-of-5"; None for what is no fold.

    Raises
    ------
    ConfigError
        A fold that there is not.
    """
    if not kind.startswith("fold"):
        return None
    numbers = re.fullmatch(r"fold-(\d{1,3})-of-(\d{1,3})", kind)
    fold, folds = map(int, numbers.groups()) if numbers else (0, 0)
    if folds < 2 or not 1 <= fold <= folds:
        raise ConfigError(
            f"split={kind!r} is not accepted. Write a fold such as fold-1-of-5; folds count from 1."
        )
    return fold, folds


def make_split(radiographs: Radiographs, *, kind: str = "auto", seed: int = 0) -> Split:
    """A split by its kind: "official", "patient", "image", a fold such as "fold-2-of-5", or "auto".

    "auto" is official if no part is then empty and at least 2 findings of the test part have both
    positives and negatives; else patient. Where there are lists that are not used, a warning says
    so; lists of which no name is in the label file are an error.
    """
    if fold_of(kind):
        return fold_split(radiographs, kind=kind, seed=seed)
    makers = {"official": official_split, "patient": patient_split, "image": image_split}
    if kind in makers:
        return makers[kind](radiographs, seed=seed)
    if kind != "auto":
        raise ConfigError(f"split={kind!r} is not accepted. Use one of auto, {', '.join(makers)}.")
    lists, missing = [], []
    for name in LISTS:
        if (radiographs.root / name).is_file():
            lists.append(read_list(radiographs.root / name, radiographs))
        else:
            missing.append(name)
    try:
        if missing:
            raise DataError(f"{radiographs.root} has no {' and no '.join(missing)}")
        split = _official_split(radiographs, lists, seed)
        share = radiographs.select(split.images("test")).labels.mean(axis=0)
        if ((share > 0) & (share < 1)).sum() >= 2:
            return split
        reason = "fewer than 2 findings have both positives and negatives in its test part"
    except DataError as error:
        reason = str(error)
    level = logging.WARNING if any(lists) else logging.INFO
    _log.log(level, "splitting by patient, not officially: %s", reason)
    return patient_split(radiographs, seed=seed)


def _assemble(name: str, seed: int, images: pd.Series, part: np.ndarray) -> Split:
    """A split from the index into `PARTS`, (images,) int, of every image."""
    return Split(
        name, seed, {key: tuple(images[part == i].tolist()) for i, key in enumerate(PARTS)}
    )


def _require_three(n: int, unit: str, radiographs: Radiographs) -> None:
    if n < len(PARTS):
        raise DataError(f"A split needs at least 3 {unit}; {radiographs.root} has {n}. {NEXT_STEP}")


def stratify_patients(table: pd.DataFrame, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Part, (rows,) int, of every row, by iterative stratification (Sechidis et al. 2011, algorithm
    1) of patients.

    A patient counts with the images per finding and in all. The finding with the fewest images left
    goes first; each of its patients, in random order, goes to the part that lacks most of it, then
    most images.
    """
    row, ids = pd.factorize(table["patient"])  # in the table's order, that of the image names
    images = np.column_stack([table[list(FINDINGS)], np.ones(len(table))])
    counts = np.zeros((len(ids), images.shape[1]))
    np.add.at(counts, row, images)
    lack = np.outer(fractions, counts.sum(axis=0))
    part = np.full(len(ids), -1)
    free = np.random.default_rng(seed).permutation(len(ids))
    while len(free):
        left = counts[free, :-1].sum(axis=0)
        left[left == 0] = np.inf
        rarest = np.argmin(left) if np.isfinite(left).any() else -1
        for patient in free[counts[free, rarest] > 0]:
            part[patient] = np.lexsort((lack[:, -1], lack[:, rarest]))[-1]
            lack[part[patient]] -= counts[patient]
        free = free[part[free] < 0]
    if len(ids) >= len(fractions):
        for empty in sorted(set(range(len(fractions))) - set(part)):
            crowded = np.flatnonzero(part == np.bincount(part).argmax())
            smallest = crowded[counts[crowded, -1].argmin()]
            part[smallest] = empty
    return part[row]


# ---- lists


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
        lines = read_text(path, encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The image list {path} cannot be read ({first_line(error)}). "
            "Name a text file with one image name per line."
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    listed = set() if radiographs is None else set(radiographs.listed["image"].tolist())
    names = tuple(line if line in listed else _name_in(line) for line in lines)
    if names and radiographs is not None and listed.isdisjoint(names):
        raise _none_listed(names, radiographs, path)
    return names


def _name_in(line: str) -> str:
    """The image name in a line of a list, such as `images/00000001_000.png 0 1 0`."""
    pattern = r"""["']?(.*?\.(?:png|jpe?g|dcm|dicom))(?=["'\s,;]|$)"""
    picture = re.match(pattern, line, re.IGNORECASE)
    if picture:
        return base_name(picture[1])
    first = re.split(r"[,;\t]", line)[0]
    without_labels = re.sub(r"(\s+[-+]?\d+(\.\d*)?)+\s*$", "", first)
    return base_name(without_labels.strip("\"'"))


def _none_listed(names: Sequence[str], radiographs: Radiographs, where: object) -> DataError:
    """The error for names of which the label file has none; `where` is the list or part."""
    return DataError(
        f"{where}: none of its {len(names):,} images is in the label file of {radiographs.root}: "
        f"{first_few(names)}. Write names such as {radiographs.listed['image'].iloc[0]!r}, or remove "
        "the list."
    )
