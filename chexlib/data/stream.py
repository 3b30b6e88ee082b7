"""Endless stream of labelled phantom radiographs for pre-training, drawn while a network trains.

No image comes twice. Drawing a film from nothing costs milliseconds, most of them Python's. So each
patient here is drawn once and taken `views` times, each time in another position, exposure and
grain, the views of a patient `PATIENTS` images apart. Image number i is a pure function of
(seed, i): the same with any number of processes and ranks, and from any image on.

Patients are other ones than those of `write_phantom` with the same seed, so that what was
pre-trained here can be judged there.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
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
from chexlib.stopping import end_with_parent

FIRST_PATIENT = 10**8  # write_phantom has at most 10^7
PATIENTS = 32  # in turn: each batch of up to so many images shows as many patients
VIEWS = 8  # of a patient; fewer are more patients for the same images, and slower
TASK = PATIENTS * VIEWS  # images that a worker draws at a time
NO_PROCESS = (
    "a process that draws the phantom stream could not be started, or was killed. A script needs "
    "an `if __name__ == '__main__':` guard; use fewer processors if memory is short."
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
    level = level_of(difficulty)
    clean = replace(level, noise=0.0)  # each view has a grain of its own

    @functools.cache
    def drawn(patient):
        films = sample_patient(seed, patient, difficulty=difficulty, min_prevalence=min_prevalence)
        image = render(films[0], size=size, difficulty=clean)[0]
        return Image.fromarray(image), [finding in films[0].findings for finding in FINDINGS]

    pixels = np.empty((len(indices), size, size), np.uint8)
    labels = np.empty((len(indices), len(FINDINGS)), np.uint8)
    for k, index in enumerate(indices):
        block, position = divmod(int(index), PATIENTS * views)
        view, patient = divmod(position, PATIENTS)
        patient += FIRST_PATIENT + block * PATIENTS
        image, labels[k] = drawn(patient)
        rng = stream(seed, patient, 7, view)
        pixels[k] = _expose(image, rng, level.noise)
        if mirror and rng.random() < 0.5:
            pixels[k] = pixels[k, :, ::-1].copy()
    return pixels, labels


def _expose(image: Image.Image, rng, noise: float) -> np.ndarray:
    """One more exposure of a drawn film: another position, gain, contrast and grain."""
    size = image.width
    turn = np.radians(2.0 * rng.normal())
    zoom = np.exp(0.05 * rng.normal())
    c, s = np.cos(turn) * zoom, np.sin(turn) * zoom
    shift = size * 0.03 * rng.normal(size=2) + size / 2
    affine = (c, -s, shift[0] - (c - s) * size / 2, s, c, shift[1] - (s + c) * size / 2)
    moved = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    gain = np.exp(0.08 * rng.normal())
    gamma = np.exp(0.12 * rng.normal())
    curve = 255 * (gain * np.arange(256) / 255) ** gamma
    grey = curve.astype(np.float32)[np.asarray(moved)]
    grain = np.float32(noise * np.exp(0.25 * rng.normal()))
    deviation = grain * (np.float32(153) + np.float32(0.7) * grey)
    grey += rng.standard_normal(grey.shape, dtype=np.float32) * deviation
    return np.clip(grey + np.float32(0.5), 0, 255).astype(np.uint8)


def stream_batches(
    *,
    size: int,
    global_batch: int,
    seed: int,
    first_image: int = 0,
    rank: int = 0,
    ranks: int = 1,
    **drawing,
):
    """Endless tf.data of a rank's batches of the stream, in the form of `training_batches`.

    Processes, one per core that this one may use, draw ahead while the network trains. They end
    with this process, however it ends. A script that calls this needs an
    `if __name__ == "__main__":` guard.

    Parameters
    ----------
    size : int
        Pixels per side, 32 to 1024.
    global_batch : int
        Images of a step, of all ranks together; the ranks share them as `partition` does.
    first_image : int
        Where to begin: how many images were used, by all ranks together.
    drawing
        `difficulty`, `min_prevalence` and `mirror` of `stream_images`.

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
    for name, value, low, high in (
        ("size", size, 32, 1024),
        ("global_batch", global_batch, ranks, 10**6),
        ("first_image", first_image, 0, 2**62),
        ("seed", seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value!r} is not from {low} to {high}. Choose one of these.")
    level_of(drawing.get("difficulty", "standard"))
    # A worker that reads a script without a guard comes here again. It ends before TensorFlow is
    # loaded.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(NO_PROCESS)
    import tensorflow as tf

    def batches():
        shares = _shares(global_batch, first_image, rank, ranks)
        steps = max(1, TASK * ranks // global_batch)
        for pixels, labels in _drawn(shares, steps, {"seed": seed, "size": size, **drawing}):
            yield pixels[..., None], labels, np.ones(len(pixels), np.float32)

    def load(pixels, labels, weights):
        return tf.cast(pixels, tf.float32), tf.cast(labels, tf.float32), weights

    signature = (
        tf.TensorSpec([None, size, size, 1], tf.uint8),
        tf.TensorSpec([None, len(FINDINGS)], tf.uint8),
        tf.TensorSpec([None], tf.float32),
    )
    return dataset_from(batches, signature, load)


def _shares(global_batch: int, first_image: int, rank: int, ranks: int) -> Iterator[np.ndarray]:
    """Numbers of the images of a rank in each step."""
    for start in itertools.count(first_image, global_batch):
        yield np.array_split(np.arange(start, start + global_batch), ranks)[rank]


def _drawn(shares: Iterator[np.ndarray], steps: int, settings: dict):
    """Yield (pixels, labels) of each share, in order, drawn ahead in processes, `steps` shares a
    task.
    """
    workers = cores()
    # Not fork: this process has threads of TensorFlow, maybe MPI.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent)
    ahead = deque()
    try:
        while True:
            while len(ahead) <= workers:
                task = list(itertools.islice(shares, steps))
                ends = np.cumsum([len(share) for share in task])[:-1]
                ahead.append((ends, pool.submit(stream_images, np.concatenate(task), **settings)))
            ends, job = ahead.popleft()
            pixels, labels = job.result()
            yield from zip(np.split(pixels, ends), np.split(labels, ends), strict=True)
    except BrokenProcessPool as error:
        raise DataError(NO_PROCESS) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
