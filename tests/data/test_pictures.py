"""One's own images: DICOM to the grey levels of the standard, files found, and what is no frontal
film noticed.
"""

import io
import math
import os
import shutil
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import ExifTags, Image, ImageOps
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from chexlib.data.cache import content
from chexlib.data.nih import read_image
from chexlib.data.pictures import find_pictures, frontal_doubt, read_dicom, read_picture
from chexlib.errors import DataError
from chexlib.models.predict import predict_all
from chexlib.phantom.write import phantom_images


def dicom(path, pixels, *, bits=12, kind="MONOCHROME2", syntax=ExplicitVRLittleEndian, **elements):
    """Write an image with pydicom."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = (
        ComputedRadiographyImageStorage,
        pydicom.uid.generate_uid(),
    )
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, kind
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def by_the_standard(stored, *, kind, window=None, slope=1.0, intercept=0.0, function="LINEAR"):
    """Grey levels value by value, after the pseudo-code of PS3.3 C.11.2.1.2.1; least to greatest
    without a window.
    """
    grey = np.empty(stored.shape, np.uint8)
    values = [int(value) * slope + intercept for value in stored.ravel()]
    least, greatest = min(values), max(values)
    for place, x in enumerate(values):
        if window is None:
            y = (x - least) / (greatest - least) * 255
        elif function == "SIGMOID":
            y = 255 / (1 + math.exp(-4 * (x - window[0]) / window[1]))
        else:
            c, w = (window[0] - 0.5, window[1] - 1) if function == "LINEAR" else window
            y = 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255
        grey.flat[place] = round(y)
    return 255 - grey if kind == "MONOCHROME1" else grey


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("window", [None, (1800, 1500), (1000.5, 1)])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.5, -200)])
def test_dicom_grey_levels_are_those_of_the_standard(
    tmp_path, kind, bits, window, slope, intercept
):
    stored = np.random.default_rng(bits).integers(0, 2**bits, (40, 30), np.uint16)
    more = {} if window is None else {"WindowCenter": window[0], "WindowWidth": window[1]}
    if (slope, intercept) != (1, 0):
        more |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    found = read_dicom(dicom(tmp_path / "a.dcm", stored, bits=bits, kind=kind, **more))
    assert found.dtype == np.uint8
    expected = by_the_standard(stored, kind=kind, window=window, slope=slope, intercept=intercept)
    assert np.array_equal(found, expected)
    assert np.unique(found).size > 1


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_each_window_function_and_the_first_of_several_windows_is_used(tmp_path, function):
    stored = np.random.default_rng(0).integers(-2000, 2000, (20, 20), np.int16)
    more = {"WindowCenter": [40, 0], "WindowWidth": [400, 9], "VOILUTFunction": function}
    found = read_dicom(dicom(tmp_path / "a.dcm", stored, bits=16, **more))
    assert np.array_equal(
        found, by_the_standard(stored, kind="MONOCHROME2", window=(40, 400), function=function)
    )


def test_a_lookup_table_goes_before_the_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 100, 16]
    table.add_new("LUTData", "OW", np.array([0, 13107, 40000, 65535], "<u2").tobytes())
    stored = np.array([[99, 100, 101], [102, 103, 900]], np.uint16)
    more = {"VOILUTSequence": [table], "WindowCenter": 5, "WindowWidth": 5}
    found = read_dicom(dicom(tmp_path / "a.dcm", stored, **more))
    assert found.tolist() == [[0, 0, 51], [156, 255, 255]]  # 65,535 / 257 = 255


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize(("depth", "white"), [(16, 65535), (16, 4095), (12, 4095), (8, 255)])
def test_a_table_that_holds_fewer_bits_than_it_says_is_shown_from_black_to_white(
    tmp_path, sequence, depth, white
):
    table = Dataset()
    table.LUTDescriptor = [1024, 0, depth]
    values = np.linspace(0, white, 1024).astype("<u2")
    table.add_new("LUTData", "OW", values.tobytes())
    stored = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    found = read_dicom(dicom(tmp_path / "a.dcm", stored, **{sequence: [table]}))
    assert np.array_equal(found.ravel(), np.rint(values * (255 / white)))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("padding", "limit"), [(65535, None), (0, None), (60000, 65535), (65535, 60000)]
)
def test_padding_is_black_and_leaves_the_film_its_grey_levels(tmp_path, kind, padding, limit):
    film = np.random.default_rng(0).integers(500, 4096, (20, 30), np.uint16)
    whole = np.full((24, 30), padding, np.uint16)
    whole[:20] = film
    more = {"PixelPaddingValue": padding}
    if limit is not None:
        more["PixelPaddingRangeLimit"] = limit
        whole[21] = 62000
    found = read_dicom(dicom(tmp_path / "a.dcm", whole, kind=kind, bits=16, **more))
    alone = read_dicom(dicom(tmp_path / "b.dcm", film, kind=kind, bits=16))
    assert np.array_equal(found[:20], alone) and not found[20:].any()


def test_an_image_that_is_all_padding_is_read_as_if_it_had_none(tmp_path):
    assert not read_dicom(dicom(tmp_path / "a.dcm", FLAT, PixelPaddingValue=0)).any()


@pytest.mark.parametrize("mark", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_marked_as_stored_turned_is_set_upright(tmp_path, kind, mark):
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:16, :16] = 200
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = mark
    Image.fromarray(pixels).save(tmp_path / "film.png", kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "film.png"))
    found, _ = read_picture(tmp_path / "film.png")
    assert np.array_equal(found, np.asarray(upright))
    assert not np.array_equal(found, np.asarray(Image.open(tmp_path / "film.png")))


def test_pydicoms_own_example_is_read_as_pydicom_shows_it():
    path = pydicom.examples.get_path("ct")
    values = pydicom.dcmread(path).pixel_array.astype(float)
    expected = np.rint(255 * (values - values.min()) / np.ptp(values))
    assert np.array_equal(read_dicom(path), expected)


FLAT = np.zeros((8, 8), np.uint16)
LONG_TABLE = Dataset()
LONG_TABLE.add_new("LUTData", "OW", bytes(2**22))
BAD = {
    "4,096 bytes of pixels, more than 8 x 8 px take": {"PixelData": bytes(4096)},
    "144 bytes of pixels, more than": {"PixelData": bytes(144)},
    r"its element \(0028,3010\) has [\d,]+ bytes": {"VOILUTSequence": [LONG_TABLE]},
    "no pixels": {"PixelData": None},
    "RGB": {"PhotometricInterpretation": "RGB"},
    "3 frames": {"NumberOfFrames": 3},
    "50000 x 50000 px": {"Columns": 50000, "Rows": 50000},
    "32 bits": {"BitsAllocated": 32},
    "width 0": {"WindowCenter": 5, "WindowWidth": 0},
}


@pytest.mark.parametrize("reason", [*BAD, "deflated", "truncated", "bytes"])
def test_a_dicom_file_that_cannot_be_shown_is_refused_with_the_reason(tmp_path, reason):
    path = tmp_path / "a.dcm"
    dicom(
        path,
        FLAT,
        syntax=DeflatedExplicitVRLittleEndian if reason == "deflated" else ExplicitVRLittleEndian,
        **BAD.get(reason, {}),
    )
    if reason == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
        reason = "cannot be read as DICOM"
    elif reason == "bytes":  # more than any image that is accepted; a hole on disk
        os.truncate(path, 2**29)
    with pytest.raises(DataError, match=reason) as error:
        read_dicom(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


EMPTY = [
    {"WindowCenter": "", "WindowWidth": ""},
    {"WindowCenter": 100, "WindowWidth": ""},
    {"WindowCenter": "", "WindowWidth": 100},
    {"WindowCenter": 100},
    {"VOILUTSequence": []},
    {"RescaleSlope": "", "RescaleIntercept": ""},
    {"ModalityLUTSequence": []},
]


@pytest.mark.parametrize("elements", EMPTY)
def test_a_window_or_table_without_a_value_is_none(tmp_path, elements):
    stored = np.random.default_rng(0).integers(0, 4096, (20, 30), np.uint16)
    found = read_dicom(dicom(tmp_path / "a.dcm", stored, **elements))
    assert np.array_equal(found, read_dicom(dicom(tmp_path / "b.dcm", stored)))


def test_an_empty_table_leaves_the_window_its_say(tmp_path):
    stored = np.random.default_rng(0).integers(0, 4096, (20, 30), np.uint16)
    window = {"WindowCenter": 1000, "WindowWidth": 500}
    found = read_dicom(
        dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[], VOILUTFunction="", **window)
    )
    assert np.array_equal(found, read_dicom(dicom(tmp_path / "b.dcm", stored, **window)))


@pytest.mark.parametrize("shape", [(40, 30), (33, 5)])
def test_an_image_packed_by_rle_is_the_same_as_unpacked(tmp_path, shape):
    stored = np.random.default_rng(0).integers(0, 4096, shape, np.uint16)
    stored[3:9] = 77
    dicom(tmp_path / "plain.dcm", stored)
    packed = pydicom.dcmread(tmp_path / "plain.dcm")
    packed.compress(RLELossless)
    packed.save_as(tmp_path / "packed.dcm")
    assert np.array_equal(read_dicom(tmp_path / "packed.dcm"), read_dicom(tmp_path / "plain.dcm"))


def rle(path, *segments, frames=1):
    """An image of 64 x 64 px whose pixels are these segments of RLE."""
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    frame = struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(
        segments
    )
    pixels = encapsulate([frame] * frames)
    return dicom(path, np.zeros((64, 64), np.uint16), syntax=RLELossless, PixelData=pixels)


ROWS = b"\x81\x07" * 32  # 128 times 7, so often: 64 x 64 bytes


def test_rle_written_by_hand_is_read(tmp_path):
    assert read_dicom(rle(tmp_path / "a.dcm", ROWS, ROWS + b"\0\x09")).shape == (
        64,
        64,
    )  # a byte of padding


@pytest.mark.parametrize(
    ("segments", "frames", "reason"),
    [
        ((ROWS, ROWS * 2), 1, "unpacks to more than 4,096 px"),
        ((ROWS * 120, ROWS), 1, "unpacks to more than 4,096 px"),
        ((ROWS * 500, ROWS), 1, "bytes of RLE for 4,096 px"),
        ((ROWS, b"\x80" * 20_000), 1, "bytes of RLE for 4,096 px"),
        ((ROWS, ROWS), 3, "more frames than the one"),
    ],
)
def test_rle_that_unpacks_to_more_than_its_image_is_refused_unread(
    tmp_path, monkeypatch, segments, frames, reason
):
    path = rle(tmp_path / "a.dcm", *segments, frames=frames)
    monkeypatch.setattr(
        pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("it was unpacked"))
    )
    with pytest.raises(DataError, match=reason):
        read_dicom(path)


@pytest.mark.parametrize(
    ("kind", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)]
)
def test_a_jpeg_in_dicom_is_read_and_refused_unread_where_it_is_larger_than_told(
    tmp_path, monkeypatch, kind, syntax
):
    grey, packed = phantom_images(5, size=64), io.BytesIO()
    grey = next(iter(grey))[0]
    Image.fromarray(grey).save(packed, kind)
    more = {"PixelData": encapsulate([packed.getvalue()]), "BitsAllocated": 8, "HighBit": 7}
    path = dicom(tmp_path / "a.dcm", grey, bits=8, syntax=syntax, **more)
    decoded = np.asarray(Image.open(packed)).astype(int)
    expected = (decoded - decoded.min()) / np.ptp(decoded) * 255
    assert np.abs(read_dicom(path) - expected).max() < 1
    dicom(path, grey, bits=8, syntax=syntax, **more, Rows=16, Columns=16)
    monkeypatch.setattr(
        pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("it was unpacked"))
    )
    with pytest.raises(DataError, match="pixels are of 64 x 64 px, unlike its header"):
        read_dicom(path)


def test_a_dicom_file_of_elements_without_end_is_refused(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", FLAT)
    element = struct.pack("<HH2sH", 0x0008, 0x0104, b"LO", 0)
    whole = path.read_bytes()
    at = whole.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"))
    path.write_bytes(whole[:at] + element * 2**17 + whole[at:])
    with pytest.raises(DataError, match="more than 65,536 elements"):
        read_dicom(path)


def test_compressed_pixels_in_fragments_without_end_are_refused(tmp_path):
    pixels = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 20_000 + struct.pack(
        "<HHL", 0xFFFE, 0xE0DD, 0
    )
    path = dicom(tmp_path / "a.dcm", FLAT, syntax=JPEG2000Lossless, PixelData=pixels)
    with pytest.raises(DataError, match="more than 16,384 fragments"):
        read_dicom(path)


def in_boxes(path, change):
    """JPEG 2000 in the boxes of a JP2 file, after a change of its bytes, and its pixels."""
    grey, packed = next(iter(phantom_images(5, size=64)))[0], io.BytesIO()
    Image.fromarray(grey).save(packed, "JPEG2000")
    boxes = bytearray(packed.getvalue())
    assert boxes[4:8] == b"jP  "
    more = {"PixelData": encapsulate([bytes(change(boxes))]), "BitsAllocated": 8, "HighBit": 7}
    return dicom(path, grey, bits=8, syntax=JPEG2000Lossless, **more), grey


def test_jpeg_2000_in_the_boxes_of_a_file_is_read(tmp_path):
    path, grey = in_boxes(tmp_path / "a.dcm", lambda boxes: boxes)
    stretched = (grey.astype(float) - grey.min()) / np.ptp(grey) * 255
    assert np.abs(read_dicom(path) - stretched).max() <= 0.5


@pytest.mark.parametrize(
    ("reason", "length"),
    [("a box of 0 bytes", 0), ("a box of 3 bytes", 3), ("no image in its first 64 boxes", 8)],
)
def test_jpeg_2000_in_boxes_that_lead_nowhere_is_refused(tmp_path, reason, length):
    def change(boxes):
        return boxes[:12] + (length.to_bytes(4, "big") + b"free") * 99 + boxes[12:]

    path, _ = in_boxes(tmp_path / "a.dcm", change)
    with pytest.raises(DataError, match=reason):
        read_dicom(path)


@pytest.mark.parametrize(
    ("reason", "at", "value"),
    [
        ("65,536 tiles", b"\xff\x51", (22, ">LL", 16, 16)),
        ("1,048,576 blocks", b"\xff\x52", (10, ">BB", 0, 0)),
        ("16,777,216 blocks", b"\xff\x52", (4, ">B5x4x5B", 1, 0, 0, 0, 0, 0)),
        ("65,535 layers", b"\xff\x52", (6, ">H", 65535)),
    ],
)
def test_jpeg_2000_in_parts_without_number_is_refused(tmp_path, monkeypatch, reason, at, value):
    """As a file of some kB can have: each part takes its reader some hundred bytes."""
    packed = io.BytesIO()
    options = {"no_jp2": True, "precinct_size": (64, 64), "num_resolutions": 5}
    Image.new("L", (64, 64)).save(packed, "JPEG2000", **options)
    stream = bytearray(packed.getvalue())
    struct.pack_into(">LL", stream, 8, 4096, 4096)
    struct.pack_into(">LL", stream, 24, 4096, 4096)
    place, form, *values = value
    start = stream.index(at) + place
    if "x" in form:  # each precinct is a pixel
        stream[start + 10 : start + 15] = bytes(5)
    else:
        struct.pack_into(form, stream, start if at == b"\xff\x52" else 24, *values)
    more = {"PixelData": encapsulate([bytes(stream)]), "BitsAllocated": 8, "HighBit": 7}
    more |= {"Rows": 4096, "Columns": 4096}
    path = dicom(tmp_path / "a.dcm", FLAT, bits=8, syntax=JPEG2000Lossless, **more)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=reason):
        read_dicom(path)


def test_a_jpeg_in_dicom_of_too_many_scans_is_refused(tmp_path):
    with_scans = scans(4096, 4096, 100)
    more = {"PixelData": encapsulate([with_scans]), "BitsAllocated": 8, "HighBit": 7}
    more |= {"Rows": 4096, "Columns": 4096}
    path = dicom(tmp_path / "a.dcm", FLAT, bits=8, syntax=JPEGBaseline8Bit, **more)
    with pytest.raises(DataError, match="100 scans of 4096 x 4096 px"):
        read_dicom(path)


def scans(width, height, count):
    """A JPEG of so many scans, each of which ends at once."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", progressive=True)
    whole = bytearray(file.getvalue())
    frame = whole.index(b"\xff\xc2")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return bytes(whole[: whole.index(b"\xff\xda")] + scan * count + whole[-2:])


def segment(marker, content=b""):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def hidden(kind):
    """Images that are small, and that a reader would need minutes for."""
    if kind == "scans":
        return scans(8000, 8000, 200)
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG" if kind == "chunks" else "JPEG")
    whole = file.getvalue()
    if kind == "chunks":
        return (
            whole[:33] + struct.pack(">L4sL", 0, b"prVt", zlib.crc32(b"prVt")) * 2**18 + whole[33:]
        )
    more = {
        "segments": segment(0xE5) * 2**18,
        "fillers": b"\xff" * 2**18,
        "marks": segment(0xE1, b"Exif\0\0" + b"a" * 65_000) * 100,
    }[kind]
    return whole[:2] + more + whole[2:]


@pytest.mark.parametrize("kind", ["scans", "chunks", "segments", "fillers", "marks"])
def test_an_image_made_to_take_minutes_is_refused_before_it_is_opened(tmp_path, kind, monkeypatch):
    (tmp_path / "a.png").write_bytes(hidden(kind))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(
        DataError, match=r"a\.png.*(its header has no end|200 scans of 8000 x 8000)"
    ):
        read_picture(tmp_path / "a.png")


def test_a_file_of_more_bytes_than_any_image_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 2**29)  # a hole on disk
    for read in (read_image, read_picture, lambda path: content(path, 32)):
        with pytest.raises(
            DataError,
            match=r"a\.png cannot be read.*536,870,912 bytes, over the limit of 268,435,456",
        ):
            read(tmp_path / "a.png")


def test_formats_are_told_apart_by_content(tmp_path, files):
    stored = np.arange(64, dtype=np.uint16).reshape(8, 8)
    path = dicom(tmp_path / "film.png", stored)
    assert np.array_equal(read_picture(path)[0], read_dicom(path))
    shutil.copy(files[0][0], tmp_path / "png.dcm")
    assert np.array_equal(read_picture(tmp_path / "png.dcm")[0], files[1][0])


def test_files_are_found_by_name_folder_and_pattern_each_once(tmp_path, files):
    for name in ("b.png", "a/c.JPG", "a/notes.txt", "a/._c.png", "a/deep/d.dicom"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    dicom(tmp_path / "a" / "IM0001", FLAT)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = find_pictures([tmp_path / "b.png", tmp_path, str(tmp_path / "a" / "*.txt"), "none.png"])
    named = [os.path.relpath(path, tmp_path) for path in found[:-1]]
    assert named == ["b.png", "a/IM0001", "a/c.JPG", "a/deep/d.dicom", "a/notes.txt"]
    assert found[-1] == "none.png"


def test_files_of_archives_are_found_and_what_is_left_out_is_told(tmp_path, caplog):
    for name in ("1.2.840.113619.2.5.17", "IM7", "film.dcm", "sub/scan.v2", "DICOMDIR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        dicom(tmp_path / name, FLAT)
    for name in ("a.tif", "sub/b.nii.gz", "notes.txt", "1.2.3"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "IM8").symlink_to("gone")
    (tmp_path / "readme.txt").symlink_to("gone")
    found = [os.path.relpath(path, tmp_path) for path in find_pictures([tmp_path])]
    assert found == ["1.2.840.113619.2.5.17", "IM7", "film.dcm", "sub/scan.v2", "IM8"]
    (told,) = caplog.messages
    assert "2 files in" in told and "a.tif" in told and "b.nii.gz" in told


def test_an_image_is_found_once_however_its_path_is_spelt(tmp_path, files, monkeypatch):
    (tmp_path / "films").mkdir()
    for name in ("b.png", "a.png"):
        shutil.copy(files[0][0], tmp_path / "films" / name)
    (tmp_path / "link").symlink_to("films")
    (tmp_path / "films" / "c.png").symlink_to("a.png")  # by a name of its own
    monkeypatch.chdir(tmp_path)
    spelt = [
        "./films/b.png",
        "films/b.png",
        tmp_path / "films" / "b.png",
        "films",
        "films/../films/*.png",
        "link/",
    ]
    assert find_pictures(spelt) == ["./films/b.png", "films/a.png", "films/c.png"]
    assert find_pictures(["none.png", "./none.png"]) == ["none.png"]


def test_a_folder_that_cannot_be_listed_is_told_and_the_others_are_done(
    tmp_path, files, vgg_file, monkeypatch
):
    for name in ("films/a.png", "films/locked/b.png", "shut/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[0][0], tmp_path / name)
    locked, scandir = [str(tmp_path / "films" / "locked"), str(tmp_path / "shut")], os.scandir

    def guarded(path="."):  # root may list anything
        if path in locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = predict_all([tmp_path / "films", tmp_path / "shut"], weights=vgg_file)
    assert found.probabilities.index.tolist() == [str(tmp_path / "films" / "a.png")]
    assert sorted(found.errors) == locked
    assert all("cannot be read: Permission denied" in reason for reason in found.errors.values())


# --- is it a frontal radiograph?


@pytest.fixture(scope="module")
def films():
    pairs = zip(phantom_images(5, size=96), range(40), strict=False)
    return [image for (image, _), _ in pairs]


def test_upright_films_are_not_doubted(films):
    assert sum(bool(frontal_doubt(film)) for film in films) <= 1


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_sixteen_bit_films_of_fewer_bits_are_read_right_and_doubted_where_they_cannot_be(
    tmp_path, films, bits
):
    right = dark = 0
    for film in films:
        stored = ((film.astype(np.uint32) * 257) >> (16 - bits)).astype(np.uint16)
        Image.fromarray(stored).save(tmp_path / "film.png")
        found = read_picture(tmp_path / "film.png")[0]
        right += np.abs(found.astype(int) - film).max() <= 255 / 2**bits + 1
        stored[:3, :12] = (
            65535  # a mark in full white, as viewers burn it in: the bits cannot be told
        )
        Image.fromarray(stored).save(tmp_path / "marked.png")
        dark += bool(frontal_doubt(read_picture(tmp_path / "marked.png")[0]))
    assert right >= 0.95 * len(
        films
    )  # a film without anything above half of white is shown lighter
    assert dark == len(films)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_films_are_noticed(films, turns):
    turned = [frontal_doubt(np.rot90(film, -turns)) for film in films]
    assert sum(
        f"turned by {90 * turns} degrees clockwise" in doubt for doubt in turned
    ) >= 0.95 * len(films)


def test_inverted_films_are_noticed(films):
    assert sum("inverted" in frontal_doubt(255 - film) for film in films) >= 0.95 * len(films)


def test_noise_flat_images_and_strips_are_noticed(films):
    rng = np.random.default_rng(0)
    assert all(frontal_doubt(rng.integers(0, 256, (64, 64), np.uint8)) for _ in range(20))
    for level in (0, 128, 255):
        assert "contrast" in frontal_doubt(np.full((64, 64), level, np.uint8))
    assert "long" in frontal_doubt(np.tile(films[0], (1, 3)))


def test_colour_is_noticed_and_grey_stored_as_colour_is_not(tmp_path, films):
    grey = np.stack([films[0]] * 3, -1)
    tinted = np.clip(grey * [1.0, 0.7, 0.4], 0, 255).astype(np.uint8)
    for name, pixels in (
        ("grey.png", grey),
        ("grey.jpg", grey),
        ("tinted.png", tinted),
        ("tinted.jpg", tinted),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        image, colour = read_picture(tmp_path / name)
        assert np.array_equal(image, read_image(tmp_path / name))
        assert ("in colour" in frontal_doubt(image, colour=colour)) == ("tinted" in name), name


def test_a_pattern_enters_each_folder_once_wherever_links_lead(tmp_path, monkeypatch):
    (tmp_path / "films" / "deep" / "x").mkdir(parents=True)
    for name in ("one", "two"):  # each doubles the paths to everything at every step
        (tmp_path / "films" / name).symlink_to(".")
    for name in ("a.png", "deep/b.png", "deep/x/c.png"):
        (tmp_path / "films" / name).touch()
    monkeypatch.chdir(tmp_path)
    every = ["films/a.png", "films/deep/b.png", "films/deep/x/c.png"]
    assert find_pictures(["films/**/*.png"]) == every
    assert find_pictures(["**/*.png"]) == every
    assert find_pictures(["fil*/**/x/*.png", "films/**/deep/**/c.png"]) == every[2:]
    assert find_pictures(["none/**/*.png"]) == ["none/**/*.png"]


def test_a_name_that_a_spreadsheet_would_run_is_spelt_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=cmd.png").touch()
    assert find_pictures(["=cmd.png", "+no.png"]) == ["./=cmd.png", "./+no.png"]
