"""Image files of any source: found on disk, read from PNG, JPEG or DICOM, and checked for being an
upright frontal chest radiograph.

The check uses simple statistics. The image, averaged to 16 x 16 px, is correlated with the mean of
a few phantoms: dark lungs on both sides of a bright mediastinum above a bright abdomen. Upright
films correlate with it, turned and inverted ones less or negatively, and noise not at all. It is a
warning for whoever mixed up a folder, no guarantee: a lateral film, a film of a child or a good
drawing may pass.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import itertools
import logging
import math
import os
import re
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from chexlib.data.cache import DARK, resize_area, too_dark
from chexlib.data.nih import (
    ENDINGS,
    MAX_BYTES,
    MAX_PIXELS,
    OTHER_IMAGES,
    first_few,
    look_up,
    open_packed,
    read_bytes,
    read_image,
    white_of,
)
from chexlib.errors import DataError, first_line
from chexlib.files import files_below, folders_below
from chexlib.phantom.write import phantom_images

log = logging.getLogger(__name__)
FORMULA = ("=", "+", "-", "@")  # a cell that begins so is run by spreadsheets


def find_pictures(wanted: Iterable[str | Path]) -> list[str]:
    """Paths of image files: those named, those that a pattern fits, and those below a folder.

    In folders, files count that end as `ENDINGS` or are DICOM, such as those that archives name by
    their UID; a warning names those of other kinds of images. Each folder is entered once, wherever
    links lead. What is found twice, however its folder was spelt, comes once, as it was spelt
    first. A name that stands for nothing, as a link to nowhere does, and a folder that cannot be
    listed, is returned as it is; reading it raises the error.
    """
    paths: list[str] = []
    for name in map(str, wanted):
        matches = [name]
        if not os.path.lexists(name):
            matches = sorted(_fitting(name)) or [name]
        for path in matches:
            paths += _below(path) if os.path.isdir(path) else [path]
    folder_of = functools.cache(os.path.realpath)
    first: dict[tuple[str, str], str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if path.startswith(FORMULA):
            path = os.path.join(os.curdir, path)
        first.setdefault((folder_of(folder), name), path)
    return list(first.values())


def _fitting(pattern: str) -> set[str]:
    """Paths that a pattern fits, as `glob` finds them, but below `**` each folder is entered once."""
    above, *below = re.split(r"(?:^|(?<=/))\*\*/+", pattern, maxsplit=1)
    if not below:
        return set(glob.glob(pattern))
    found = set()
    for folder, _ in folders_below(*(glob.glob(above) if above else [os.curdir])):
        here = os.path.join(glob.escape(folder), "")
        found |= _fitting((here if above else here.removeprefix("./")) + below[0])
    return found


def _below(folder: str) -> list[str]:
    """Image files below a folder, by name."""
    files, lost = files_below(folder)
    paths = [path for path in (*files, *lost) if _is_picture(path)]
    if others := [path for path in files if path.lower().endswith(OTHER_IMAGES)]:
        log.warning(
            f"{len(others):,} files in {folder} are left out: {first_few(others)}. Only PNG, JPEG and "
            "DICOM are read. Convert the others to PNG to have them scored."
        )
    return paths or [folder]


def _is_picture(path: str) -> bool:
    name = os.path.basename(path).lower()
    # macOS' ._NAME.png, and the table of contents of a DICOM disk, which has no pixels.
    if name.startswith(".") or name == "dicomdir":
        return False
    ending = os.path.splitext(name)[1]
    if ending in ENDINGS:
        return True
    with contextlib.suppress(OSError):
        if os.path.exists(path):
            return os.path.isdir(path) or (os.path.isfile(path) and is_dicom(path))
    # A link to nowhere, or a file that may not be read: by its name it may be DICOM.
    return not ending.strip(".0123456789")


def is_dicom(path: str | Path) -> bool:
    """Whether a file has DICOM's mark after its preamble (PS3.10, section 7.1), whatever its name."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


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
                f"{path} is not an image file, and no image was found in it. Name image files, "
                "folders, or patterns such as 'films/*.png'."
            )
        dicom = is_dicom(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Name image files, folders, or "
            "patterns such as 'films/*.png'."
        ) from error
    if dicom:
        return read_dicom(path), 0.0
    content = _content(path)
    return read_image(path, content), _colour(content)


def _content(path: str | Path) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {first_line(error)}. Export it again as PNG."
        ) from error


def _colour(content: bytes) -> float:
    with open_packed(content, ("PNG", "JPEG")) as image:
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            return 0.0
        image.draft("RGB", (128, 128))  # of JPEG, decode no more than is needed
        rgb = np.asarray(image.convert("RGB").resize((64, 64)), np.int16)
    return float(np.ptp(rgb, axis=-1).mean())


# The one transfer syntax whose whole data set is compressed, so to any size.
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
SHOWN_BY = (  # what says how values are shown, and nothing where it is empty
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)
PIXELS = "PixelData"
READ = (  # all that is read of a file
    *("PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *SHOWN_BY,
    PIXELS,
)
MAX_READS = 2**16  # of a DICOM file's elements, nested ones too; usual are some hundred
MAX_TABLE = 2**22  # bytes of the lookup tables; one has at most 131,072
MAX_FRAGMENTS = 2**14  # of the compressed pixels of a frame; usual is one
FRAGMENT = b"\xfe\xff\x00\xe0"  # what begins one
MAX_BOXES = 64  # of a JP2 file before its image, and segments of what is in it; usual are three
MAX_JPEG_2000 = {"tiles": 2**12, "layers": 64, "blocks": 2**19}


def read_dicom(path: str | Path) -> np.ndarray:
    """Read a single-frame grey DICOM image as grey levels of shape (height, width), uint8.

    0 is black and 255 white, so air is dark. Stored values go through the modality transformation
    (a LUT, or rescale slope and intercept), then the first VOI LUT or window, whose range becomes
    0..255; without either, the image's least to greatest value do. MONOCHROME1, where small values
    are white, is inverted last (DICOM PS3.3, C.7.6.3.1.2, C.11.1 and C.11.2). Padding, which fills
    an image up to its rectangle, is black and has no part in least and greatest (C.7.5.1.1.2). An
    element without a value counts as absent.

    Raises
    ------
    DataError
        No DICOM, no pixels or more than the header tells, colour, several frames, over 67 MP, made
        to take its reader minutes, or compressed in a way that cannot be decoded here.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, over the limit of {MAX_BYTES:,}")
        dataset = _read_dataset(path)
        _check(dataset)
        for name in SHOWN_BY:
            if name in dataset and _is_empty(dataset[name]):
                del dataset[name]
        stored = dataset.pixel_array
        if stored.shape != (dataset.Rows, dataset.Columns):
            raise ValueError(f"its pixels are of shape {stored.shape}, unlike its header")
        return _shown(stored, dataset)
    except Exception as error:  # a damaged file makes pydicom raise nearly anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        step = "Export it again as a single uncompressed grey image, or as PNG"
        raise DataError(f"{path} cannot be read as DICOM: {reason}. {step}.") from error


class _Counted(io.BufferedReader):
    """A file that may be read from so many times: pydicom reads for every element."""

    left = MAX_READS

    def read(self, size=-1):
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_READS:,} elements")
        # A length that is more than the file is asked for in vain, but room is made for it first.
        return super().read(min(size, MAX_BYTES))


def _read_dataset(path: str | Path):
    """The elements of `READ`, up to the pixels."""
    from pydicom.filereader import _read_file_meta_info, read_partial, read_preamble
    from pydicom.tag import Tag

    tags = [Tag(name) for name in READ]
    *others, pixels = tags

    def stop(tag, vr, length):
        if tag in others and MAX_TABLE < length < 2**32 - 1:
            raise ValueError(f"its element {tag} has {length:,} bytes")
        return tag > pixels

    with _Counted(io.FileIO(path)) as file:
        read_preamble(file, force=False)
        # pydicom's function for paths would open the file once more, without a limit.
        if _read_file_meta_info(file).get("TransferSyntaxUID", "") == DEFLATED:
            raise ValueError("its data set is deflated as a whole, which is not accepted")
        file.seek(0)
        return read_partial(file, stop, specific_tags=tags)


def _is_empty(element) -> bool:
    return element.is_empty or (element.VR == "SQ" and not element.value)


def _check(dataset) -> None:
    """Refuse, before it is decoded, what is no single grey image of a size that is accepted."""
    if PIXELS not in dataset:
        raise ValueError("it has no pixels")
    kind = dataset.get("PhotometricInterpretation", "none")
    if kind not in ("MONOCHROME1", "MONOCHROME2") or dataset.get("SamplesPerPixel", 1) != 1:
        raise ValueError(
            f"its photometric interpretation is {kind!r}, not MONOCHROME1 or MONOCHROME2"
        )
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise ValueError(
            f"{dataset.Columns} x {dataset.Rows} px, over the limit of {MAX_PIXELS:,} px"
        )
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames, not one")
    if dataset.BitsAllocated not in (8, 16):
        raise ValueError(f"its values have {dataset.BitsAllocated} bits, not 8 or 16")
    bytes_per_row = dataset.Columns * dataset.BitsAllocated // 8
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        _check_packed(dataset, rle=syntax == RLE)
    # Less than a row may be padding.
    elif len(dataset.PixelData) >= (dataset.Rows + 1) * bytes_per_row:
        raise ValueError(
            f"{len(dataset.PixelData):,} bytes of pixels, more than {dataset.Columns} x "
            f"{dataset.Rows} px take"
        )


def _check_packed(dataset, *, rle: bool) -> None:
    """Refuse, before it is unpacked, what would take more time or memory than its header
    declares.
    """
    from pydicom.encaps import encapsulate, generate_frames

    if dataset.PixelData.count(FRAGMENT) > MAX_FRAGMENTS:
        raise ValueError(f"its pixels are in more than {MAX_FRAGMENTS:,} fragments")
    frames = generate_frames(dataset.PixelData, number_of_frames=1)
    packed = next(frames)
    if next(frames, None) is not None:
        raise ValueError("its pixels hold more frames than the one it tells of")
    if rle:
        _check_rle(packed, dataset.Rows * dataset.Columns, dataset.BitsAllocated // 8)
        return
    if packed[4:8] == b"jP  ":
        packed = _codestream(packed)
        dataset.PixelData = encapsulate([packed])
    if packed.startswith(b"\xff\x4f"):
        _check_jpeg_2000(packed)
    # JPEG, JPEG 2000.
    with (
        contextlib.suppress(UnidentifiedImageError),
        open_packed(packed, ("JPEG", "JPEG2000")) as image,
    ):
        if image.size != (dataset.Columns, dataset.Rows) or len(image.getbands()) != 1:
            colour = "" if len(image.getbands()) == 1 else " in colour"
            raise ValueError(
                f"its pixels are of {image.width} x {image.height} px{colour}, unlike its header"
            )


def _codestream(jp2: bytes) -> bytes:
    """What DICOM should hold (PS3.5, A.4.4), out of the boxes of a JP2 file, through which pydicom
    may step for ever.
    """
    at = 0
    for _ in range(MAX_BOXES):
        length = int.from_bytes(jp2[at : at + 4], "big")
        if jp2[at + 4 : at + 8] == b"jp2c":
            return jp2[at + (16 if length == 1 else 8) :]
        if length < 8:
            raise ValueError(f"its JP2 file has a box of {length} bytes")
        at += length
    raise ValueError(f"its JP2 file has no image in its first {MAX_BOXES} boxes")


def _check_jpeg_2000(stream: bytes) -> None:
    """Refuse an image cut into so many tiles, layers or blocks that their reader takes gigabytes
    for a file of some kB (ISO/IEC 15444-1, A.5 and A.6).
    """
    at, pixels, parts = 2, 0, {"tiles": 0, "layers": 0, "blocks": 0}
    for _ in range(MAX_BOXES):
        marker, length = struct.unpack(">HH", stream[at : at + 4])
        body = stream[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xFF51:  # sizes
            right, bottom, left, top, width, height = struct.unpack(">6L", body[2:26])
            pixels = (right - left) * (bottom - top)
            parts["tiles"] = math.ceil(right / width) * math.ceil(bottom / height)
        elif marker in (0xFF52, 0xFF53):  # coding, of all and of one component
            coding = body[5:] if marker == 0xFF52 else body[2:]
            if marker == 0xFF52:
                parts["layers"] = int.from_bytes(body[2:4], "big")
            # Sides as powers of two, of blocks and of the precincts that hold them.
            powers = [coding[1] + coding[2] + 4, *(side // 16 + side % 16 for side in coding[5:])]
            parts["blocks"] = max(parts["blocks"], pixels // 2 ** min(powers))
        elif marker == 0xFF90:  # the first tile
            break
    for name, count in parts.items():
        if count > MAX_JPEG_2000[name]:
            raise ValueError(f"its JPEG 2000 has {count:,} {name}, far too many")


def _check_rle(packed: bytes, pixels: int, bytes_per_pixel: int) -> None:
    """Refuse RLE whose segments, one per byte of a pixel, unpack to more than the pixels."""
    # Twice what no compression takes, and a header.
    if len(packed) > 2 * pixels * bytes_per_pixel + 64:
        raise ValueError(f"{len(packed):,} bytes of RLE for {pixels:,} px")
    # The header: how many segments there are, and where each begins, in 32 bits each.
    header = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, 64, 4)]
    starts = header[1 : header[0] + 1]
    for start, end in itertools.pairwise([*starts, len(packed)]):
        # One for padding to an even length.
        if _unpacked(packed[start:end], pixels + 1) > pixels + 1:
            raise ValueError(f"its RLE unpacks to more than {pixels:,} px")


def _unpacked(packed: bytes, enough: int) -> int:
    """The bytes that a segment of RLE becomes (PS3.5, G.3), counted until there are more than
    enough.
    """
    position = length = 0
    while position < len(packed) and length <= enough:
        head = packed[position]
        position += 1
        if head < 128:  # so many bytes and one more follow as they are
            length += head + 1
            position += head + 1
        elif head > 128:  # one byte follows, repeated
            length += 257 - head
            position += 1
    return length


def _shown(stored: np.ndarray, dataset) -> np.ndarray:
    """Grey levels of stored values of shape (height, width)."""
    padding = None
    if "PixelPaddingValue" in dataset:
        ends = dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit")
        ends = [int(end) for end in ends if end is not None]
        padding = (stored >= min(ends)) & (stored <= max(ends))
    film = stored if padding is None or padding.all() else stored[~padding]
    least, greatest = int(film.min()), int(film.max())
    # Every value that can occur, once: exact in float64, and a fraction of the pixels in memory.
    grey = _grey(np.arange(least, greatest + 1), dataset)
    shown = look_up(grey, np.clip(stored, least, greatest).astype(np.int32) - least)
    if film is not stored:
        shown[padding] = 0
    return shown


def _grey(values: np.ndarray, dataset) -> np.ndarray:
    """Grey levels, uint8, of stored values of shape (n,)."""
    if "ModalityLUTSequence" in dataset:
        values, _ = _looked_up(values, dataset, "ModalityLUTSequence")
    elif "RescaleSlope" in dataset and "RescaleIntercept" in dataset:
        values = values * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    if "VOILUTSequence" in dataset:
        shown, white = _looked_up(values, dataset, "VOILUTSequence")
        shown = shown / white
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        shown = _windowed(values, dataset)
    else:
        shown = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    grey = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _looked_up(values: np.ndarray, dataset, name: str) -> tuple[np.ndarray, int]:
    """What the first table of a sequence makes of values (PS3.3, C.11.1.1 and C.11.2.1.1), and its
    white, which is of as many bits as the table holds: some say 16 and hold 12.
    """
    item = dataset[name].value[0]
    entries, first, _ = item.LUTDescriptor
    entries, table = entries or 2**16, item.LUTData
    if isinstance(table, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        table = np.frombuffer(table, f"{order}u{2 if len(table) >= 2 * entries else 1}")
    table = np.asarray(table, np.int64)[:entries]
    places = np.clip(values - float(first), 0, len(table) - 1).astype(int)
    return table[places], white_of(table)


def _windowed(values: np.ndarray, dataset) -> np.ndarray:
    """The window's three functions on 0 to 1 (PS3.3, C.11.2.1.2 and C.11.2.1.3); pydicom's are on
    the stored range.
    """
    center = np.atleast_1d(dataset.WindowCenter).astype(float)[0]
    width = np.atleast_1d(dataset.WindowWidth).astype(float)[0]
    function = dataset.get("VOILUTFunction", "LINEAR")
    if not np.isfinite([center, width]).all() or width <= 0 or (width < 1 and function == "LINEAR"):
        raise ValueError(
            f"its window has centre {center:g} and width {width:g}, which shows nothing"
        )
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if width == 1:
        return values > center - 0.5
    return (values - (center - 0.5)) / (width - 1) + 0.5


SIDE = 16  # px; fine enough for lungs, too coarse for disease
# Of 437 and 998 NIH radiographs, 5 and 5 have less (README), some of them shown inverted.
LEAST_LIKENESS = 0.3
# Grey levels between the strongest and the weakest of red, green, blue, on average.
MOST_COLOUR = 10.0
LONGEST = 2.0  # sides, as a ratio
LEAST_CONTRAST = 4.0  # grey levels, standard deviation


def frontal_doubt(image: np.ndarray, *, colour: float = 0.0) -> str:
    """Why an image does not look like an upright frontal chest radiograph, or "" if it does.

    Parameters
    ----------
    image : (height, width) uint8
    colour : float
        Mean difference of the strongest and the weakest of red, green and blue, in grey levels.
    """
    if colour > MOST_COLOUR:
        return f"it is in colour (channels differ by {colour:.0f} grey levels)"
    ratio = max(image.shape) / min(image.shape)
    if ratio > LONGEST:
        return f"it is {ratio:.1f} times as long as wide"
    small = resize_area(image, SIDE).astype(float)
    if small.std() < LEAST_CONTRAST:
        return f"it has hardly any contrast (standard deviation {small.std():.1f} grey levels)"
    template, small = _template(), _standard(small)
    likeness = [float((template * np.rot90(small, turns)).mean()) for turns in range(4)]
    upright, best = likeness[0], int(np.argmax(likeness))
    if best == 0 and upright >= LEAST_LIKENESS:
        if too_dark(image):
            return f"it is very dark (95 % of it is below {DARK} of 255 grey levels)"
        return ""
    if -upright > max(LEAST_LIKENESS, likeness[best]):
        return f"it seems to be inverted, white for black (likeness {upright:.2f})"
    if best and likeness[best] >= LEAST_LIKENESS:
        # rot90 turns anticlockwise: what that sets right was turned clockwise.
        return f"it seems to be turned by {90 * best} degrees clockwise"
    return f"it is unlike a frontal chest radiograph (likeness {upright:.2f})"


@functools.cache
def _template() -> np.ndarray:
    """The mean of 32 phantoms, (SIDE, SIDE), standardized."""
    films = itertools.islice(phantom_images(0, size=64, difficulty="easy"), 32)
    small = [_standard(resize_area(film, SIDE).astype(float)) for film, _ in films]
    return _standard(np.mean(small, axis=0))


def _standard(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()
