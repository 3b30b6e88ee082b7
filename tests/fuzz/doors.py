"""The doors through which files of others come in, and files made to break them.

A file begins as a whole one that its door reads, and is then changed in a few places: bytes,
lengths, cells, elements or values. A door reads it, or refuses it with an error of chexlib of one
line. Anything else is a fault.
"""

import functools
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import safetensors.numpy
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from chexlib.data.cache import ImageStore, cache_folder, resize_area
from chexlib.data.nih import load_radiographs
from chexlib.data.pictures import frontal_doubt, read_picture
from chexlib.data.splits import read_list
from chexlib.errors import ChexlibError
from chexlib.evaluation.scores import read_scores
from chexlib.files import read_json
from chexlib.findings import FINDINGS
from chexlib.models.arrays import fill_model
from chexlib.models.convert import _plan, load_torch_weights
from chexlib.models.weights import CARD, config_of, read_card
from chexlib.training.config import TrainConfig

ODD = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "-1",
        "nan",
        "inf",
        "1e400",
        "1e9",
        "13.0",
        "058Y",
        "\x00",
        "a\nb",
        "ä",
        "\ufeff",
    ),
    *(
        "<script>",
        "x" * 5000,
        "9" * 400,
        '"',
        "|",
        "No Finding|",
        ",",
        ";",
        "../../etc/passwd",
        "NULL",
    ),
)
VALUES = st.recursive(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 10**9, 10**400, 0.5, 1e308, float("nan"), *TEXTS]
    ),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), part, max_size=3)
    ),
    max_leaves=4,
)


def changed(draw, content: bytes, *, most: int = 6) -> bytes:
    """Bytes changed in up to so many places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["byte", "number", "cut", "remove", "insert", "repeat"]))
        if kind == "byte":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "number":
            order, width = draw(st.sampled_from("<>")), draw(st.sampled_from("BHL"))
            number = draw(st.sampled_from(ODD)) % 256 ** struct.calcsize(order + width)
            content[at : at + struct.calcsize(order + width)] = struct.pack(order + width, number)
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            piece = content[at : at + draw(st.integers(1, 64))]
            content[at:at] = piece * draw(st.sampled_from([1, 2, 100]))
    return bytes(content)


def replaced(draw, values, *, most: int = 3):
    """A copy of JSON values, with up to so many of them replaced, removed or put beside."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, most))):
        places = [values]
        for place in places:  # grows while it is gone through
            children = place.values() if isinstance(place, dict) else place
            places += [child for child in children if isinstance(child, dict | list) and child]
        place = draw(st.sampled_from(places))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return draw(VALUES)
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 5)) == 0:
            del place[key]
        else:
            place[key] = draw(VALUES)
    return values


# --- pictures


def film(side: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)


def packed(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def pictures() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey, deep = Image.fromarray(film()), Image.fromarray(film().astype(np.uint16) * 16)
    return [
        packed(grey, "PNG"),
        packed(deep, "PNG"),
        packed(grey.convert("RGBA"), "PNG", exif=exif),
        packed(grey.convert("P"), "PNG", transparency=3),
        packed(grey.convert("1"), "PNG"),
        packed(grey, "JPEG", exif=exif),
        packed(grey.convert("RGB"), "JPEG", progressive=True),
        packed(grey.convert("CMYK"), "JPEG"),
    ]


def make_picture(draw, folder: Path) -> None:
    content = changed(draw, draw(st.sampled_from(pictures())), most=3)
    if content.startswith(b"\x89PNG") and draw(st.booleans()):
        content = checked(content)
    (folder / "a.png").write_bytes(content)


def checked(png: bytes) -> bytes:
    """A PNG whose chunks have their checksums again, so that what was changed is read."""
    png, at = bytearray(png), 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(png)


def read_one_picture(folder: Path) -> None:
    image, colour = read_picture(folder / "a.png")
    frontal_doubt(image, colour=colour)
    resize_area(image, 32)


# --- DICOM

ELEMENTS = {
    "PhotometricInterpretation": ["MONOCHROME1", "PALETTE COLOR", "", "YBR_FULL_422"],
    "NumberOfFrames": ["", "1", "2", "-1", "2147483647"],
    "WindowCenter": ["", "0", ["40", "50"], "1e300", "-5"],
    "WindowWidth": ["", "0", "-1", "1", "1e300"],
    "RescaleSlope": ["", "0", "1e300", "-1"],
    "RescaleIntercept": ["", "1e300", "-1024"],
    "VOILUTFunction": ["SIGMOID", "LINEAR_EXACT", "x"],
}
NUMBERS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
NUMBERS += ("SamplesPerPixel", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit")


def dataset(syntax, **elements) -> Dataset:
    pixels = film().astype(np.uint16) * 16
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def table(sequence: str) -> dict:
    item = Dataset()
    item.LUTDescriptor = [16, 0, 16]
    item.add_new("LUTData", "OW", np.arange(16, dtype="<u2").tobytes())
    return {sequence: [item]}


@functools.cache
def dicoms() -> list[bytes]:
    grey = Image.fromarray(film())
    byte = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    frame = struct.pack("<16L", 2, 64, 64 + 12, *[0] * 13) + b"\x81\x07" * 5 + b"\0\x09" * 7
    made = []
    for syntax, elements in [
        (ExplicitVRLittleEndian, {"WindowCenter": "2000", "WindowWidth": "3000"}),
        (ExplicitVRLittleEndian, table("VOILUTSequence")),
        (ImplicitVRLittleEndian, table("ModalityLUTSequence") | {"PixelPaddingValue": 0}),
        (RLELossless, {"PixelData": encapsulate([frame])}),
        (JPEGBaseline8Bit, byte | {"PixelData": encapsulate([packed(grey, "JPEG")])}),
        (JPEG2000Lossless, byte | {"PixelData": encapsulate([packed(grey, "JPEG2000")])}),
        (
            JPEG2000Lossless,
            byte | {"PixelData": encapsulate([packed(grey, "JPEG2000", no_jp2=True)])},
        ),
    ]:
        file = io.BytesIO()
        dataset(syntax, **elements).save_as(file, enforce_file_format=True)
        made.append(file.getvalue())
    return made


def make_dicom(draw, folder: Path) -> None:
    if draw(st.booleans()):
        content = changed(draw, draw(st.sampled_from(dicoms())))
    else:
        elements = {}
        for _ in range(draw(st.integers(1, 4))):
            if draw(st.booleans()):
                name = draw(st.sampled_from(NUMBERS))
                elements[name] = draw(st.sampled_from(ODD)) % 65536
            else:
                name = draw(st.sampled_from(sorted(ELEMENTS)))
                elements[name] = draw(st.sampled_from(ELEMENTS[name]))
        if draw(st.booleans()):
            elements |= table(draw(st.sampled_from(["VOILUTSequence", "ModalityLUTSequence"])))
            item = Dataset()
            item.LUTDescriptor = [draw(st.sampled_from(ODD)) % 65536 for _ in range(3)]
            item.add_new("LUTData", "OW", draw(st.binary(max_size=64)))
            elements[next(iter(table("VOILUTSequence")))] = [item]
        file = io.BytesIO()
        try:
            dataset(ExplicitVRLittleEndian, **elements).save_as(file, enforce_file_format=True)
        except Exception:  # what pydicom does not write is made by changed bytes
            file = io.BytesIO(changed(draw, dicoms()[0]))
        content = file.getvalue()
    (folder / "a.png").write_bytes(content)


# --- tables

NAMES = tuple(f"{patient:08d}_{image:03d}.png" for patient in (1, 2, 3) for image in range(3))
HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position"
LABELS = tuple(
    f"{name},{'Mass|Nodule' if i % 2 else 'No Finding'},{i},{i // 3},{50 + i},M,PA"
    for i, name in enumerate(NAMES)
)
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h]\n00000001_000.png,Mass,1,2,3,4\n"


def make_table(draw, text: str) -> bytes:
    """A CSV file, changed in its cells or in its bytes."""
    if draw(st.integers(0, 2)) == 0:
        return changed(draw, text.encode())
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(rows))
        at = draw(st.integers(0, len(row) - 1))
        kind = draw(st.sampled_from(["cell", "cell", "cell", "more", "less", "row", "gone"]))
        if kind == "cell":
            row[at] = draw(st.sampled_from(TEXTS) | st.text(max_size=8))
        elif kind == "more":
            row.insert(at, draw(st.sampled_from(TEXTS)))
        elif kind == "less" and len(row) > 1:
            del row[at]
        elif kind == "row":
            rows.append(list(row))
        elif kind == "gone" and len(rows) > 1:
            rows.remove(row)
    text = "\n".join(draw(st.sampled_from(",,,;\t")).join(row) for row in rows)
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1"])), "replace")


@functools.cache
def scores() -> pd.DataFrame:
    values = np.random.default_rng(0).random((len(NAMES), len(FINDINGS)))
    scores = pd.DataFrame(values, columns=[f"score_{finding}" for finding in FINDINGS])
    return scores.assign(image=NAMES, part="test")


@functools.cache
def labelled():
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        return load_radiographs(folder, require_images=False)


def write_folder(folder: Path) -> None:
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *LABELS]) + "\n")
    (folder / "BBox_List_2017.csv").write_text(BOXES)
    (folder / "test_list.txt").write_text("\n".join(NAMES))


def make_csv(draw, folder: Path) -> None:
    write_folder(folder)
    (folder / "scores.csv").write_text(scores().to_csv(index=False))
    name = draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    (folder / name).write_bytes(make_table(draw, (folder / name).read_text()))


def read_csv(folder: Path) -> None:
    radiographs = load_radiographs(folder, require_images=False)
    read_list(folder / "test_list.txt", radiographs)
    read_scores(folder / "scores.csv", radiographs)


def make_parquet(draw, folder: Path) -> None:
    table = scores().copy()
    if draw(st.booleans()):
        column = draw(st.sampled_from(list(table)))
        kind = draw(st.sampled_from(["text", "number", "gone", "renamed", "bytes", "list", "date"]))
        if kind == "gone":
            table = table.drop(columns=column)
        elif kind == "renamed":
            table = table.rename(columns={column: draw(st.sampled_from(TEXTS))})
        else:
            new = {
                "text": draw(st.sampled_from(TEXTS)),
                "number": draw(st.sampled_from([float("nan"), float("inf"), -1.0, 1e300])),
                "bytes": b"\xff\xfe",
                "list": [1, 2],
                "date": pd.Timestamp("2020-01-01"),
            }[kind]
            table[column] = [new] * len(table)
    file = io.BytesIO()
    table.to_parquet(file, compression=draw(st.sampled_from([None, "snappy", "zstd"])))
    content = file.getvalue()
    (folder / "a.parquet").write_bytes(changed(draw, content) if draw(st.booleans()) else content)


def read_parquet(folder: Path) -> None:
    read_scores(folder / "a.parquet", labelled())


# --- weights

CARD_OF_ONE = {
    "findings": list(FINDINGS),
    "topology": "vgg16",
    "size": 32,
    "config": {"norm": "none"},
}
CARD_OF_ONE |= {"width": 0.25, "stem": "small", "split": {"name": "patient", "digest": "x"}}


class Weight:
    """What `fill_model` and `load_torch_weights` need of a weight of a network."""

    def __init__(self, name: str, shape: tuple):
        self.name, self.shape = name, shape

    def assign(self, value) -> None:
        assert value.shape == self.shape and value.dtype == np.float32


VARIABLES = {
    "layers/dense/vars/0": ("findings", "kernel", Weight("kernel", (4, 14))),
    "layers/conv/vars/0": ("conv", "kernel", Weight("kernel", (3, 3, 3, 4))),
}


@functools.cache
def hdf5() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as weights:
        for name, (*_, weight) in VARIABLES.items():
            weights[name] = np.ones(weight.shape, np.float32)
    return file.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for name, content in members.items():
            whole.writestr(name, content)
    return file.getvalue()


@functools.cache
def network():
    """The layers of a DenseNet-121, each of one channel, and its tensors in a PyTorch file."""
    layers, tensors = {}, {}
    for layer, weight, tensor in _plan():
        shape = {"kernel": (1, 1, 1, 1)}.get(weight, (1,))
        if layer == "findings":
            shape = (1, 14) if weight == "kernel" else (14,)
        named = layers.setdefault(layer, SimpleNamespace(name=layer, weights=[], epsilon=1e-3))
        named.weights.append(Weight(weight, shape))
        turned = shape[::-1] if layer == "findings" else shape
        tensors[tensor] = np.ones(turned, np.float32)
    normal = SimpleNamespace(scale=np.ones(1), offset=np.ones(1))
    model = SimpleNamespace(name="densenet121", layers=list(layers.values()))
    model.get_layer = lambda _: normal
    return model, tensors


@functools.cache
def safe() -> bytes:
    return safetensors.numpy.save(network()[1], metadata={"findings": json.dumps(FINDINGS)})


def make_weights(draw, folder: Path) -> None:
    kind = draw(
        st.sampled_from(
            ["card"] * 12 + ["file"] * 12 + ["torch"] * 12 + ["torch card"] * 12 + ["hdf5"]
        )
    )
    members = {"config.json": b"{}", "model.weights.h5": hdf5()}
    members[CARD] = json.dumps(CARD_OF_ONE).encode()
    if kind.startswith("torch"):
        content = safe()
        if kind == "torch":
            content = changed(draw, content)
        else:
            length = int.from_bytes(content[:8], "little")
            head = json.dumps(replaced(draw, json.loads(content[8 : 8 + length]))).encode()
            content = len(head).to_bytes(8, "little") + head + content[8 + length :]
        (folder / "a.safetensors").write_bytes(content)
        return
    if kind == "card":
        members[CARD] = json.dumps(replaced(draw, CARD_OF_ONE)).encode()
    elif kind == "hdf5":
        members["model.weights.h5"] = changed(draw, hdf5())
    whole = archive(members)
    (folder / "a.keras").write_bytes(changed(draw, whole) if kind == "file" else whole)
    (folder / "kind").write_text(kind)


def read_weights(folder: Path) -> None:
    if (path := folder / "a.safetensors").exists():
        load_torch_weights(network()[0], path)
        return
    path = folder / "a.keras"
    card = read_card(path)
    config_of(path, card)
    if (folder / "kind").read_text() == "hdf5":  # which takes a process of its own
        from chexlib.models.weights import _arrays

        fill_model(VARIABLES, _arrays(path, "vgg16"))


# --- state


@functools.cache
def checkpoint() -> bytes:
    from chexlib.training.state import save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        arrays = {"weights/0": np.ones((3, 3), np.float32), "steps": np.zeros((0, 4))}
        return save_checkpoint(folder, 1, arrays, {"ranks": 1}, keep=1).read_bytes()


def make_checkpoint(draw, folder: Path) -> None:
    from chexlib.training.state import _digest

    if draw(st.booleans()):
        content = changed(draw, checkpoint())
    else:
        facts = draw(
            st.sampled_from([b"", b"[" * 5000, b"\xff", b'{"version": 1}', b'{"version": 2}'])
            | VALUES.map(lambda v: json.dumps(v).encode())
        )
        arrays = {"weights/0": np.zeros(draw(st.sampled_from([(), (0,), (2, 2)])))}
        arrays["facts"] = np.frombuffer(facts, np.uint8)
        file = io.BytesIO()
        save = draw(st.sampled_from([np.savez, np.savez, np.savez_compressed]))
        save(file, **arrays, digest=np.frombuffer(_digest(arrays), np.uint8))
        content = file.getvalue()
    (folder / "step-000000002.npz").write_bytes(content)


def read_checkpoint(folder: Path) -> None:
    from chexlib.training.state import newest_checkpoint

    newest_checkpoint(folder)


@functools.cache
def cached() -> tuple[Path, Path]:
    """Three images, and the cache of them."""
    folder = Path(tempfile.mkdtemp())
    for i in range(3):
        Image.fromarray(np.roll(film(), i)).save(folder / f"{i}.png")
    with in_cache(folder / "cache"):
        ImageStore(sorted(map(str, folder.glob("*.png"))), size=8)
    return folder, folder / "cache"


class in_cache:
    """Decoded images are kept in this folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        self.before = os.environ.get("CHEXLIB_CACHE")
        os.environ["CHEXLIB_CACHE"] = str(self.folder)

    def __exit__(self, *_):
        os.environ.pop("CHEXLIB_CACHE")
        if self.before is not None:
            os.environ["CHEXLIB_CACHE"] = self.before


def make_cache(draw, folder: Path) -> None:
    shutil.copytree(cached()[1], folder / "cache")
    with in_cache(folder / "cache"):
        files = sorted(cache_folder(8).iterdir())
    path = draw(st.sampled_from(files))
    if path.suffix == ".parquet" and draw(st.booleans()):
        table = pd.read_parquet(path)
        column = draw(st.sampled_from(list(table)))
        kind = draw(st.sampled_from(["number", "text", "gone", "none"]))
        if kind == "gone":
            table = table.drop(columns=column)
        elif kind == "none":
            table[column] = None
        else:
            odd = st.sampled_from(TEXTS) if kind == "text" else st.sampled_from([-1, *ODD])
            table[column] = [draw(odd)] * len(table)
        table.to_parquet(path, index=False)
    else:
        path.write_bytes(changed(draw, path.read_bytes()))


def read_cache(folder: Path) -> None:
    paths = sorted(map(str, cached()[0].glob("*.png")))
    with in_cache(folder / "cache"):
        pixels = ImageStore(paths, size=8).take(range(3))
    expected = [resize_area(np.roll(film(), i), 8) for i in range(3)]
    assert np.array_equal(pixels, expected), "pixels that were never written"


SETTINGS = {"data_dir": "data/phantom", "run_dir": "runs/a", "size": 32, "epochs": 2, "width": 0.25}
SETTINGS |= {
    "schedule": {"preset": "64-nodes-meant"},
    "norm": "ghost",
    "ghost_size": 4,
    "topology": "vgg16",
}


def make_config(draw, folder: Path) -> None:
    content = json.dumps(SETTINGS).encode()
    if draw(st.integers(0, 3)) == 0:
        content = changed(draw, content)
    else:
        values = replaced(draw, SETTINGS)
        if isinstance(values, dict) and draw(st.booleans()):
            names = st.sampled_from(sorted(TrainConfig.__dataclass_fields__))
            values[draw(names)] = draw(VALUES)
        content = json.dumps(values).encode()
    (folder / "config.json").write_bytes(content)


def read_config(folder: Path) -> None:
    TrainConfig.from_dict(read_json(folder / "config.json"))


# Of each door: what makes its file, what reads it, and its part of the long form's trials.
DOORS = {
    "pictures": (make_picture, read_one_picture, 0.30),
    "dicom": (make_dicom, read_one_picture, 0.30),
    "csv": (make_csv, read_csv, 0.10),
    "parquet": (make_parquet, read_parquet, 0.08),
    "weights": (make_weights, read_weights, 0.08),
    "checkpoints": (make_checkpoint, read_checkpoint, 0.06),
    "cache": (make_cache, read_cache, 0.02),
    "config": (make_config, read_config, 0.06),
}


def enter(door: str, folder: Path) -> str:
    """Read the file of a door: "read" or "refused"; whatever else is raised is a fault."""
    try:
        DOORS[door][1](folder)
    except ChexlibError as error:
        assert "\n" not in str(error), f"an error of several lines: {error}"
        assert not isinstance(error.__cause__, MemoryError), f"it took all memory: {error}"
        return "refused"
    return "read"
