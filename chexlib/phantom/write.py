"""Synthetic frontal chest radiographs in the layout of the NIH release, so that everything runs
with no data.

Who is on the films is sampled after the NIH table (`population.py`). Pictures are drawn (`film.py`,
from `anatomy.py` and `signs.py`), not learnt: they show no person, and say nothing about one.
"""

import contextlib
import json
import logging
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from chexlib.errors import ConfigError, DataError
from chexlib.files import ROOT, file_lock, read_json, writing_to
from chexlib.findings import FINDINGS, NO_FINDING
from chexlib.machine import cores
from chexlib.phantom.film import render
from chexlib.phantom.population import (
    REPEAT,
    Description,
    Difficulty,
    level_of,
    sample_patient,
    stream,
)
from chexlib.stopping import end_with_parent

log = logging.getLogger(__name__)

VERSION = 3  # of the generator: raised whenever the same parameters give other pictures
BAR = {"desc": "phantom", "unit_scale": 32, "unit": "image", "leave": False, "mininterval": 1}
KEPT_SIZE = 128  # side in pixels of `kept_phantom`
KEPT_PREVALENCE = 0.04  # of every finding there, at least
TEST_SHARE = 0.228  # images in the official test list: 25,596 of 112,120
COLUMNS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View "
    "Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def phantom_images(
    seed, *, size=128, difficulty="standard", min_prevalence=0.0
) -> Iterator[tuple[np.ndarray, Description]]:
    """Endless labelled radiographs, without files: yields (uint8 (size, size), Description)."""
    for patient in count(1):
        for d in sample_patient(
            seed, patient, difficulty=difficulty, min_prevalence=min_prevalence
        ):
            yield render(d, size=size, difficulty=difficulty)[0], d


def kept_phantom(*, images: int, difficulty: str, seed: int, repeat: float = REPEAT) -> Path:
    """A phantom below `data/phantom`, made if missing, of `KEPT_SIZE` px.

    Every finding is in at least `KEPT_PREVALENCE` of its images: with the release's own prevalence,
    12,000 images have seven hernias to test on. `repeat` is as for `write_phantom`.
    """
    name = f"v{VERSION}-{difficulty}-{images}x{KEPT_SIZE}px-seed{seed}-enriched"
    if repeat != REPEAT:
        name += f"-repeat{repeat:g}"
    folder = ROOT / "data" / "phantom" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {"n_images": images, "size": KEPT_SIZE, "difficulty": difficulty, "seed": seed}
    return write_phantom(folder, **settings, min_prevalence=KEPT_PREVALENCE, repeat=repeat)


def write_phantom(
    directory,
    *,
    n_images=2000,
    size=128,
    seed=0,
    difficulty="standard",
    min_prevalence=0.0,
    repeat=REPEAT,
    workers=None,
) -> Path:
    """Write a synthetic data set in the layout of the NIH release.

    Made in a temporary folder beside `directory` and renamed at the end: an interrupt leaves
    nothing behind, and what a killed process left is removed by the next phantom beside it.
    While another process is making it, this one waits. The same parameters give the same bytes,
    with any number of workers. A folder that already holds this phantom is left as it is. A script
    that calls this needs an `if __name__ == "__main__":` guard.

    Parameters
    ----------
    directory : path-like
    n_images : int
    size : int
        Pixels per side, 32 to 1024.
    seed : int
        Not negative.
    difficulty : {"easy", "standard", "hard"}
    min_prevalence : float
        Combinations of findings are re-weighted until each finding is expected in at least this
        fraction of the films, below 0.5. 0 keeps the prevalence of the NIH table (Hernia 0.2 %).
    repeat : float
        Probability from 0 to 1 that a follow-up has the findings of the film before.
    workers : int, optional
        Processes that draw; default: the cores this process may use.

    Returns
    -------
    Path
        `directory`, with the table, boxes of the labelled signs, two lists, pictures and
        `phantom.json`.

    Raises
    ------
    ConfigError
        A parameter outside what is accepted.
    DataError
        `directory` holds something else.
    """
    workers = cores() if workers is None else workers
    for name, value, low, high in (
        ("n_images", n_images, 1, 10**7),
        ("size", size, 32, 1024),
        ("seed", seed, 0, 2**63),
        ("workers", workers, 1, 1024),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(
                f"{name}={value!r} is not accepted. Use a whole number from {low} to {high}."
            )
    if not isinstance(min_prevalence, Real) or not 0 <= min_prevalence < 0.5:
        raise ConfigError(
            f"min_prevalence={min_prevalence!r} is not accepted. Use a number from 0 to below 0.5; "
            "0 keeps the prevalence of NIH."
        )
    if not isinstance(repeat, Real) or not 0 <= repeat <= 1:
        raise ConfigError(
            f"repeat={repeat!r} is not accepted. Use a number from 0 to 1; in NIH it is {REPEAT}."
        )
    level = level_of(difficulty)
    parameters = {
        "version": VERSION,
        "n_images": int(n_images),
        "size": int(size),
        "seed": int(seed),
        "min_prevalence": float(min_prevalence),
        "difficulty": "custom" if isinstance(difficulty, Difficulty) else difficulty,
        "knobs": asdict(level),
    }
    if repeat != REPEAT:  # left out of those of before, which had no such parameter
        parameters["repeat"] = float(repeat)
    directory = Path(directory)
    _remove_drafts(directory.parent)
    if _holds(directory, parameters):
        return directory
    lock, drawn = directory.with_name(f".{directory.name[:40]}.lock"), (difficulty, workers)
    with writing_to(f"the phantom {directory}", "Make room, or name another folder."):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(lock, wait=False) as alone:
            if alone:
                return _make(directory, parameters, *drawn)
        log.info("another process makes %s: waiting for it", directory)
        with file_lock(lock):
            return _make(directory, parameters, *drawn)


def _remove_drafts(folder) -> None:
    """Remove what processes have left that were killed while they made a phantom in this folder."""
    for pictures in folder.glob(".*.partial/images_001"):
        draft = pictures.parent
        if name := re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.partial", draft.name):
            lock = folder / f".{name[1]}.lock"  # held by whoever is at work
            with contextlib.suppress(OSError), file_lock(lock, wait=False) as alone:
                if alone:
                    shutil.rmtree(draft, ignore_errors=True)


def _make(directory, parameters, difficulty, workers) -> Path:
    """Draw the phantom, unless the process that had the lock before has made it."""
    if _holds(directory, parameters):
        return directory
    n_images, size, seed = (parameters[name] for name in ("n_images", "size", "seed"))
    drawn = {name: parameters[name] for name in ("min_prevalence", "repeat") if name in parameters}
    films = _population(n_images, seed, difficulty=difficulty, **drawn)
    draft = directory.with_name(f".{directory.name[:40]}.{uuid4().hex[:8]}.partial")
    try:
        pictures = draft / "images_001" / "images"
        pictures.mkdir(parents=True)
        boxes = _draw_all(films, pictures, size, difficulty, workers)
        _write_tables(draft, films, boxes, parameters)
        try:
            draft.rename(directory)
        except OSError:  # it was made on another host, whose locks are not seen here
            if not _holds(directory, parameters):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("%d synthetic radiographs of %d px in %s", n_images, size, directory)
    return directory


def _holds(directory, parameters):
    """Whether the folder is this very phantom; DataError if it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        made_with = read_json(directory / "phantom.json").get("parameters")
    except DataError:
        made_with = None
    if made_with == parameters:
        return True
    what = "something other than a phantom"
    if isinstance(made_with, dict):
        every = {**made_with, **parameters}
        differing = [name for name in every if made_with.get(name) != parameters.get(name)]
        then, now = (
            ", ".join(f"{name}={told.get(name)}" for name in differing)
            for told in (made_with, parameters)
        )
        what = f"a phantom with {then}, and {now} was asked for"
    raise DataError(
        f"{directory} already holds {what}. Name another folder, or remove this one first."
    )


def _population(n_images, seed, **drawn):
    films = []
    for patient in count(1):
        films += sample_patient(seed, patient, **drawn)
        if len(films) >= n_images:
            return films[:n_images]


def _draw(films, pictures, size, difficulty):
    """Draw and write some films; returns their boxes. Runs in worker processes."""
    found = []
    for d in films:
        image, boxes = render(d, size=size, difficulty=difficulty)
        Image.fromarray(image).save(pictures / d.image, compress_level=1)
        found += [(d.image, *box) for box in boxes]
    return found


def _draw_all(films, pictures, size, difficulty, workers):
    """Boxes of all films, in the order of the films."""
    parts = [films[i : i + 32] for i in range(0, len(films), 32)]
    workers = min(workers, len(parts))
    if workers > 1:
        try:
            return _draw_in_processes(parts, pictures, size, difficulty, workers)
        # A script from standard input, or without the guard, cannot start processes.
        except BrokenProcessPool:
            log.warning("no worker process could be started: drawing in this one")
    boxes = []
    for part in tqdm(parts, **BAR):
        boxes += _draw(part, pictures, size, difficulty)
    return boxes


def _draw_in_processes(parts, pictures, size, difficulty, workers):
    # Not fork: the caller may have threads of TensorFlow or MPI.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        try:
            jobs = [pool.submit(_draw, part, pictures, size, difficulty) for part in parts]
            return [box for job in tqdm(jobs, **BAR) for box in job.result()]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_tables(folder, films, boxes, parameters):
    size = parameters["size"]
    spacing = round(350 / size, 4)  # mm: a film is about 35 cm wide
    rows = [COLUMNS]
    for d in films:
        labels = "|".join(d.findings) or NO_FINDING
        who = f"{d.follow_up},{d.patient},{d.age},{d.sex},{d.view}"
        rows.append(f"{d.image},{labels},{who},{size},{size},{spacing},{spacing}")
    _write(folder / "Data_Entry_2017_v2020.csv", rows)
    # The release's box file says `Infiltrate`, and its header names three columns that hold
    # nothing.
    rows = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for image, finding, *box in boxes:
        label = "Infiltrate" if finding == "Infiltration" else finding
        corner = ",".join(f"{1024 * side:.4f}" for side in box)
        rows.append(f"{image},{label},{corner},,,")
    _write(folder / "BBox_List_2017.csv", rows)
    test = _test_patients(films, parameters["seed"])
    training = [d.image for d in films if d.patient not in test]
    _write(folder / "train_val_list.txt", training)
    _write(folder / "test_list.txt", [d.image for d in films if d.patient in test])
    about = {
        "what": "Synthetic chest radiographs drawn by chexlib: they show no person. Not for "
        "clinical use.",
        "parameters": parameters,
        "repeat": parameters.get("repeat", REPEAT),
        "signs_shown": {f: sum(f in d.shown for d in films) for f in FINDINGS},
        "labelled": {f: sum(f in d.findings for d in films) for f in FINDINGS},
    }
    _write(folder / "phantom.json", [json.dumps(about, indent=2)])


def _test_patients(films, seed) -> set[int]:
    """Patients of the test list: `TEST_SHARE` of the films, as nearly as whole patients allow."""
    films_of, test = Counter(d.patient for d in films), set()
    room = round(TEST_SHARE * len(films))
    patients = stream(seed, 0, 6).permutation(films[-1].patient) + 1
    for patient in patients.tolist():
        if films_of[patient] <= room:
            test.add(patient)
            room -= films_of[patient]
    return test


def _write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
