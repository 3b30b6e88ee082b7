"""Radiographs decoded and resized once, and kept as 8-bit pixels that are found by the content of
their files.

A cache folder holds pairs of files: `<name>.pixels`, images of size x size bytes one after another,
and `<name>.parquet`, a row an image: a key made of its file's name and what the system says of it
(bytes, times, inode), a digest of the file's content, and where the pixels are, with their CRC-32.
A file that is as it was is found by its key; one that was copied or touched is read and found by
its content; one that was changed has another content, so that stale pixels are never read. Every
pair is written atomically: a build that was killed goes on with the next image.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from chexlib.data.nih import first_few, read_image
from chexlib.errors import DataError
from chexlib.files import ROOT, replacing
from chexlib.machine import cores

FOLDER = "CHEXLIB_CACHE"  # the environment variable that names another folder than data/cache
VERSION = 4  # of the files' layout and of how pixels are made: a new one begins a new cache
ROUND = 5.0  # seconds after which a pair of files is closed and kept
_ROWS = 1024  # images after which it is too, so that a build's memory does not grow with them
_CHUNK = 64  # images decoded at a time
_COLUMNS = {
    "key": np.uint64,
    "digest": np.uint64,
    "pixels": str,
    "row": np.int64,
    "crc": np.uint32,
    "dark": bool,
}
DARK = 100  # grey levels; an image of fewer bits than its file says has 95 % below
log = logging.getLogger(__name__)


def resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """Resize (h, w) uint8 pixels to (size, size): each pixel is the mean of the area it covers.

    A pixel that lies in the area by a part counts by that part. Pillow's box filter takes such a
    pixel whole or not at all, so it serves only where `size` divides the sides, or they divide it.
    """
    if image.shape == (size, size):
        return image
    if all(side % size == 0 or size % side == 0 for side in image.shape):
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
    rows, columns = (_shares(side, size) for side in image.shape)
    means = columns @ np.ascontiguousarray((rows @ image.astype(np.float32)).T)
    return np.rint(means.T, order="C").astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _shares(side: int, size: int) -> csr_array:
    """Which share of each output pixel each input pixel covers: (size, side) float32, rows sum to
    1.

    In units in which all edges are whole numbers, an input pixel is `size` long and an output pixel
    `side`. Between two neighbouring edges, of either kind, lie one input and one output pixel.
    """
    edges = np.union1d(np.arange(side + 1) * size, np.arange(size + 1) * side)
    starts, lengths = edges[:-1], np.diff(edges)
    share = (lengths / side).astype(np.float32)
    return csr_array((share, (starts // side, starts // size)), shape=(size, side))


def too_dark(image: np.ndarray) -> bool:
    """Whether 95 % of an image, averaged to 16 x 16 px, are below `DARK`.

    The brightest 5 % of each of 1,435 NIH radiographs and 1,200 phantoms have 143 or more. Images
    of 14 bits that were converted as if of 16 have less than 64.
    """
    small = resize_area(image, 16)
    return int(np.partition(small, -13, axis=None)[-13]) < DARK


def cache_folder(size: int) -> Path:
    """Where images of this size are kept: in data/cache, or where CHEXLIB_CACHE says."""
    return Path(os.environ.get(FOLDER) or ROOT / "data" / "cache") / f"v{VERSION}-{size}px"


class ImageStore:
    """Radiographs as (size, size) uint8 pixels, from the cache, which is built as far as it lacks
    them.

    Pixels are read when they are asked for, and it is the system that keeps them in memory where
    there is room; only the index is held here.

    Parameters
    ----------
    paths : sequence of str
        Image files, in the order of the indices.
    size : int
        Side in pixels after area-resizing.
    gather : callable, optional
        Ranks that open the same images together: `World.gather`. One rank of each cache folder
        builds, and the hosts that share a folder divide the images.
    progress : bool
        Show a bar while images are decoded.

    Raises
    ------
    DataError
        An image cannot be read, or the cache cannot be written.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        size: int,
        gather: Callable = lambda value: [value],
        progress: bool = False,
    ):
        self.paths, self.size = [os.path.abspath(path) for path in paths], size
        self.folder = cache_folder(size)
        # Names of pairs; indexes hold their numbers, which take no memory to speak of.
        self._files: list[str] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self._complete(gather, progress)
        except OSError as error:
            raise DataError(
                f"the cache in {self.folder} cannot be written ({error.strerror or error}). Make "
                f"room, or name another folder in the environment variable {FOLDER}."
            ) from error
        names = ("pixels", "row", "crc", "index")
        self._file_of, self._rows, self._crcs, self._indexes = (
            index[name].to_numpy() for name in names
        )
        self._sound = np.zeros(len(self.paths), bool)
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __del__(self):
        for descriptor in getattr(self, "_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """Pixels of `indices`, shape (k, size, size) uint8."""
        pixels = np.empty((len(indices), self.size, self.size), np.uint8)
        for image, index in zip(pixels, indices, strict=True):
            if not self._read(image, index):
                pixels_of = f"{self._files[self._file_of[index]]}.pixels"
                log.warning("%s is damaged: %s is decoded anew.", pixels_of, self.paths[index])
                image[:] = content(self.paths[index], self.size)[1]
        return pixels

    def _read(self, image: np.ndarray, index: int) -> bool:
        """Fill `image` from the cache. False if what is there is not what was written."""
        number, count = self._file_of[index], image.size
        try:
            if number not in self._open:
                self._open[number] = os.open(
                    self.folder / f"{self._files[number]}.pixels", os.O_RDONLY
                )
            read = os.preadv(self._open[number], [image], int(self._rows[index]) * count)
            if read == count and (self._sound[index] or zlib.crc32(image) == self._crcs[index]):
                self._sound[index] = True  # checked once in this process
                return True
        except OSError as error:
            log.warning("%s", error)
        # The next store finds the images of these indexes missing, and decodes them.
        for pair in {self._indexes[index], number}:
            (self.folder / f"{self._files[pair]}.parquet").unlink(missing_ok=True)
        return False

    def _complete(self, gather: Callable, progress: bool) -> pd.DataFrame:
        """Add what the cache lacks, in rounds, so that no rank waits long for another.

        Gives a row an image.
        """
        builders, place = self._builders(gather)
        known: dict[str, pd.DataFrame] = {}
        with (
            ThreadPoolExecutor(cores()) as pool,
            tqdm(
                desc=f"decoding to {self.size} px", unit="image", disable=not progress, leave=False
            ) as bar,
        ):
            wanted = pd.DataFrame(
                {"key": np.fromiter(map(_key, self.paths), np.uint64, len(self.paths))}
            )
            while True:
                index = self._index(known)
                found = wanted.merge(index.drop_duplicates("key", keep="last"), how="left")
                missing = wanted[found["digest"].isna().to_numpy()].drop_duplicates()
                if not any(gather(len(missing))):
                    self._sweep(index)
                    if place == 0:
                        self._doubt(found["dark"].to_numpy(bool))
                    return found
                bar.total = bar.n + len(missing)
                added, error = 0, None
                if place is not None:
                    try:
                        added = self._add(pool, missing.iloc[place::builders], index)
                    except (DataError, OSError) as reason:
                        error = reason
                told = gather((added, error))
                for _, error in told:
                    if error is not None:
                        raise error
                bar.update(sum(count for count, _ in told))
                if not any(count for count, _ in told):
                    time.sleep(0.5)  # a file system that is slow to show another host's files

    def _doubt(self, dark: np.ndarray) -> None:
        """Tell of images that are too dark, each time they are opened."""
        if dark.any():
            named = first_few([self.paths[index] for index in np.flatnonzero(dark)])
            log.warning(
                f"{dark.sum():,} of {len(dark):,} images are very dark, 95 % of each below {DARK} "
                f"of 255 grey levels: {named}. Were films of fewer bits converted as if of 16? "
                "Export them again, or training suffers."
            )

    def _builders(self, gather: Callable) -> tuple[int, int | None]:
        """How many ranks build in this folder, one of each host, and which of them this one is, if
        it is one.
        """
        mark, me = self.folder / "id", (os.uname().nodename, os.getpid())
        if not mark.exists():
            with replacing(mark) as file:
                file.write(uuid.uuid4().hex.encode())
        gather(None)  # now all have written it, and the last one counts
        first: dict[str, tuple] = {}
        for folder, host, pid in gather((mark.read_text(), *me)):
            if folder == mark.read_text():
                first.setdefault(host, (host, pid))
        builders = list(first.values())
        return len(builders), builders.index(me) if me in builders else None

    def _index(self, known: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """All rows of the folder, pairs of files by number; `known` keeps what was read before."""
        for path in self.folder.glob("*.parquet"):
            if path.name not in known:
                with contextlib.suppress(FileNotFoundError):  # removed since, as damaged
                    rows = pd.read_parquet(path)
                    self._files += [
                        name
                        for name in {path.stem, *rows["pixels"].unique()}
                        if name not in self._files
                    ]
                    pixels = rows["pixels"].map(
                        {name: number for number, name in enumerate(self._files)}
                    )
                    known[path.name] = rows.assign(
                        pixels=pixels, index=self._files.index(path.stem)
                    )
        kinds = {**_COLUMNS, "pixels": np.int64, "index": np.int64}
        empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})
        return pd.concat([empty, *known.values()], ignore_index=True)

    def _sweep(self, index: pd.DataFrame) -> None:
        """Remove pixels that no index knows, an hour after a builder died or they were found
        damaged.
        """
        used = {self._files[number] for number in index["pixels"].unique()}
        for path in self.folder.glob("*.pixels"):
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in used and time.time() - path.stat().st_mtime > 3600:
                    path.unlink()

    def _add(self, pool: ThreadPoolExecutor, missing: pd.DataFrame, index: pd.DataFrame) -> int:
        """Write one pair of files with as many of the missing images as a round gives time for.

        Gives their number.
        """
        until, rows, name = time.monotonic() + ROUND, [], uuid.uuid4().hex
        places = index.drop_duplicates("digest").set_index("digest")[
            ["pixels", "row", "crc", "dark"]
        ]
        with replacing(self.folder / f"{name}.pixels") as file:
            written = 0
            for start in range(0, min(len(missing), _ROWS), _CHUNK):
                chunk = missing.iloc[start : start + _CHUNK]
                contents = pool.map(
                    lambda i: content(self.paths[i], self.size, places.index), chunk.index
                )
                for key, (digest, pixels) in zip(chunk["key"], contents, strict=True):
                    if pixels is None:
                        pair, *kept = places.loc[digest]
                        rows.append((key, digest, self._files[pair], *kept))
                    else:
                        file.write(pixels)
                        rows.append(
                            (key, digest, name, written, zlib.crc32(pixels), too_dark(pixels))
                        )
                        written += 1
                if time.monotonic() > until:
                    break
        with replacing(self.folder / f"{name}.parquet") as file:
            pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS).to_parquet(
                file, index=False
            )
        if not written:
            (self.folder / f"{name}.pixels").unlink()
        return len(rows)


def content(path: str, size: int, known=()) -> tuple[int, np.ndarray | None]:
    """64 bits of a digest of the file, and its pixels of shape (size, size), uint8, unless the
    digest is `known`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    digest = _digest(data)
    return digest, None if digest in known else resize_area(read_image(path, data), size)


def _key(path: str) -> int:
    """64 bits of a file's name and what the system says of it; no change of its content leaves them
    as they were.
    """
    try:
        found = os.stat(path)
        state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    except OSError:
        state = "missing"  # and said so when it is read
    return _digest(f"{path}\0{state}".encode())


def _digest(data: bytes) -> int:
    """64 bits: that two of the release's 112,120 files agree by chance is as likely as 3 in 10,000
    million.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
