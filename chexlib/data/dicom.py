"""Radiographs in DICOM files, as the grey levels a viewer would show: 0 black to 255 white, air
dark.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from chexlib.data.nih import MAX_PIXELS
from chexlib.errors import DataError

MAX_BYTES = 4 * MAX_PIXELS  # twice what the largest image accepted takes at 16 bits
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
)


def is_dicom(path: str | Path) -> bool:
    """Whether a file has DICOM's mark after its preamble (PS3.10, section 7.1), whatever its name."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: str | Path) -> np.ndarray:
    """Read a single-frame grey DICOM image as grey levels of shape (height, width), uint8.

    Stored values go through the modality transformation (a LUT, or rescale slope and intercept),
    then the first VOI LUT or window, whose range becomes 0..255; without either, the image's least
    to greatest value do. MONOCHROME1, where small values are white, is inverted last (DICOM PS3.3,
    C.7.6.3.1.2, C.11.1 and C.11.2). An element without a value counts as absent.

    Raises
    ------
    DataError
        No DICOM, no pixels, colour, several frames, over 67 MP, or compressed in a way that cannot
        be decoded here.
    """
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"{os.path.getsize(path):,} bytes, over the limit of {MAX_BYTES:,}")
        if getattr(read_file_meta_info(path), "TransferSyntaxUID", "") == DEFLATED:
            raise ValueError("its data set is deflated as a whole, which is not accepted")
        dataset = pydicom.dcmread(path)
        _check(dataset)
        for name in SHOWN_BY:
            if name in dataset and (
                dataset[name].is_empty or (dataset[name].VR == "SQ" and not dataset[name].value)
            ):
                del dataset[name]
        stored = dataset.pixel_array
        least = int(stored.min())
        # Every value that can occur, once: exact in float64, and a fraction of the pixels in
        # memory.
        grey = _grey(np.arange(least, int(stored.max()) + 1), dataset)
        return grey[stored.astype(np.int32) - least]
    except Exception as error:  # a damaged file makes pydicom raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        step = "Export it again as a single uncompressed grey image, or as PNG"
        raise DataError(f"{path} cannot be read as DICOM: {reason}. {step}.") from error


def _check(dataset) -> None:
    if "PixelData" not in dataset:
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
    if (syntax := dataset.file_meta.TransferSyntaxUID).is_compressed:
        _check_packed(dataset, rle=syntax == RLE)


def _check_packed(dataset, *, rle: bool) -> None:
    """Refuse, before it is unpacked, what would take more memory than the image that the header
    tells of.
    """
    from pydicom.encaps import generate_frames

    frames = generate_frames(dataset.PixelData, number_of_frames=1)
    packed, pixels = next(frames), dataset.Rows * dataset.Columns
    if next(frames, None) is not None:
        raise ValueError("its pixels hold more frames than the one it tells of")
    if not rle:
        # JPEG, JPEG 2000.
        with contextlib.suppress(UnidentifiedImageError), Image.open(io.BytesIO(packed)) as image:
            if image.size != (dataset.Columns, dataset.Rows):
                raise ValueError(
                    f"its pixels are of {image.width} x {image.height} px, unlike its header"
                )
        return
    # Twice what no compression takes, and a header.
    if len(packed) > 2 * pixels * dataset.BitsAllocated // 8 + 64:
        raise ValueError(f"{len(packed):,} bytes of RLE for {pixels:,} px")
    count = int.from_bytes(packed[:4], "little")
    starts = [
        int.from_bytes(packed[4 * i : 4 * i + 4], "little") for i in range(1, min(count, 15) + 1)
    ]
    for start, end in zip(starts, [*starts[1:], len(packed)], strict=True):
        # One for padding to an even length.
        if _unpacked(packed[start:end], pixels + 1) > pixels + 1:
            raise ValueError(f"its RLE unpacks to more than {pixels:,} px")


def _unpacked(packed: bytes, enough: int) -> int:
    """The bytes that a segment of RLE becomes (PS3.5, G.3), counted until there are more than
    enough.
    """
    place = length = 0
    while place < len(packed) and length <= enough:
        # So many bytes and one more as they are, or one byte repeated; 128 is nothing.
        head = packed[place]
        length += head + 1 if head < 128 else 257 - head if head > 128 else 0
        place += head + 2 if head < 128 else 2 if head > 128 else 1
    return length


def _grey(values: np.ndarray, dataset) -> np.ndarray:
    """Grey levels, uint8, of stored values of shape (n,)."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(values, dataset)
    if "VOILUTSequence" in dataset:
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        shown = apply_voi(values, dataset) / (2.0**bits - 1)
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        shown = _windowed(values, dataset)
    else:
        shown = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    grey = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _windowed(values: np.ndarray, dataset) -> np.ndarray:
    """The window's three functions on 0 to 1 (PS3.3, C.11.2.1.2 and C.11.2.1.3); pydicom's are on
    the stored range.
    """
    center, width = (
        np.atleast_1d(dataset[name].value).astype(float)[0]
        for name in ("WindowCenter", "WindowWidth")
    )
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
