"""Endless labelled phantom radiographs for pre-training, never the same image twice, drawn while
training eats them.

Drawing a film from nothing costs milliseconds, most of them Python's. So each patient here is drawn
once and taken `views` times, each time in another position, exposure and grain, the views of a
patient `PATIENTS` images apart. Image number i is a pure function of (seed, i): the same with any
number of workers and ranks, and from any place on.

Patients are other ones than those of `write_phantom` with the same seed, so that what was
pre-trained here can be judged there.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
from PIL import Image

from chexlib.data.pipeline import dataset_from
from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS
from chexlib.machine import cores
from chexlib.phantom.film import render
from chexlib.phantom.population import level_of, sample_patient, stream

FIRST_PATIENT = 10**8  # write_phantom has at most 10^7
PATIENTS = 32  # in turn: each batch of up to so many images shows as many patients
VIEWS = 8  # of a patient; fewer are more patients for the same images, and slower
TASK = PATIENTS * VIEWS  # images that a worker draws at a time
NO_PROCESS = (
    "a process that draws the phantom stream could not be started, or was killed. A script needs "
    "an `if __name__ == '__main__':` guard; use fewer workers if memory is short."
)


def stream_images(
    indices,
    *,
    seed: int,
    size: int,
    difficulty="standard",
    min_prevalence: float = 0.04,
    views: int = VIEWS,
    mirror: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images of these numbers.

    Parameters
    ----------
    indices : sequence of int
        Numbers of images in the stream, not negative, in any order.
    size : int
        Pixels per side.
    difficulty, min_prevalence
        As for `write_phantom`.
    views : int
        Images of each patient; with 1 every image is of another patient.
    mirror : bool
        Show each image mirrored with probability one half, as training does.

    Returns
    -------
    pixels : np.ndarray, (n, size, size) uint8
    labels : np.ndarray, (n, 14) uint8
    """
    level, drawn = level_of(difficulty), {}
    clean = replace(level, noise=0.0)  # each view has a grain of its own
    pixels, labels = (
        np.empty((len(indices), size, size), np.uint8),
        np.empty((len(indices), len(FINDINGS)), np.uint8),
    )
    for k, index in enumerate(indices):
        block, place = divmod(int(index), PATIENTS * views)
        view, patient = divmod(place, PATIENTS)
        patient += FIRST_PATIENT + block * PATIENTS
        if patient not in drawn:
            film = sample_patient(
                seed, patient, difficulty=difficulty, min_prevalence=min_prevalence
            )[0]
            drawn[patient] = Image.fromarray(render(film, size=size, difficulty=clean)[0]), film
        image, film = drawn[patient]
        rng = stream(seed, patient, 7, view)
        taken = _take(image, rng, level.noise)
        pixels[k] = taken[:, ::-1] if mirror and rng.random() < 0.5 else taken
        labels[k] = [finding in film.findings for finding in FINDINGS]
    return pixels, labels


def _take(image: Image.Image, rng, noise: float) -> np.ndarray:
    """One more exposure of a drawn film: another position, gain, contrast and grain."""
    size = image.width
    turn, zoom = np.radians(2.0 * rng.normal()), np.exp(0.05 * rng.normal())
    c, s = np.cos(turn) * zoom, np.sin(turn) * zoom
    shift = size * 0.03 * rng.normal(size=2) + size / 2
    affine = (c, -s, shift[0] - (c - s) * size / 2, s, c, shift[1] - (s + c) * size / 2)
    moved = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    gain, gamma = np.exp(0.08 * rng.normal()), np.exp(0.12 * rng.normal())
    grey = (255 * (gain * np.arange(256) / 255) ** gamma).astype(np.float32)[np.asarray(moved)]
    grain = np.float32(noise * np.exp(0.25 * rng.normal()))
    grey += rng.standard_normal(grey.shape, dtype=np.float32) * (
        grain * (np.float32(153) + np.float32(0.7) * grey)
    )
    return np.clip(grey + np.float32(0.5), 0, 255).astype(np.uint8)


def stream_batches(
    *,
    size: int,
    global_batch: int,
    seed: int,
    first_image: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int | None = None,
    **drawing,
):
    """Endless tf.data of a rank's batches of the stream, in the form of `training_batches`.

    Worker processes draw ahead while the network trains, and end with this process, however it
    ends. A script that calls this needs an `if __name__ == "__main__":` guard.

    Parameters
    ----------
    size : int
        Pixels per side, 32 to 1024.
    global_batch : int
        Images of a step, of all ranks together; the ranks share them as `partition` does.
    first_image : int
        Where to begin: how many images were used, by all ranks together.
    workers : int, optional
        Processes that draw; default: the cores this process may use.
    drawing
        `difficulty`, `min_prevalence`, `views` and `mirror` of `stream_images`.

    Returns
    -------
    tf.data.Dataset
        Of (pixels float32 (k, size, size, 1) in 0..255, labels float32 (k, 14), weights float32
        (k,), all 1).

    Raises
    ------
    ConfigError
        A setting outside what is accepted.
    DataError
        Called while a script without the guard is read by its own worker.
    """
    workers = cores() if workers is None else workers
    views = drawing.get("views", VIEWS)
    for name, value, low, high in (
        ("size", size, 32, 1024), ("workers", workers, 1, 1024), ("views", views, 1, 1024),
        ("global_batch", global_batch, ranks, 10**6), ("first_image", first_image, 0, 2**62), ("seed", seed, 0, 2**63),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ConfigError(f"{name}={value!r} is not from {low} to {high}. Choose one of these.")
    level_of(drawing.get("difficulty", "standard"))
    # A worker that reads a script without a guard comes here again. It ends before TensorFlow is
    # loaded.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(NO_PROCESS)
    import tensorflow as tf

    def batches():
        shares, steps = (
            _shares(global_batch, first_image, rank, ranks),
            max(1, TASK * ranks // global_batch),
        )
        for pixels, labels in _drawn(
            shares, steps, workers, {"seed": seed, "size": size, **drawing}
        ):
            yield pixels[..., None], labels, np.ones(len(pixels), np.float32)

    shapes = (
        ((None, size, size, 1), tf.uint8),
        ((None, len(FINDINGS)), tf.uint8),
        ((None,), tf.float32),
    )
    signature = tuple(tf.TensorSpec(*shape) for shape in shapes)
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = dataset_from(batches, signature)
    dataset = dataset.map(lambda x, y, w: (tf.cast(x, tf.float32), tf.cast(y, tf.float32), w))
    return dataset.prefetch(2).with_options(options)


def _shares(global_batch: int, first_image: int, rank: int, ranks: int) -> Iterator[np.ndarray]:
    for start in itertools.count(first_image, global_batch):
        yield np.array_split(np.arange(start, start + global_batch), ranks)[rank]


def _drawn(shares: Iterator[np.ndarray], steps: int, workers: int, settings: dict):
    """Yield (pixels, labels) of each share, in order, drawn ahead in processes, `steps` shares a
    task.
    """
    # Not fork: this process has threads of TensorFlow, maybe MPI.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_worker)
    ahead = deque()
    try:
        while True:
            while len(ahead) <= workers:
                task = list(itertools.islice(shares, steps))
                ends = np.cumsum([len(share) for share in task])[:-1]
                ahead.append((ends, pool.submit(stream_images, np.concatenate(task), **settings)))
            ends, job = ahead.popleft()
            yield from zip(*(np.split(array, ends) for array in job.result()), strict=True)
    except BrokenProcessPool as error:
        raise DataError(NO_PROCESS) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _worker() -> None:
    """An interrupt is the parent's to handle; its end, even by SIGKILL, is the worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
