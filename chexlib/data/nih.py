"""The NIH ChestX-ray14 layout on disk (Wang et al., CVPR 2017), or a phantom in it, as tables and
pixels.
"""

import glob
import html
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from chexlib.errors import ConfigError, DataError
from chexlib.findings import ALIASES, FINDINGS, NO_FINDING
from chexlib.machine import cores

EDITIONS = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the first one present is read
COLUMNS = {  # column of the release: ours, in our order
    "Image Index": "image",
    "Patient ID": "patient",
    "Follow-up #": "follow_up",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
    "Finding Labels": "labels",
}
RENAMED = {"Patient Sex": "Patient Gender"}  # by NIH, in 2026
BOX_COLUMNS = ["image", "finding", "x", "y", "width", "height"]
# Px: the space of the release's box coordinates, whatever the size of the images here.
BOX_SIDE = 1024
OLDEST = 120  # years: the 2017 edition has ages up to 414
MAX_PIXELS = 8192**2  # the release has 1024²; far more is a decompression bomb
NEXT_STEP = (
    "Use a folder of the NIH release, or make a synthetic one: `python -m chexlib phantom DIR`."
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Radiographs:
    """The radiographs of one data folder.

    Attributes
    ----------
    root : Path
    table : DataFrame
        One row per present image, by name: image, path (absolute), patient (text, as image names
        are, however many digits it has), follow_up (int), age (years or NaN), sex ("M"/"F"), view
        ("PA"/"AP"), then the 14 FINDINGS (int8, 0 or 1).
    listed : DataFrame
        The same without ``path``, for every row of the CSV, image present or not.
    boxes : DataFrame
        image, finding, x, y (upper left), width, height: present images' boxes, in fractions of the
        side.
    """

    root: Path
    table: pd.DataFrame
    listed: pd.DataFrame
    boxes: pd.DataFrame

    @property
    def labels(self) -> np.ndarray:
        """Labels of shape (images, 14), float32, 0 or 1, in the order of FINDINGS."""
        return self.table[list(FINDINGS)].to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self.table)

    def select(self, images: Iterable[str]) -> "Radiographs":
        """Only these images, in the table's order; DataError for one that is not present."""
        wanted = set(images)
        if missing := sorted(wanted.difference(self.table["image"])):
            raise DataError(
                f"Not present in {self.root}: {first_few(missing)}. Select names of "
                "`table['image']`."
            )
        return replace(self, table=rows_of(wanted, self.table), boxes=rows_of(wanted, self.boxes))

    def __repr__(self) -> str:
        patients = self.table["patient"].nunique()
        return f"{len(self):,} images of {len(self.listed):,} listed, {patients:,} patients, {self.root}"

    def _repr_html_(self) -> str:
        found = self.table[list(FINDINGS)]
        counts = pd.DataFrame({"images": found.sum(), "share": found.mean()})
        rows = counts.sort_values("images", ascending=False).to_html(
            border=0, float_format="{:.1%}".format
        )
        return f"<p><b>Radiographs</b>: {html.escape(repr(self))}</p>{rows}"


def load_radiographs(
    data_dir: str | Path, *, max_images=0, seed=0, require_images=True
) -> Radiographs:
    """Read a folder in the NIH layout: either edition's CSV, boxes if any, PNGs anywhere in
    ``images*/``.

    Parameters
    ----------
    data_dir : path
    max_images, seed : int
        Keep at most so many, sampling whole patients (only the last one may be cut); 0 keeps all.
    require_images : bool
        False accepts a folder without images, for work on labels alone.

    Raises
    ------
    DataError
        No folder, CSV, column or image; a finding or number that cannot be read; a name that occurs
        twice.
    """
    if max_images < 0:
        raise ConfigError(
            f"max_images={max_images} is negative. Use 0 for all images, or a positive number."
        )
    root = Path(os.path.abspath(Path(data_dir).expanduser()))
    editions = [root / name for name in EDITIONS if (root / name).is_file()]
    if not editions:
        fault = (
            f"has neither {' nor '.join(EDITIONS)}"
            if root.is_dir()
            else "does not exist, or is a file"
        )
        raise DataError(f"The data folder {root} {fault}. {NEXT_STEP}")
    if len(editions) > 1:
        _log.info("%s has both editions of the label file: reading %s", root, editions[0].name)
    listed, files = _read_entries(editions[0]), _image_files(root)
    table = listed.copy()
    table.insert(1, "path", table["image"].map(files).astype(table["image"].dtype))
    table = table[table["path"].notna()].sort_values("image", ignore_index=True)
    if table.empty and require_images:
        found = f"None of the {len(listed):,} images of {editions[0].name} is among {len(files)} PNGs under"
        raise DataError(
            f"{found} {root / 'images*'}. Put them in images_001/images, say. {NEXT_STEP}"
        )
    _log.info("%s: %d of %d images present", root, len(table), len(listed))
    present = set(table["image"])
    if strangers := sorted(files.keys() - present):
        _log.warning(
            "%d images have no row in %s: %s",
            len(strangers),
            editions[0].name,
            first_few(strangers),
        )
    radiographs = Radiographs(
        root, table, listed, _read_boxes(root / "BBox_List_2017.csv", present)
    )
    if 0 < max_images < len(table):
        row, patients = pd.factorize(table["patient"])
        place = np.random.default_rng(seed).permutation(len(patients))[row]
        radiographs = radiographs.select(
            table["image"].iloc[np.argsort(place, kind="stable")[:max_images]]
        )
    return radiographs


def read_image(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """Read a radiograph, PNG or JPEG of 1 to 16 bits, as grey levels of shape (height, width),
    uint8.

    With `content`, the file's bytes, `path` is for messages. Alpha is ignored: the release's RGBA
    files are opaque. Files of 16 bits often hold 10 to 14: white is the greatest value of as many
    bits, 8 or more, as the file's greatest value needs. DataError if missing, empty, truncated, no
    image, or over 67 MP.
    """
    try:
        with Image.open(
            path if content is None else io.BytesIO(content), formats=("PNG", "JPEG")
        ) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} px, over the limit of {MAX_PIXELS:,} px"
                )
            if image.mode.startswith("I"):
                values = np.asarray(image)
                white = 2 ** max(8, int(values.max()).bit_length()) - 1
                # The grey level of every value that can occur, rounded half up.
                grey = (510 * np.arange(white + 1) + white) // (2 * white)
                return grey.astype(np.uint8)[values]
            return np.array((image.convert("RGBA") if image.mode == "P" else image).convert("L"))
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        reason = "it is empty" if os.path.isfile(path) and not os.path.getsize(path) else error
        step = "Download it again, or leave it out: `check_images(radiographs, skip_broken=True)`"
        raise DataError(f"{path} cannot be read as PNG or JPEG: {reason}. {step}.") from error


def check_images(radiographs: Radiographs, *, skip_broken: bool = False) -> Radiographs:
    """Decode every image once; DataError names broken ones, unless `skip_broken` logs and drops
    them.
    """

    def problem(path: str) -> str:
        try:
            return "" if read_image(path).size else "no pixels"
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(cores()) as pool:
        problems = np.array(list(pool.map(problem, radiographs.table["path"])), dtype=object)
    broken = problems != ""
    if broken.any():
        summary = (
            f"{broken.sum()} of {len(radiographs):,} are broken: {' '.join(problems[broken][:3])}"
        )
        if broken.all() or not skip_broken:
            raise DataError(summary)
        _log.warning("dropped %s", summary)
    return radiographs.select(radiographs.table.loc[~broken, "image"])


def first_few(values: Sequence, n: int = 5) -> str:
    """The first few values, quoted, and how many more there are: for messages."""
    more = f" and {len(values) - n:,} more" if len(values) > n else ""
    return ", ".join(repr(str(value)) for value in values[:n]) + more


def base_name(text: str) -> str:
    """The name of an image, without the folder that a list or a table may have before it."""
    return re.split(r"[\\/]", text.strip())[-1]


def rows_of(images: Iterable[str], table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table with an ``image`` column that are of these images (faster than `isin`)."""
    wanted = set(images)
    return table[np.array([image in wanted for image in table["image"]], bool)].reset_index(
        drop=True
    )


def _read_csv(path: Path, **options) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, index_col=False, **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable CSV: {error}. Use the file of the NIH release."
        ) from error


def _read_entries(path: Path) -> pd.DataFrame:
    names = [str(name).strip() for name in _read_csv(path, header=None, nrows=1).iloc[0]]
    header = [RENAMED.get(name, name) for name in names]
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        columns = first_few(
            [name for name, ours in zip(names, header, strict=True) if ours in twice]
        )
        raise DataError(f"{path} has several columns for one thing: {columns}. Leave one of each.")
    if missing := [column for column in COLUMNS if column not in header]:
        has = f"has no column {first_few(missing)} (columns: {', '.join(header)})"
        raise DataError(f"{path} {has}. Use the file of the NIH release.")
    header = [name if name in COLUMNS else f"column {i}" for i, name in enumerate(header)]
    entries = _read_csv(path, header=0, names=header, usecols=list(COLUMNS)).rename(columns=COLUMNS)
    for column in ("image", "sex", "view"):
        entries[column] = entries[column].fillna("").str.strip()
    twice = entries.loc[entries["image"].duplicated() | (entries["image"] == ""), "image"].unique()
    if len(twice) or entries.empty:
        fault = (
            f"image names that are blank or occur twice: {first_few(twice)}"
            if len(twice)
            else "no rows"
        )
        raise DataError(
            f"{path} has {fault}. Accepted: one row per image. Use the NIH release's file."
        )
    entries["patient"] = _patients(entries["patient"], path)
    entries["follow_up"] = _numbers(entries["follow_up"], f"{path}, follow_up", whole=True).astype(
        int
    )
    years = (
        entries["age"]
        .map({age: _years(age) for age in entries["age"].dropna().unique()})
        .astype(float)
    )
    if len(lost := entries.loc[years.isna() & entries["age"].notna(), "age"]):
        _log.warning(
            "%s: %d impossible ages set to unknown: %s", path, len(lost), first_few(lost.unique())
        )
    labels = pd.DataFrame(_label_matrix(entries["labels"], path), columns=list(FINDINGS))
    return pd.concat([entries.assign(age=years)[list(COLUMNS.values())[:-1]], labels], axis=1)


def _patients(column: pd.Series, path: Path) -> pd.Series:
    """Who is who, as text: float64 does not tell numbers of 17 digits apart, such as PadChest's."""
    patients = column.fillna("").str.strip()
    # "13.0" is 13, written by a program that took it for a measurement. With more digits, or an
    # exponent, it was rounded, and several people may have become one.
    patients = patients.str.replace(r"^(\d{1,15})\.0*$", r"\1", regex=True)
    rounded = patients.str.fullmatch(r"\d+\.0*|\d+([.,]\d*)?[eE]\+\d+")
    if (bad := rounded | (patients == "")).any():
        raise DataError(
            f"{path}, patient: {bad.sum()} rows have no patient, or a number that a spreadsheet "
            f"has rounded: {first_few(patients[bad].unique())}. Accepted: any text. Use the file "
            "as it was released."
        )
    short = patients.drop_duplicates().str.lstrip("0")
    if (alike := short.duplicated(keep=False)).any():
        named = first_few(
            patients[short.index[alike]].sort_values(key=lambda p: p.str.lstrip("0")).tolist()
        )
        differ = "patients that differ by zeros in front are taken for different people"
        _log.warning("%s: %s: %s", path, differ, named)
    return patients


def _years(age: str) -> float:
    """58 and 058Y are years, 010M months, 005D days; NaN for any other text and for impossible
    ages.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMD]?)", age.strip().upper())
    years = float(parts[1]) / {"": 1, "Y": 1, "M": 12, "D": 365.25}[parts[2]] if parts else np.nan
    return years if years <= OLDEST else np.nan


def _numbers(column: pd.Series, where: str, *, whole: bool = False) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    if (bad := ~np.isfinite(numbers) | (whole & (numbers % 1 != 0))).any():
        values, kind = first_few(column[bad].unique()), "whole numbers" if whole else "numbers"
        raise DataError(
            f"{where}: {bad.sum()} rows are no {kind}: {values}. Use the NIH release's file."
        )
    return numbers


def _label_matrix(labels: pd.Series, path: Path) -> np.ndarray:
    """0/1 of shape (rows, 14), int8; each of the few hundred combinations is parsed once."""
    codes, combinations = pd.factorize(labels.fillna("").str.strip())
    names = [{ALIASES.get(n.strip(), n.strip()) for n in text.split("|")} for text in combinations]
    if unknown := sorted(set().union(*names).difference(FINDINGS, [NO_FINDING])):
        accepted = ", ".join((NO_FINDING, *FINDINGS))
        raise DataError(
            f"{path} has unknown findings: {first_few(unknown)}. Accepted, joined by '|': "
            f"{accepted}."
        )
    return np.array([[finding in row for finding in FINDINGS] for row in names], np.int8)[codes]


def _read_boxes(path: Path, present: set[str]) -> pd.DataFrame:
    """Boxes of present images.

    The header is skipped, as its last name holds commas; columns may be empty.
    """
    boxes = pd.DataFrame(columns=BOX_COLUMNS, dtype=str)
    if path.is_file():
        boxes = _read_csv(path, header=None, skiprows=1, names=BOX_COLUMNS, usecols=range(6))
    for column in BOX_COLUMNS[2:]:
        boxes[column] = _numbers(boxes[column], f"{path}, box {column}") / BOX_SIDE
    boxes["finding"] = boxes["finding"].str.strip().replace(ALIASES)
    if len(unknown := boxes.loc[~boxes["finding"].isin(FINDINGS), "finding"].unique()):
        raise DataError(
            f"{path} has unknown findings: {first_few(unknown)}. Accepted: {', '.join(FINDINGS)}."
        )
    return rows_of(present, boxes)


def _image_files(root: Path) -> dict[str, str]:
    """Name -> path of every PNG under images*/, through links, without hidden files (macOS:
    ._NAME.png).
    """
    found, twice = {}, []
    pattern = os.path.join(glob.escape(str(root)), "images*", "**", "*.png")
    for path in sorted(glob.iglob(pattern, recursive=True)):
        if (first := found.setdefault(os.path.basename(path), path)) != path:
            twice.append(f"{first} and {path}")
    if twice:
        raise DataError(
            f"{len(twice)} images lie in two folders: {first_few(twice, 2)}. Remove one of each "
            "pair."
        )
    return found


def data_name(folder: Path) -> str:
    """What to call a data folder beside a result: the phantom by its settings, other folders by
    their name.
    """
    file = Path(folder) / "phantom.json"
    if not file.exists():
        return Path(folder).name
    return f"phantom {Path(folder).name} (synthetic)"
