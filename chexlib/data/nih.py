"""NIH ChestX-ray14 (Wang et al., CVPR 2017), or a phantom in its layout, as tables and pixels."""

import glob
import html
import io
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, UnidentifiedImageError

from chexlib.errors import ConfigError, DataError, first_line
from chexlib.files import files_below, is_utf8
from chexlib.findings import ALIASES, FINDINGS, NO_FINDING
from chexlib.machine import cores

# The first one present is read; the last is that of Kaggle's sample of 5,606 images.
EDITIONS = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
COLUMNS = {  # column of the release: column of `Radiographs.listed`, in its order
    "Image Index": "image",
    "Patient ID": "patient",
    "Follow-up #": "follow_up",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
    "Finding Labels": "labels",
}
RENAMED = {"Patient Sex": "Patient Gender"}  # by NIH, in 2026
# What is read of these two columns, and as what; anything else is unknown, "".
SEXES = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F"}
VIEWS = {"PA": "PA", "AP": "AP"}
BOX_COLUMNS = ["image", "finding", "x", "y", "width", "height"]
# Px: the space of the release's box coordinates, whatever the size of the images here.
BOX_SIDE = 1024
OLDEST = 120  # years: the 2017 edition has ages up to 414
# In folders; a file that is named may have any.
ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
# Of images that are not read, and of archives in which there may be some.
OTHER_IMAGES = (
    *(".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jxl", ".heic", ".avif"),
    *(".nii", ".nrrd", ".mha", ".mhd", ".npy", ".npz", ".h5", ".zip", ".gz", ".tar", ".7z", ".rar"),
)
MAX_PIXELS = 8192**2  # the release has 1024²; far more is a decompression bomb
MAX_BYTES = 4 * MAX_PIXELS  # twice what the largest image accepted takes at 16 bits
MAX_SCANS = 16  # of the largest JPEG accepted, more of smaller ones; usual are 6 to 10
MAX_PARTS = 2**17  # chunks of a PNG: more than 134 MB in chunks of 8 KiB have
MAX_HEADER = 2**22  # bytes of a JPEG before its pixels
# By EXIF's mark of orientation (1 is upright), what makes it so.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
        if missing := sorted(wanted.difference(self.table["image"].tolist())):
            raise DataError(
                f"Not present in {self.root}: {first_few(missing)}. Select names of "
                "`table['image']`."
            )
        return replace(self, table=rows_of(wanted, self.table), boxes=rows_of(wanted, self.boxes))

    def __repr__(self) -> str:
        images = f"{len(self):,} images of {len(self.listed):,} listed"
        return f"{images}, {self.table['patient'].nunique():,} patients, {self.root}"

    def _repr_html_(self) -> str:
        labels = self.table[list(FINDINGS)]
        counts = pd.DataFrame({"images": labels.sum(), "share": labels.mean()})
        counts = counts.sort_values("images", ascending=False)
        rows = counts.to_html(border=0, float_format="{:.1%}".format)
        return f"<p><b>Radiographs</b>: {html.escape(repr(self))}</p>{rows}"


def load_radiographs(
    data_dir: str | Path, *, max_images=0, seed=0, require_images=True
) -> Radiographs:
    """Read a folder in the NIH layout: any edition's CSV, boxes if any, PNG and JPEG files
    anywhere in ``images*/``.

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
    if not is_utf8(root):
        raise DataError(
            f"The name of the data folder {root} is not UTF-8. Rename it, or use a link to it."
        )
    csv = _label_file(root)
    listed, files = _read_entries(csv), _image_files(root)
    table = listed.copy()
    table.insert(1, "path", table["image"].map(files).astype(table["image"].dtype))
    table = table[table["path"].notna()].sort_values("image", ignore_index=True)
    if table.empty and require_images:
        raise DataError(
            f"{csv} lists {len(listed):,} images, but none of them is among the {len(files):,} image "
            f"files below {root / 'images*'}. Unpack them into {root / 'images_001'}, or make a "
            "synthetic folder: `python -m chexlib phantom DIR`."
        )
    _log.info("%s: %d of %d images present", root, len(table), len(listed))
    present = set(table["image"].tolist())
    if unlisted := sorted(files.keys() - present):
        named = first_few(unlisted)
        _log.warning(
            "%d images have no row in %s and are left out: %s", len(unlisted), csv.name, named
        )
    boxes = _read_boxes(root / "BBox_List_2017.csv", present)
    radiographs = Radiographs(root, table, listed, boxes)
    if 0 < max_images < len(table):
        row, patients = pd.factorize(table["patient"])
        turn = np.random.default_rng(seed).permutation(len(patients))[row]
        chosen = np.argsort(turn, kind="stable")[:max_images]
        radiographs = radiographs.select(table["image"].iloc[chosen])
    return radiographs


def _label_file(root: Path) -> Path:
    """The CSV with the labels: of the editions that are there, the newest."""
    editions = [root / name for name in EDITIONS if (root / name).is_file()]
    if not editions:
        fault = "is a file, not a folder" if root.exists() else "does not exist"
        if root.is_dir():
            fault = f"has no label file ({' or '.join(EDITIONS)})"
        # Archives are often unpacked into a folder of their own name.
        below = sorted(file.parent for file in root.glob("*/*.csv") if file.name in EDITIONS)
        step = f"Did you mean {below[0]}? " if below else ""
        raise DataError(f"The data folder {root} {fault}. {step}{NEXT_STEP}")
    if len(editions) > 1:
        _log.info("%s has several label files: reading %s", root, editions[0].name)
    return editions[0]


def read_image(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """Read a radiograph, PNG or JPEG of 1 to 16 bits, as grey levels of shape (height, width),
    uint8.

    With `content`, the file's bytes, `path` is for messages. Alpha is ignored: the release's RGBA
    files are opaque. Files of 16 bits often hold 10 to 14: white is the greatest value of as many
    bits, 8 or more, as the file's greatest value needs. An image whose EXIF mark says that it is
    stored turned or mirrored is set upright. DataError if missing, empty, truncated, no image, over
    67 MP, or made to take its reader minutes.
    """
    try:
        content = read_bytes(path) if content is None else content
        with open_packed(content, ("PNG", "JPEG")) as image:
            if image.mode.startswith("I"):
                values = np.asarray(image)
                white = white_of(values)
                # The grey level of every value that can occur, rounded half up.
                levels = (510 * np.arange(white + 1) + white) // (2 * white)
                grey = look_up(levels.astype(np.uint8), values)
            else:
                plain = image.convert("RGBA") if image.mode == "P" else image
                grey = np.array(plain.convert("L"))
            turn = _turn(image)
        return grey if turn is None else np.array(Image.fromarray(grey).transpose(turn))
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        reason = "it is neither" if isinstance(error, UnidentifiedImageError) else first_line(error)
        if os.path.isfile(path) and not os.path.getsize(path):
            reason = "it is empty"
        raise DataError(
            f"{path} cannot be read as PNG or JPEG: {reason}. Copy it again, or leave it out."
        ) from error


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file; ValueError for more than any image that is accepted takes, and
    for what is no file, such as a pipe.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a regular file")
    if facts.st_size > MAX_BYTES:
        raise ValueError(f"it has {facts.st_size:,} bytes, over the limit of {MAX_BYTES:,}")
    return Path(path).read_bytes()


def open_packed(content: bytes, formats: Sequence[str]) -> Image.Image:
    """Open an image whose decoding takes seconds at most, and no more memory than its pixels.

    Raises
    ------
    ValueError
        No pixels, over 67 MP, a header without end, or a progressive JPEG of too many scans, each
        of which costs a pass over all pixels.
    OSError
        Nothing of these formats.
    """
    _require_short_header(content)
    image = Image.open(io.BytesIO(content), formats=formats)
    pixels = image.width * image.height
    if not pixels:
        raise ValueError("it has no pixels")
    if pixels > MAX_PIXELS:
        size = f"{image.width} x {image.height} px"
        raise ValueError(f"it has {size}, over the limit of {MAX_PIXELS:,} px")
    scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if scans * pixels > MAX_SCANS * MAX_PIXELS:
        raise ValueError(f"it has {scans:,} scans of {image.width} x {image.height} px: too many")
    return image


def _require_short_header(content: bytes) -> None:
    """ValueError for a PNG of more chunks, or a JPEG of more or longer segments before its pixels,
    than any program writes: PIL reads each in Python, and some of them again and again.
    """
    png = content.startswith(b"\x89PNG")
    if not png and not content.startswith(b"\xff\xd8"):
        return
    at, parts = (8 if png else 2), 0
    while at + 4 <= len(content) and content[at : at + 2] != b"\xff\xda":
        parts += 1
        if parts > MAX_PARTS or (not png and at > MAX_HEADER):
            raise ValueError("its header has no end")
        if png:
            at += 12 + int.from_bytes(content[at : at + 4], "big")
        elif content[at + 1] in (0x00, 0xFF) or 0xD0 <= content[at + 1] <= 0xD9:
            at += 1  # of fillers, and of markers that stand alone
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")


def look_up(levels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`levels[places]`, some rows at a time: NumPy makes an index of eight bytes of each place."""
    blocks = np.array_split(places, 1 + places.size // 2**22)
    return np.concatenate([levels[block] for block in blocks])


def white_of(values: np.ndarray) -> int:
    """The greatest value of as many bits, 8 or more, as the greatest of `values` needs."""
    return 2 ** max(8, int(values.max()).bit_length()) - 1


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What sets an image upright that its EXIF mark says is stored otherwise; None for no mark."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a mark that cannot be read is none
        return None


def check_images(radiographs: Radiographs, *, skip_broken: bool = False) -> Radiographs:
    """Decode every image once; DataError names broken ones, unless `skip_broken` logs and drops
    them.
    """

    def problem(path: str) -> str:
        try:
            read_image(path)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(cores()) as pool:
        problems = list(pool.map(problem, radiographs.table["path"]))
    broken = [text for text in problems if text]
    if broken:
        summary = f"{len(broken)} of {len(radiographs):,} images are broken: {' '.join(broken[:3])}"
        if len(broken) == len(problems) or not skip_broken:
            raise DataError(f"{summary} Or leave them all out with skip_broken=True.")
        _log.warning("left out: %s", summary)
    whole = [not text for text in problems]
    return radiographs.select(radiographs.table.loc[whole, "image"])


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
    rows = np.array([image in wanted for image in table["image"].tolist()], bool)
    return table[rows].reset_index(drop=True)


def _read_csv(path: Path, **options) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, index_col=False, **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as CSV: {error}. Use the file of the NIH release."
        ) from error


def _read_entries(path: Path) -> pd.DataFrame:
    """`Radiographs.listed` from the label file."""
    names = [str(name).strip() for name in _read_csv(path, header=None, nrows=1).iloc[0]]
    header = [RENAMED.get(name, name) for name in names]
    repeated = {name for name in COLUMNS if header.count(name) > 1}
    if repeated:
        columns = [name for name, column in zip(names, header, strict=True) if column in repeated]
        raise DataError(
            f"{path} has several columns for one thing: {first_few(columns)}. Keep one of them."
        )
    if missing := [column for column in COLUMNS if column not in header]:
        raise DataError(
            f"{path} has no column {first_few(missing)} (columns: {', '.join(header)}). Use the "
            "file of the NIH release."
        )
    # Columns that are not read may have one name or none.
    header = [name if name in COLUMNS else f"column {i}" for i, name in enumerate(header)]
    entries = _read_csv(path, header=0, names=header, usecols=list(COLUMNS)).rename(columns=COLUMNS)
    entries["image"] = entries["image"].fillna("").str.strip()
    _require_one_row_per_image(entries["image"], path)
    entries["patient"] = _patients(entries["patient"], path)
    follow_up = _numbers(entries["follow_up"], f"{path}, follow_up", whole=True)
    entries["follow_up"] = follow_up.astype(int)
    entries["age"] = _ages(entries["age"], path)
    entries["sex"] = _one_of(SEXES, entries["sex"], path)
    entries["view"] = _one_of(VIEWS, entries["view"], path)
    labels = pd.DataFrame(_label_matrix(entries["labels"], path), columns=list(FINDINGS))
    return pd.concat([entries[list(COLUMNS.values())[:-1]], labels], axis=1)


def _require_one_row_per_image(images: pd.Series, path: Path) -> None:
    fault = "no rows" if images.empty else ""
    repeated = images[images.duplicated() | (images == "")].unique()
    if len(repeated):
        fault = f"image names that are blank or occur twice: {first_few(repeated)}"
    if fault:
        raise DataError(
            f"{path} has {fault}. Give each image one row, or use the NIH release's file."
        )


def _patients(column: pd.Series, path: Path) -> pd.Series:
    """Who is who, as text: float64 does not tell numbers of 17 digits apart, such as PadChest's."""
    patients = column.fillna("").str.strip()
    # "13.0" is 13, written by a program that took it for a measurement. With more digits, or an
    # exponent, it was rounded, and several people may have become one.
    patients = patients.str.replace(r"^(\d{1,15})\.0*$", r"\1", regex=True)
    rounded = patients.str.fullmatch(r"\d+\.0*|\d+([.,]\d*)?[eE]\+\d+")
    if (bad := rounded | (patients == "")).any():
        raise DataError(
            f"{path}: the patient is missing, or is a number that a spreadsheet has rounded, in "
            f"{bad.sum()} of {len(bad)} rows: {first_few(patients[bad].unique())}. Any text is "
            "accepted. Use the file as NIH released it."
        )
    short = patients.drop_duplicates().str.lstrip("0")
    alike = short[short.duplicated(keep=False)].sort_values()
    if len(alike):
        _log.warning(
            "%s: patients whose numbers differ by leading zeros are taken for different people: %s",
            path,
            first_few(patients[alike.index].tolist()),
        )
    return patients


def _one_of(known: Mapping[str, str], column: pd.Series, path: Path) -> pd.Series:
    """A column as the values of `known`, "" for anything else, which a warning names."""
    column = column.fillna("")
    value_of = {text: known.get(text.strip().upper(), "") for text in column.unique()}
    lost = [text for text, value in value_of.items() if text.strip() and not value]
    if lost:
        rows, accepted = column.isin(lost).sum(), ", ".join(sorted(set(known.values())))
        told = (path, column.name, rows, first_few(lost), accepted)
        _log.warning("%s, %s: %d rows are set to unknown: %s (accepted: %s)", *told)
    return column.map(value_of)


def _ages(column: pd.Series, path: Path) -> pd.Series:
    """Ages in years, NaN for what is none or above `OLDEST`, which a warning names."""
    age_of = {age: _years(age) for age in column.dropna().unique()}
    years = column.map(age_of).astype(float)
    lost = column[years.isna() & column.notna()]
    if len(lost):
        named = first_few(lost.unique())
        _log.warning(
            "%s: %d ages are set to unknown, as they are not 0 to %d years: %s",
            *(path, len(lost), OLDEST, named),
        )
    return years


def _years(age: str) -> float:
    """58 and 058Y are years, 010M months, 005D days; NaN for any other text and for impossible
    ages.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMD]?)", age.strip().upper())
    if not parts:
        return np.nan
    years = float(parts[1]) / {"": 1, "Y": 1, "M": 12, "D": 365.25}[parts[2]]
    return years if years <= OLDEST else np.nan


def _numbers(column: pd.Series, where: str, *, whole: bool = False) -> pd.Series:
    """A column as float64; DataError for a cell that is no finite (or no whole) number."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    bad = ~np.isfinite(numbers)
    if whole:
        bad |= numbers % 1 != 0
    if bad.any():
        kind = "whole numbers" if whole else "numbers"
        raise DataError(
            f"{where}: {kind} are expected, and {bad.sum()} of {len(bad)} rows have others: "
            f"{first_few(column[bad].unique())}. Correct them, or use the NIH release's file."
        )
    return numbers


def _label_matrix(labels: pd.Series, path: Path) -> np.ndarray:
    """0/1 of shape (rows, 14), int8; each of the few hundred combinations is parsed once."""
    codes, combinations = pd.factorize(labels.fillna("").str.strip())
    column_of = {finding: i for i, finding in enumerate(FINDINGS)}
    matrix = np.zeros((len(combinations), len(FINDINGS)), np.int8)
    unknown = set()
    for row, text in zip(matrix, combinations, strict=True):
        for name in map(str.strip, text.split("|")):
            name = ALIASES.get(name, name)
            if name in column_of:
                row[column_of[name]] = 1
            elif name != NO_FINDING:
                unknown.add(name)
    if unknown:
        raise DataError(
            f"{path} has unknown findings: {first_few(sorted(unknown))}. Correct them, or use the "
            f"NIH release's file. Accepted, joined by '|': {', '.join((NO_FINDING, *FINDINGS))}."
        )
    return matrix[codes]


def _read_boxes(path: Path, present: set[str]) -> pd.DataFrame:
    """`Radiographs.boxes`, of present images."""
    boxes = pd.DataFrame(columns=BOX_COLUMNS, dtype=str)
    if path.is_file():
        # The header is skipped, as its last name holds commas; columns may be empty.
        headed = str(_read_csv(path, header=None, nrows=1).iloc[0, 0]).strip() not in present
        if not headed:
            _log.warning("%s has no header: its first line is read as a box", path)
        options = {"header": None, "names": BOX_COLUMNS, "usecols": range(6)}
        boxes = _read_csv(path, skiprows=int(headed), **options)
    for column in BOX_COLUMNS[2:]:
        boxes[column] = _numbers(boxes[column], f"{path}, box {column}") / BOX_SIDE
    boxes["finding"] = boxes["finding"].str.strip().replace(ALIASES)
    if len(unknown := boxes.loc[~boxes["finding"].isin(FINDINGS), "finding"].unique()):
        raise DataError(
            f"{path} has unknown findings: {first_few(unknown)}. Correct them, or remove the file. "
            f"Accepted: {', '.join(FINDINGS)}."
        )
    return rows_of(present, boxes)


def _image_files(root: Path) -> dict[str, str]:
    """Name -> path of every image file under images*/, through links, without hidden files (macOS:
    ._NAME.png). What cannot be had is told as a warning.
    """
    folders = sorted(glob.glob(os.path.join(glob.escape(str(root)), "images*")))
    paths, lost = files_below(*(path for path in folders if not os.path.isfile(path)))
    lost |= {path: "its name is no UTF-8" for path in paths if not is_utf8(path)}
    if lost:
        reasons = [f"{path}: {reason}" for path, reason in lost.items()]
        _log.warning("%d files or folders cannot be read: %s", len(lost), first_few(reasons))
    files, pairs = {}, []
    for path in sorted(set(paths).difference(lost)):
        name = os.path.basename(path)
        if name.startswith(".") or not name.lower().endswith((*ENDINGS, *OTHER_IMAGES)):
            continue
        first = files.setdefault(name, path)
        if first != path:
            pairs.append(f"{first} and {path}")
    if pairs:
        raise DataError(
            f"{len(pairs)} images are in two folders: {first_few(pairs, 2)}. Remove one file of each "
            "pair."
        )
    return files


def data_name(folder: Path) -> str:
    """The name of a data folder beside a result; a phantom's says that it is synthetic."""
    name = Path(folder).name
    if (Path(folder) / "phantom.json").exists():
        return f"phantom {name} (synthetic)"
    return name
