"""Data folders that several test files share."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chexlib.phantom.write import write_phantom

# (patient, finding labels of each of its follow-ups)
TINY_PATIENTS = [
    (1, ["Cardiomegaly", "Cardiomegaly|Emphysema", "Cardiomegaly|Effusion"]),
    (2, ["No Finding"]),
    (3, ["Hernia", "Hernia", "Infiltration|Hernia", "No Finding"]),
    (4, ["Mass|Nodule", "No Finding"]),
    (5, ["No Finding", "Infiltration", "Infiltration"]),
    (6, ["Effusion", "Atelectasis|Effusion"]),
    (7, ["No Finding"]),
    (8, ["Pleural_Thickening", "Atelectasis", "Edema"]),
    (9, ["Pneumothorax", "Fibrosis", "No Finding"]),
    (10, ["Pneumonia|Consolidation", "No Finding"]),
]
TINY_TEST_PATIENTS = (3, 6, 8)


LONG = bool(os.environ.get("CHEXLIB_LONG"))
# One thread each, as `make test` runs two processes at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

# The files that take longest come first, so that two processes end at about the same time.
LONGEST = (
    "test_notebooks",
    "test_faults",
    "test_distributed",
    "test_sweep",
    "test_cross_validation",
    "test_explain",
)


def pytest_collection_modifyitems(items):
    """The long tier is run by `make test-long`, which sets CHEXLIB_LONG."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )
    if not LONG:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="of the long tier: make test-long"))


@pytest.fixture
def tiny_nih(tmp_path):
    """A function that writes 24 images of 10 patients in the NIH layout and returns the folder."""

    def write(
        name: str = "tiny",
        *,
        edition: str = "v2020",
        side: int = 32,
        images: str = "images_001/images",
    ) -> Path:
        root = tmp_path / name
        (root / images).mkdir(parents=True)
        old, rng = edition == "2017", np.random.default_rng(0)
        lists = {"train_val_list.txt": [], "test_list.txt": []}
        rows = []
        for patient, follow_ups in TINY_PATIENTS:
            for follow_up, labels in enumerate(follow_ups):
                image = f"{patient:08d}_{follow_up:03d}.png"
                age, sex = 40 + patient + follow_up, "MF"[patient % 2]
                cells = [image, labels, follow_up, patient, f"{age:03d}Y" if old else age, sex]
                cells += [
                    "AP" if follow_up % 2 else "PA",
                    2682,
                    2749,
                    0.143,
                    0.143,
                    *([""] if old else []),
                ]
                rows.append(",".join(map(str, cells)))
                lists[
                    "test_list.txt" if patient in TINY_TEST_PATIENTS else "train_val_list.txt"
                ].append(image)
                Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(
                    root / images / image
                )
        header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        header += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]" + (
            "," if old else ""
        )
        csv = "Data_Entry_2017.csv" if old else "Data_Entry_2017_v2020.csv"
        (root / csv).write_text("\n".join([header, *rows]) + "\n")
        boxes = ["Image Index,Finding Label,Bbox [x,y,w,h]" + (",,," if old else "")]
        boxes += [
            row + (",,," if old else "")
            for row in (
                "00000005_001.png,Infiltrate,256,512,128,64",
                "00000001_000.png,Cardiomegaly,102.4,0,512,1024",
            )
        ]
        (root / "BBox_List_2017.csv").write_text("\n".join(boxes))
        for file, names in lists.items():
            (root / file).write_text("\n".join(names) + "\n")
        return root

    return write


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """Decoded images are not kept among the project's own; child processes inherit it."""
    os.environ["CHEXLIB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def without_tensorflow(monkeypatch):
    """Engines that train nothing start in half of the processor's time: mpi4py joins them, and they
    need no TensorFlow. In the long tier what joins them is Horovod, where it is built.
    """
    if not LONG:
        monkeypatch.setenv("CHEXLIB_COLLECTIVES", "mpi4py")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Paths of 11 random grey images of 24 x 24 pixels, and their pixels."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (11, 24, 24), np.uint8)
    paths = [str(folder / f"{i}.png") for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths, pixels


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """90 images of 32 pixels in the NIH layout."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return write_phantom(folder, n_images=90, size=32, min_prevalence=0.1, workers=1)


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """A `model.keras` of a quarter VGG-16, untrained, for 32-pixel radiographs, in
    `run/03_train_baseline`.
    """
    from chexlib.models.weights import create_model, save_model

    folder = tmp_path_factory.mktemp("runs") / "run" / "03_train_baseline"
    folder.mkdir(parents=True)
    network = {"topology": "vgg16", "width": 0.25, "stem": "small", "size": 32}
    card = {**network, "split": {"name": "patient"}}
    return save_model(create_model(**network, seed=1), folder / "model.keras", card=card)


@pytest.fixture(scope="module")
def tiny_network():
    """Every topology is one convolution with batch norm in this module."""
    from small_training import with_a_tiny_network

    with pytest.MonkeyPatch.context() as patch:
        with_a_tiny_network(patch)
        yield


@pytest.fixture(autouse=True)
def own_log():
    """Each test starts with chexlib's loggers untouched: what an earlier one set must not hide
    lines from it.
    """
    for name in [
        name for name in logging.root.manager.loggerDict if name.split(".")[0] == "chexlib"
    ]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
