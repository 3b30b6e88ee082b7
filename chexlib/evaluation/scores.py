"""Scores from any CSV or Parquet file, ours or other people's, judged against the labels of a data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from chexlib.data.nih import Radiographs, first_few, load_radiographs
from chexlib.data.splits import LISTS, Split, read_list
from chexlib.errors import DataError
from chexlib.evaluation.auroc import judge
from chexlib.evaluation.paired import compare
from chexlib.findings import ALIASES, FINDINGS

IMAGE_COLUMNS = ("image", "Image Index", "path", "filename")
TRUTH = "label_"  # prefix of the labels in our own predictions.parquet, which are not scores


def read_scores(path: str | Path, radiographs: Radiographs, *, part: str = "test") -> pd.DataFrame:
    """Read scores and put the folder's labels beside them.

    Parameters
    ----------
    path : path of a CSV or Parquet file
        A row an image: its name, or path, in a column `image`, `Image Index`, `path` or `filename`, or else in the
        first one; and a column a finding, in any order, named as in `FINDINGS`, with or without a prefix they share.
    radiographs : Radiographs
        Of which the labels of all listed images are used, be the images there or not.
    part : str
        If the file has a column `part`, only its rows of this part are read.

    Returns
    -------
    DataFrame
        As `predictions.parquet`: image, patient, part, label_*, score_*; the labels are the folder's.

    Raises
    ------
    DataError
        No such file, no column of a finding or two, images that occur twice or that the folder does not list, scores
        that are no numbers.
    """
    path = Path(path)
    table = _read(path)
    if "part" in table:
        rows = table[table["part"] == part]
        if rows.empty:
            parts = first_few(table["part"].unique())
            raise DataError(f"{path} has no rows of part {part!r} (parts: {parts}). Name one of these.")
        table = rows
    column = next((name for name in IMAGE_COLUMNS if name in table), table.columns[0])
    images = table[column].astype(str).map(lambda name: Path(name.strip()).name).reset_index(drop=True)
    if len(twice := images[images.duplicated()].unique()):
        raise DataError(f"{path}: {len(twice)} images occur twice: {first_few(twice)}. Accepted: one row an image.")
    place = pd.Index(radiographs.listed["image"]).get_indexer(images)
    if (unknown := place < 0).any():
        raise DataError(
            f"{path}: {unknown.sum():,} of {len(images):,} images are not in the label file of {radiographs.root}: "
            f"{first_few(images[unknown].tolist())}. Image names are expected in column {column!r}."
        )
    listed = radiographs.listed.iloc[place].reset_index(drop=True)
    frame = listed[["image", "patient"]].assign(part=part)
    frame[[f"label_{f}" for f in FINDINGS]] = listed[list(FINDINGS)].to_numpy()
    columns = _columns_of_findings(path, [str(name) for name in table.columns if name not in (column, "part")])
    scores = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    if missing := int((scores != scores).sum()):
        raise DataError(f"{path}: {missing:,} scores are missing or no numbers. Give every image all 14 scores.")
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame


def where_from(predictions: pd.DataFrame, radiographs: Radiographs) -> dict:
    """Which images were judged, for the line above any AUROC: name of the list, its digest, images, patients.

    The name says whether the images are those of the official test list, and how many of them are in the official
    training list, which most models have seen.
    """
    images, files = tuple(predictions["image"]), [radiographs.root / name for name in LISTS]
    name = "images of the file"
    if all(file.is_file() for file in files):
        training, testing = (set(read_list(file)) for file in files)
        seen, tested = len(training.intersection(images)), len(testing.intersection(images))
        name = f"{tested:,} of the {len(testing):,} images of the official test list"
        name += f", and {seen:,} of the official TRAINING list" if seen else ""
    digest = Split("file", None, {"test": images}).digest
    return {"name": name, "digest": digest, "images": len(images), "patients": predictions["patient"].nunique()}


def evaluate(path: str | Path, data_dir: str | Path, *, against: str | Path = "", part="test", seed: int = 0) -> dict:
    """Judge a file of scores, alone or beside another one of the same images.

    Returns
    -------
    dict
        split (as `where_from` says), auroc (the table of `judge`) and, with `against`, difference (that of `compare`).
    """
    radiographs = load_radiographs(data_dir, require_images=False)
    scores = read_scores(path, radiographs, part=part)
    found = {"split": where_from(scores, radiographs), "auroc": judge(scores, part=part, seed=seed)}
    if against:
        found["difference"] = compare(scores, read_scores(against, radiographs, part=part), part=part, seed=seed)
    return found


def judged_in(run: str | Path | None, data: str) -> dict[str, dict]:
    """What notebooks of a run have trained on this data and split alike: name to folder, split, config, predictions.

    `data` is the name that `runs.data_name` gives. Of those with different splits the first and its like are taken.
    """
    found = {}
    for folder in sorted(Path(run).iterdir()) if run else ():
        files = [folder / name for name in ("metrics.json", "config.json", "predictions.parquet")]
        if not all(os.path.isfile(file) for file in files):  # False where one may not look
            continue
        metrics, config = (json.loads(file.read_text()) for file in files[:2])
        first = next(iter(found.values()), metrics)
        if metrics["data"] == data and metrics["split"]["digest"] == first["split"]["digest"]:
            own = {"folder": folder, "split": metrics["split"], "config": config}
            found[folder.name] = {**own, "predictions": pd.read_parquet(files[2])}
    return found


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"there is no file {path}. Name a CSV or Parquet file of scores.")
    try:
        table = pd.read_parquet(path) if path.suffix in (".parquet", ".pq") else pd.read_csv(path)
    except Exception as error:  # pandas and Arrow raise many kinds
        raise DataError(
            f"{path} cannot be read: {error}. Accepted: CSV, or Parquet with the ending .parquet."
        ) from error
    if table.empty:
        raise DataError(f"{path} has no rows. Accepted: a row an image, and a header.")
    return table


def _columns_of_findings(path: Path, columns: list[str]) -> list[str]:
    """The column of each finding, in our order: all 14 with one prefix, which may be empty."""
    found: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        name = column.strip()
        for spelling in (*FINDINGS, *ALIASES):
            prefix = name.removesuffix(spelling)
            if name.endswith(spelling) and prefix != TRUTH:
                found.setdefault(prefix, {}).setdefault(ALIASES.get(spelling, spelling), []).append(column)
    if not found:
        raise DataError(
            f"{path} has no column of a finding (columns: {first_few(columns)}). Needed, with or without a common "
            f"prefix: {', '.join(FINDINGS)}."
        )
    whole = [prefix for prefix, by_finding in found.items() if len(by_finding) == len(FINDINGS)]
    if len(whole) > 1:
        raise DataError(
            f"{path} has several columns a finding, with the prefixes {first_few(whole)}. Leave one of each."
        )
    prefix = whole[0] if whole else max(found, key=lambda p: len(found[p]))
    if missing := [finding for finding in FINDINGS if finding not in found[prefix]]:
        raise DataError(f"{path} has no column {first_few([prefix + f for f in missing], 14)}. Needed: one a finding.")
    if twice := [columns for columns in found[prefix].values() if len(columns) > 1]:
        raise DataError(f"{path} has two columns for one finding: {first_few(twice[0])}. Leave one of them.")
    return [found[prefix][finding][0] for finding in FINDINGS]
