"""Broken and hostile files: each gets an error of its own, nothing in them runs, and the rest of a
batch is done.
"""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless
from test_pictures import dicom

from chexlib.errors import WeightsError
from chexlib.findings import FINDINGS
from chexlib.models.arrays import read_arrays
from chexlib.models.predict import batch_of, predict_all
from chexlib.models.topologies import build_model
from chexlib.models.weights import CARD, extend_card, load_model, read_card, save_model

FLAT = np.zeros((16, 16), np.uint16)


class Boom:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


MEMBER = {"topology": "vgg16", "width": 0.25, "stem": "small"}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def break_images(folder, good):
    """Write 24 files of which none is an image that can be used."""
    whole = Path(good).read_bytes()
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        jpeg, "JPEG"
    )
    for name, content in {
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg.getvalue()[:300],
        "text.png": b"this is text\n" * 50,
        "square.png": png(100_000, 100_000),
        "wide.png": png(2**31 - 1, 1),
        "large.png": png(9000, 9000),
        "comment.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**26))),
        "flipped.png": whole[:50] + bytes([whole[50] ^ 255]) + whole[51:],
        "pickle.png": pickle.dumps(Boom(folder / "executed")),
        "script.jpg": b"#!/bin/sh\ntouch executed\n",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n",
        "page.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "mark.dcm": b"\0" * 128 + b"DICM",
    }.items():
        (folder / name).write_bytes(content)
    Image.new("L", (16, 16)).save(folder / "gif.png", "GIF")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("none-such")
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    dicom(folder / "empty.dcm", FLAT, PixelData=None)
    dicom(folder / "square.dcm", FLAT, Rows=65535, Columns=65535)
    dicom(
        folder / "colour.dcm",
        FLAT,
        PhotometricInterpretation="RGB",
        SamplesPerPixel=3,
        PlanarConfiguration=0,
    )
    dicom(
        folder / "bomb.dcm",
        np.zeros((2**13, 2**13), np.uint8),
        Rows=16,
        Columns=16,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        syntax=DeflatedExplicitVRLittleEndian,
    )
    path = dicom(folder / "jpegls.dcm", FLAT)
    path.write_bytes(
        path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", JPEGLSLossless.encode()[:19] + b"\0")
    )
    (folder / "round").symlink_to(folder)
    return sorted(path.name for path in folder.iterdir() if path.name != "round")


def test_broken_images_get_an_error_each_and_the_rest_of_the_batch_is_done(
    tmp_path, files, vgg_file
):
    broken = break_images(tmp_path, files[0][0])
    assert len(broken) == 24
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    code = "import sys; from chexlib.app.cli import main\ntry: main(sys.argv[1:])\nfinally: "
    peak = "*(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM'))"
    if sys.platform == "darwin":  # which counts in bytes
        peak = "__import__('resource').getrusage(0).ru_maxrss // 1024"
    code += f"print({peak}, file=sys.stderr)"
    command = [
        sys.executable,
        "-c",
        code,
        "predict",
        str(tmp_path),
        *files[0][:2],
        "--csv",
        "--weights",
        str(vgg_file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    *errors, peak = (
        line for line in done.stderr.splitlines() if line.startswith("Error: ") or line.isdigit()
    )
    assert len(errors) == 24
    for name in broken:
        (line,) = (line for line in errors if str(tmp_path / name) in line)
        assert len(line) < 500
    rows = pd.read_csv(io.StringIO(done.stdout)).set_index("image")
    scored = rows.index[rows[list(FINDINGS)].notna().all(axis=1)]
    assert set(scored) == {*files[0][:2], str(tmp_path / "photo.jpg")}
    assert "colour" in rows.loc[str(tmp_path / "photo.jpg"), "doubt"]
    assert rows["error"].notna().sum() == 24
    assert not (tmp_path / "executed").exists()
    assert int(peak) < 4 * 2**20  # KiB


def test_a_batch_gives_the_same_as_its_images_alone(files, vgg_file, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    seen = []

    def each(model, paths, pixels, scores):
        assert (pixels.shape, scores.shape) == ((len(paths), 32, 32, 1), (len(paths), 14))
        seen.extend(paths)

    found = predict_all(
        [files[0][0], tmp_path / "bad.png", *files[0][1:5]], weights=vgg_file, batch=2, each=each
    )
    assert found.probabilities.index.tolist() == files[0][:5]
    assert seen == files[0][:5]
    alone = predict_all(files[0][4:5], weights=vgg_file).probabilities
    np.testing.assert_allclose(alone, found.probabilities[4:], atol=1e-5)
    assert list(found.errors) == [str(tmp_path / "bad.png")]


def test_a_batch_has_no_more_pixels_than_32_images_of_224():
    assert [batch_of(size) for size in (32, 224, 225, 320, 512, 1024)] == [32, 32, 31, 15, 6, 1]


def test_images_at_once_follow_the_size_of_the_network_and_run_as_a_graph(
    files, vgg_file, monkeypatch
):
    import tensorflow as tf

    sizes, inside = [], []
    monkeypatch.setattr(
        "chexlib.models.predict.BATCH_SIDE", 16
    )  # so that of 32 px there fit a quarter of 32
    call = keras.Model.__call__

    def watched(self, *given, **named):
        if isinstance(given[0], tf.Tensor):  # and not while a network is built
            inside.append(tf.executing_eagerly())
        return call(self, *given, **named)

    monkeypatch.setattr(keras.Model, "__call__", watched)
    scored = predict_all(
        files[0], weights=vgg_file, each=lambda _, paths, *__: sizes.append(len(paths))
    )
    assert sizes == [8, 3] and len(scored.probabilities) == 11
    assert inside and not any(
        inside
    )  # eagerly, 32 images of 224 px take DenseNet-121 7 GiB; as a graph, 1


# --- weights


def change(source, target, *, pack=None, **members):
    """Copy a .keras file, with other members in place of its own."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            if item.filename not in members:
                new.writestr(
                    item,
                    old.read(item),
                    compress_type=zipfile.ZIP_DEFLATED if item.filename == pack else None,
                )
        for name, content in members.items():
            new.writestr(name, content)
    return target


def h5(change_one):
    """Bytes of a weights file of one array, made by a function of the open file."""
    file = io.BytesIO()
    with h5py.File(file, "w") as weights:
        change_one(weights)
    return file.getvalue()


def hostile(kind, path, source):
    if kind == "pickled":
        path.write_bytes(pickle.dumps(Boom(path.parent / "executed")))
    elif kind == "pickled members":
        change(source, path, **{CARD: pickle.dumps(Boom(path.parent / "executed"))})
    elif kind == "lambda":
        model = build_model(**MEMBER, size=32)
        code = f"__import__('os').mkdir({str(path.parent / 'executed')!r})"
        shout = keras.layers.Lambda(eval(f"lambda x: ({code}, x)[1]"), output_shape=(14,))
        outputs = keras.Model(model.input, model.output)
        doctored = keras.Sequential([outputs, shout])
        save_model(doctored, path, card={**MEMBER, "size": 32})
        # The weights fit; only the description has the layer.
        change(
            source,
            path.with_name("b"),
            **{"config.json": zipfile.ZipFile(path).read("config.json")},
        )
        path.with_name("b").replace(path)
        if (path.parent / "executed").exists():  # by Keras, when the file was made
            os.rmdir(path.parent / "executed")
    elif kind == "deflated":
        change(source, path, pack="model.weights.h5")
    elif kind == "huge card":
        change(source, path, **{CARD: b" " * (17 * 2**20)})
    elif kind == "deep card":
        change(source, path, **{CARD: b"[" * 100_000})
    elif kind == "size":
        extend_card(change(source, path), size=32)
        change(source, path, **{CARD: json.dumps({**read_card(source), "size": 100_000})})
    elif kind == "topology":
        change(source, path, **{CARD: json.dumps({**read_card(source), "topology": "os.system"})})
    elif kind == "normalisation":
        change(
            source,
            path,
            **{
                CARD: json.dumps(
                    {**read_card(source), "normalization": {"scale": [1], "offset": [0]}}
                )
            },
        )
    elif kind == "shape":
        path_of_one = "layers/dense/vars/0"
        content = h5(
            lambda f: f.create_dataset(
                path_of_one, shape=(2**20, 2**20), chunks=(2**10, 2**10), dtype="f4"
            )
        )
        change(source, path, **{"model.weights.h5": content})
    elif kind == "link":
        content = h5(lambda f: f.__setitem__("layers", h5py.ExternalLink("/etc/passwd", "/")))
        change(source, path, **{"model.weights.h5": content})
    return path


KINDS = (
    "pickled",
    "pickled members",
    "lambda",
    "deflated",
    "huge card",
    "deep card",
    "size",
    "topology",
)


@pytest.mark.parametrize("kind", [*KINDS, "normalisation", "shape", "link"])
def test_hostile_weights_are_refused_and_nothing_in_them_runs(kind, tmp_path, vgg_file):
    path = hostile(kind, tmp_path / "model.keras", vgg_file)
    with pytest.raises(WeightsError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not (tmp_path / "executed").exists()


ENSEMBLE = {"topology": "ensemble", "members": [MEMBER]}
CARDS = {
    "no members": {"topology": "ensemble"},
    "empty": {**ENSEMBLE, "members": []},
    "members by name": {**ENSEMBLE, "members": {"a": MEMBER}},
    "members of text": {**ENSEMBLE, "members": ["vgg16"]},
    "an ensemble of ensembles": {**ENSEMBLE, "members": [ENSEMBLE]},
    "more members than the file has room for": {**ENSEMBLE, "members": [MEMBER] * 100},
    "a member's config of text": {**ENSEMBLE, "members": [{**MEMBER, "config": "x"}]},
    "config of text": {"config": "x"},
    "an unknown norm": {"config": {"norm": "x"}},
    "a ghost size of text": {"config": {"norm": "ghost", "ghost_size": "x"}},
    "topologies": {"topology": ["vgg16"]},
    "a width of text": {"width": "x"},
    "a width without end": {"width": 1e9},
    "stems": {"stem": ["small"]},
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_that_describes_no_network_is_refused_in_one_line(kind, tmp_path, vgg_file):
    path = tmp_path / "model.keras"
    change(vgg_file, path, **{CARD: json.dumps({**read_card(vgg_file), **CARDS[kind]})})
    with pytest.raises(WeightsError, match=r"model\.keras (is|has|names)") as error:
        load_model(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


ARRAYS = {
    "never written": {"shape": (2**12, 2**12), "dtype": "f4"},
    "packed": {"data": np.zeros(2**20, "f4"), "compression": "gzip"},
    "of another file": {"shape": (4,), "dtype": "f4", "external": [("/etc/passwd", 0, 16)]},
    "text": {"data": ["1"], "dtype": h5py.string_dtype()},
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_not_in_the_file_as_it_is_is_refused_before_it_is_read(
    kind, tmp_path, vgg_file, monkeypatch
):
    content = h5(lambda file: file.create_dataset("layers/dense/vars/0", **ARRAYS[kind]))
    path = change(vgg_file, tmp_path / "model.keras", **{"model.weights.h5": content})
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("it was read"))
    with pytest.raises(
        WeightsError, match=r"model\.keras keeps 'layers/dense/vars/0' otherwise.*Save it again"
    ):
        read_arrays(path)


def test_the_card_takes_more_facts_and_the_weights_stay(tmp_path, vgg_file):
    path = change(vgg_file, tmp_path / "model.keras")
    facts = {"calibration": {"temperature": 1.5}, "operating_points": {"Mass": {"threshold": 0.2}}}
    assert extend_card(path, **facts) == {**read_card(vgg_file), **facts}
    model, card = load_model(path)
    assert card == {**read_card(vgg_file), **facts}
    before, _ = load_model(vgg_file)
    assert all(
        np.array_equal(a, b) for a, b in zip(before.get_weights(), model.get_weights(), strict=True)
    )
    assert os.listdir(tmp_path) == ["model.keras"]
    keras.saving.load_model(path)  # still a file for other programs


def test_hdf5_that_would_take_all_memory_crash_or_loop_ends_in_one_line(tmp_path, vgg_file):
    found = Path(__file__).with_name("endless.h5").read_bytes()
    path = change(vgg_file, tmp_path / "model.keras", **{"model.weights.h5": found})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=r"model\.keras do not fit vgg16: .*memory") as error:
        load_model(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**20  # KiB


@pytest.mark.parametrize("name", ["config.json", CARD])
def test_json_that_is_too_deep_or_too_long_is_refused(tmp_path, vgg_file, name, monkeypatch):
    deep = b'{"config": ' * 700 + b"1" + b"}" * 700
    path = change(vgg_file, tmp_path / "model.keras", **{name: deep})
    if name == CARD:
        with pytest.raises(WeightsError, match="not a model written by chexlib"):
            read_card(path)
    else:
        load_model(path)  # which names no class that is strange
    monkeypatch.setattr("chexlib.models.weights.LARGEST_CARD", 100)
    with pytest.raises(WeightsError, match=r"in it has [\d,]+ bytes"):
        read_card(path)


def checkpoint(path, kind):
    """A checkpoint of few bytes that would become many, or that `save_checkpoint` never wrote."""
    from chexlib.training.state import _digest, save_checkpoint

    zeros = {"weights/0": np.zeros(2**22, np.uint8)}
    if kind == "compressed":
        np.savez_compressed(path, **zeros)
    elif kind == "shared bytes":
        whole = save_checkpoint(path.parent, 1, zeros, {}, keep=1).read_bytes()
        end = whole.index(b"PK\5\6")
        count, size = struct.unpack("<HL", whole[end + 10 : end + 16])
        entries = whole[end - size : end]
        last = struct.pack(
            "<4s4H2LH", b"PK\5\6", 0, 0, 20 * count, 20 * count, 20 * size, end - size, 0
        )
        path.write_bytes(whole[: end - size] + entries * 20 + last)
    else:
        facts = {"no facts": b"null", "a list": b"[1]", "text": b"x", "no version": b"{}"}[kind]
        content = {"facts": np.frombuffer(facts, np.uint8)}
        np.savez(path, **content, digest=np.frombuffer(_digest(content), np.uint8))


@pytest.mark.parametrize(
    "kind", ["compressed", "shared bytes", "no facts", "a list", "text", "no version"]
)
def test_a_checkpoint_that_would_unpack_to_more_or_says_nothing_is_refused(
    tmp_path, kind, monkeypatch
):
    from chexlib.training.state import newest_checkpoint

    path = tmp_path / "step-000000001.npz"
    checkpoint(path, kind)
    if kind in ("compressed", "shared bytes"):
        monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(WeightsError, match=r"all 1 checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path)
