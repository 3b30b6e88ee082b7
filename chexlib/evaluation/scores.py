"""Scores from any CSV or Parquet file, ours or other people's, judged against the labels of a data
folder.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chexlib.data.nih import Radiographs, base_name, first_few, load_radiographs
from chexlib.data.splits import LISTS, Split, read_list
from chexlib.errors import DataError, first_line, one_line
from chexlib.evaluation.auroc import compare, judge
from chexlib.files import read_json, require_file
from chexlib.findings import ALIASES, FINDINGS

IMAGE_COLUMNS = ("image", "Image Index", "path", "filename")
TRUTH = "label_"  # prefix of the labels in our own predictions.parquet, which are not scores
# Of positives and of negatives: scores of two values that agree so well are labels.
MOST_ALIKE = 0.95
FEWEST_ALIKE = 10  # positives and negatives from which one such finding is enough to refuse a file
# Of a Parquet file: a hundred times the rows of the release, with a hundred bytes each.
MAX_ROWS, MAX_BYTES = 10**7, 10**9
_log = logging.getLogger(__name__)


def read_scores(path: str | Path, radiographs: Radiographs, *, part: str = "test") -> pd.DataFrame:
    """Read scores and put the folder's labels beside them; what is left out is told as a warning.

    Parameters
    ----------
    path : path of a CSV or Parquet file
        A row per image: its name, or path, in a column `image`, `Image Index`, `path` or `filename`,
        or else in the first one; and a column per finding, in any order, named as in `FINDINGS`, with
        or without a prefix they share. A CSV may have `;` or tabs between columns, and then decimal
        commas.
    radiographs : Radiographs
        Of which the labels of all listed images are used, be the images there or not. Rows of
        images that it does not list, or without a name, are left out.
    part : str
        If the file has a column `part`, only its rows of this part are read.

    Returns
    -------
    DataFrame
        As `predictions.parquet`: image, patient, part, label_*, score_*; the labels are the
        folder's.

    Raises
    ------
    DataError
        No such file; no column of a finding, or two; images that occur twice; not one that the
        folder lists; scores that are no numbers, or that are the labels.
    """
    return _matched(Path(path), radiographs, part)[0]


def _matched(path: Path, radiographs: Radiographs, part: str) -> tuple[pd.DataFrame, dict]:
    """As `read_scores`, and what was left out: number and first names of images, and columns."""
    table = _read(path)
    if "part" in table:
        parts = first_few(table["part"].unique())
        table = table[table["part"] == part]
        if table.empty:
            raise DataError(f"{path} has no rows of part {part!r}. Name one of its parts: {parts}.")
    column = next((name for name in IMAGE_COLUMNS if name in table), table.columns[0])
    images = table[column].map(lambda name: "" if pd.isna(name) else base_name(str(name)))
    index = pd.Index(images, dtype=object)
    rows = pd.Index(radiographs.listed["image"]).get_indexer(index)
    listed = rows >= 0
    if not listed.any():
        raise DataError(
            f"{path}: none of {len(images):,} images is in the label file of {radiographs.root}: "
            f"{first_few(images.tolist())}. Write names such as "
            f"{radiographs.listed['image'].iloc[0]!r} into column {column!r}."
        )
    if len(twice := index[listed & index.duplicated()].unique()):
        raise DataError(
            f"{path}: {len(twice)} images occur twice: {first_few(twice)}. Keep one row per image."
        )
    truth = radiographs.listed.iloc[rows[listed]].reset_index(drop=True)
    labels = truth[list(FINDINGS)].to_numpy()
    others = [str(name) for name in table if name not in (column, "part")]
    columns, unused = _columns_of_findings(path, others)
    scores = table.loc[listed, columns].apply(_numbers).to_numpy(float)
    if missing := int(np.isnan(scores).sum()):
        raise DataError(
            f"{path}: {missing:,} scores are missing, or are not numbers. Give every image all 14 "
            "scores."
        )
    also = ""
    if unused:
        also = f" These columns look like findings and are not used: {first_few(unused, 14)}."
    if copied := [columns[k] for k in _labels_among(scores, labels)]:
        raise DataError(
            f"{path}: the columns {first_few(copied, 3)} are the labels, not "
            f"scores.{also} Name the columns of scores as the findings, with a prefix or without, "
            "and leave the labels out."
        )
    if also:
        _log.warning("%s:%s", path, also)
    unlisted = images[~listed].tolist()
    if unlisted:
        _log.warning(
            "%s: %s of %s rows are left out, as the label file of %s does not have their images: %s",
            path,
            f"{len(unlisted):,}",
            f"{len(listed):,}",
            radiographs.root,
            first_few([name or "(no name)" for name in unlisted]),
        )
    frame = truth[["image", "patient"]].assign(part=part)
    frame[[f"label_{f}" for f in FINDINGS]] = labels
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame, {"images": len(unlisted), "first": unlisted[:5], "columns": unused}


def _labels_among(scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """Findings whose scores are the labels, in whatever two numbers they are written.

    None if they are too few to be sure: fewer than `FEWEST_ALIKE` positives or negatives, and no
    more than half of the findings. A model that decides, with few images, may be right on all of a
    finding.
    """
    copied, sure, with_both = [], False, 0
    for k, has in enumerate(labels.T == 1):
        positives, negatives = has.sum(), (~has).sum()
        if not positives or not negatives:
            continue
        with_both += 1
        values = np.unique(scores[:, k])
        if len(values) != 2:
            continue
        high = scores[:, k] == values[1]
        agreed = high[has].mean(), 1 - high[~has].mean()
        if min(agreed) >= MOST_ALIKE or max(agreed) <= 1 - MOST_ALIKE:
            copied.append(k)
            sure |= min(positives, negatives) >= FEWEST_ALIKE
    return copied if sure or 2 * len(copied) > with_both else []


def where_from(predictions: pd.DataFrame, radiographs: Radiographs) -> dict:
    """Which images were judged, for the line above any AUROC: name of the list, its digest, images,
    patients.

    The name says whether the images are those of the official test list, and how many of them are
    in the official training list, which most models have seen.
    """
    images, files = tuple(predictions["image"]), [radiographs.root / name for name in LISTS]
    name = "images of the file"
    if all(file.is_file() for file in files):
        training, testing = (set(read_list(file)) for file in files)
        if not (training | testing).intersection(radiographs.listed["image"]):
            # Raises; one list alone may be of images whose labels are not here.
            read_list(files[0], radiographs)
        seen, tested = len(training.intersection(images)), len(testing.intersection(images))
        name = f"{tested:,} of the {len(testing):,} images of the official test list"
        name += f", and {seen:,} of the official TRAINING list" if seen else ""
    digest = Split("file", None, {"test": images}).digest
    return {
        "name": name,
        "digest": digest,
        "images": len(images),
        "patients": predictions["patient"].nunique(),
    }


def evaluate(path: str | Path, data_dir: str | Path, *, against: str | Path = "", part="test"):
    """Judge a file of scores, alone or beside another one of the same images.

    Returns
    -------
    dict
        split (as `where_from` says), left_out (the number of `images` in the file that have no
        labels, the `first` of their names, and `columns` that look like findings and were not
        used), auroc (the table of `judge`) and, with `against`, difference (that of `compare`).
    """
    radiographs = load_radiographs(data_dir, require_images=False)
    scores, left_out = _matched(Path(path), radiographs, part)
    judged = {"split": where_from(scores, radiographs), "left_out": left_out}
    judged["auroc"] = judge(scores, part=part)
    if against:
        others = read_scores(against, radiographs, part=part)
        judged["difference"] = compare(scores, others, part=part)
    return judged


def read_predictions(path: str | Path) -> pd.DataFrame:
    """The `predictions.parquet` of a training: image, patient, part, label_* and score_*.

    Raises
    ------
    DataError
        It cannot be read, or is another table.
    """
    try:
        require_file(path)
        table = pd.read_parquet(path)
        of_findings = [f"{kind}_{finding}" for kind in ("label", "score") for finding in FINDINGS]
        if lacking := [c for c in ("image", "patient", "part", *of_findings) if c not in table]:
            raise ValueError(f"it has no column {first_few(lacking)}")
        table[of_findings].astype(float)
    except Exception as error:  # a damaged file makes Arrow raise nearly anything
        raise DataError(
            f"{path} cannot be read ({first_line(error)}). Name the folder of a run."
        ) from error
    return table


def judged_in(run: str | Path | None, data: str) -> dict[str, dict]:
    """What notebooks of a run have trained on this data and split alike: name to folder, split,
    config, predictions.

    `data` is the name that `data_name` gives. Of those with different splits the first and its like
    are taken.
    """
    judged = {}
    for folder in sorted(Path(run).iterdir()) if run else ():
        files = [folder / name for name in ("metrics.json", "config.json", "predictions.parquet")]
        if not all(os.path.isfile(file) for file in files):  # False where one may not look
            continue
        try:
            metrics, config = read_json(files[0]), read_json(files[1])
            split = metrics["split"]
            first = next(iter(judged.values()), {"split": split})
            if metrics["data"] != data or split["digest"] != first["split"]["digest"]:
                continue
            predictions = read_predictions(files[2])
        except (DataError, KeyError, TypeError) as error:
            _log.warning("%s is left out: %s", folder, one_line(error))
            continue
        judged[folder.name] = {
            "folder": folder,
            "split": split,
            "config": config,
            "predictions": predictions,
        }
    return judged


def _read(path: Path) -> pd.DataFrame:
    """The table of a file; of a CSV all as text, since names of images may be digits alone."""
    if path.is_dir() or not path.exists():
        fault = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise DataError(
            f"{fault}. Name a CSV or Parquet file of scores, such as the predictions.parquet of a "
            "run."
        )
    try:
        require_file(path)
        table = _read_parquet(path) if path.suffix in (".parquet", ".pq") else _read_lines(path)
    except Exception as error:  # pandas and Arrow raise many kinds
        raise DataError(
            f"{path} cannot be read: {first_line(error)}. Use a CSV file, or a Parquet file whose name ends in "
            ".parquet."
        ) from error
    names = table.columns.astype(str)
    if names.has_duplicates:
        raise DataError(
            f"{path} has several columns {first_few(names[names.duplicated()])}. Keep one of each."
        )
    table = table.dropna(how="all")
    if table.empty:
        raise DataError(f"{path} has no rows. Write a header, and a row per image.")
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    """ValueError for a file that says that it unpacks to more memory than scores take."""
    metadata = pq.read_metadata(path)
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    if size > MAX_BYTES or metadata.num_rows > MAX_ROWS:
        raise ValueError(f"it has {metadata.num_rows:,} rows, and {size:,} bytes when unpacked")
    # A text that many rows share is stored once, and would be in memory for each of them.
    columns = map(metadata.schema.column, range(metadata.num_columns))
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    stored = pq.read_table(path, columns=texts, read_dictionary=texts)
    for name in stored.column_names:
        for chunk in stored[name].chunks:
            if isinstance(chunk, pa.DictionaryArray):
                longest = max((len(text or "") for text in chunk.dictionary.to_pylist()), default=0)
                if longest * metadata.num_rows > MAX_BYTES:
                    raise ValueError(f"column {name!r} has a text of {longest:,} characters")
    table = pd.read_parquet(path)
    for field in metadata.schema.to_arrow_schema():
        if pa.types.is_nested(field.type) and field.name in table:
            table[field.name] = table[field.name].map(str)  # lists are no names and no scores
    return table


def _read_lines(path: Path) -> pd.DataFrame:
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline()
    separator = max(",;\t", key=first.count)
    lines = pd.read_csv(
        path, sep=separator, header=None, dtype=str, encoding="utf-8-sig", skipinitialspace=True
    )
    header = [f"column {i + 1}" if pd.isna(name) else name for i, name in enumerate(lines.iloc[0])]
    return lines[1:].set_axis(header, axis=1)


def _numbers(column: pd.Series) -> pd.Series:
    """The numbers of a column, NaN for what is none. Decimals may have a comma for their point."""
    if pd.api.types.is_string_dtype(column):
        column = column.str.strip().str.replace(r"^([-+]?\d*),(\d+)$", r"\1.\2", regex=True)
    return pd.to_numeric(column, errors="coerce")


def _columns_of_findings(path: Path, columns: list[str]) -> tuple[list[str], list[str]]:
    """The column of each finding, in our order: all 14 with one prefix, which may be empty.

    And the columns that look like findings and are not used.
    """
    by_prefix: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        name = column.strip()
        for spelling in (*FINDINGS, *ALIASES):
            prefix = name.removesuffix(spelling)
            if name.endswith(spelling) and prefix != TRUTH:
                finding = ALIASES.get(spelling, spelling)
                by_prefix.setdefault(prefix, {}).setdefault(finding, []).append(column)
    if not by_prefix:
        raise DataError(
            f"{path} has no column of a finding (columns: {first_few(columns)}). Name one column "
            f"for each, with or without a common prefix: {', '.join(FINDINGS)}."
        )
    prefix = max(by_prefix, key=lambda prefix: len(by_prefix[prefix]))
    by_finding = by_prefix[prefix]
    whole = [prefix for prefix, named in by_prefix.items() if len(named) == len(FINDINGS)]
    if len(whole) > 1:
        raise DataError(
            f"{path} has several columns per finding, with the prefixes {first_few(whole)}. Keep "
            "one per finding."
        )
    if missing := [prefix + finding for finding in FINDINGS if finding not in by_finding]:
        raise DataError(
            f"{path} has no column {first_few(missing, 14)}. Write one column per finding."
        )
    if twice := [columns for columns in by_finding.values() if len(columns) > 1]:
        raise DataError(
            f"{path} has two columns for one finding: {first_few(twice[0])}. Keep one of them."
        )
    used = [by_finding[finding][0] for finding in FINDINGS]
    labels = [TRUTH + finding for finding in FINDINGS]
    unused = [name for name in columns if name not in used and name not in labels]
    return used, [name for name in unused if _like_a_finding(name)]


def _like_a_finding(column: str) -> bool:
    name, *findings = (_letters(name) for name in (column, *FINDINGS, *ALIASES))
    within = any(finding in name for finding in findings)
    return within or bool(difflib.get_close_matches(name, findings, 1, 0.8))


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())
