"""Cache of decoded radiographs: 8-bit pixels, resized once and found by their files' content.

A cache folder holds pairs of files: `<name>.pixels`, images of size x size bytes one after another,
and `<name>.parquet`, a row per image: a key made of its file's name and what the system says of it
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
import pyarrow.parquet as pq
from PIL import Image
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from chexlib.data.nih import first_few, read_bytes, read_image
from chexlib.errors import DataError, first_line
from chexlib.files import ROOT, atomic_write, writing_to
from chexlib.machine import cores

FOLDER = "CHEXLIB_CACHE"  # the environment variable that names another folder than data/cache
VERSION = 5  # of the files' layout and of how pixels are made: a new one begins a new cache
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
SKIP = "With skip_broken=True a training leaves such images out."
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
    """Radiographs as (size, size) uint8 pixels from the cache; what it lacks is decoded and added.

    Pixels are read when they are asked for, and it is the system that keeps them in memory where
    there is room; only the index is held here.

    Parameters
    ----------
    paths : sequence of str
        Image files, in the order of the indices.
    size : int
        Side in pixels after area-resizing.
    gather : callable, optional
        Ranks that open the same images together: `World.allgather_object`. One rank of each cache folder
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
        self.paths = [os.path.abspath(path) for path in paths]
        self.size = size
        self.folder = cache_folder(size)
        # Names of pairs; indexes hold their numbers, which take no memory to speak of.
        self._files: list[str] = []
        step = f"Make room, or name another folder in the environment variable {FOLDER}."
        with writing_to(f"the cache in {self.folder}", step):
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self._complete(gather, progress)
        self._file_of = index["pixels"].to_numpy()
        self._rows = index["row"].to_numpy()
        self._crcs = index["crc"].to_numpy()
        self._indexes = index["index"].to_numpy()
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
                name = self._files[self._file_of[index]]
                log.warning("%s.pixels is damaged: %s is decoded anew.", name, self.paths[index])
                image[:] = content(self.paths[index], self.size)[1]
        return pixels

    def _read(self, image: np.ndarray, index: int) -> bool:
        """Fill `image` from the cache. False if what is there is not what was written."""
        number = self._file_of[index]
        try:
            if number not in self._open:
                path = self.folder / f"{self._files[number]}.pixels"
                # A link is nothing of ours, and a pipe would never answer.
                self._open[number] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            start = int(self._rows[index]) * image.size
            read = os.preadv(self._open[number], [image], start)
            if read == image.size:
                if not self._sound[index]:  # checked once in this process
                    self._sound[index] = zlib.crc32(image) == self._crcs[index]
                if self._sound[index]:
                    return True
        except OSError as error:
            log.warning("%s", error)
        # The next store finds the images of these indexes missing, and decodes them.
        for pair in {self._indexes[index], number}:
            (self.folder / f"{self._files[pair]}.parquet").unlink(missing_ok=True)
        return False

    def _complete(self, gather: Callable, progress: bool) -> pd.DataFrame:
        """Add what the cache lacks, in rounds, so that no rank waits long for another.

        Returns the rows of the index in the order of the paths.
        """
        builders, builder = self._builders(gather)
        tables: dict[str, pd.DataFrame] = {}
        keys = np.fromiter(map(_key, self.paths), np.uint64, len(self.paths))
        wanted = pd.DataFrame({"key": keys})
        title = f"decoding to {self.size} px"
        with (
            ThreadPoolExecutor(cores()) as pool,
            tqdm(desc=title, unit="image", disable=not progress, leave=False) as bar,
        ):
            while True:
                index = self._index(tables)
                rows = wanted.merge(index.drop_duplicates("key", keep="last"), how="left")
                missing = wanted[rows["digest"].isna().to_numpy()].drop_duplicates()
                if not any(gather(len(missing))):
                    break
                bar.total = bar.n + len(missing)
                added, error = 0, None
                if builder is not None:
                    try:
                        added = self._add(pool, missing.iloc[builder::builders], index)
                    except (DataError, OSError) as reason:
                        error = reason
                outcomes = gather((added, error))
                for _, error in outcomes:
                    if error is not None:
                        raise error
                total = sum(added for added, _ in outcomes)
                bar.update(total)
                if not total:
                    time.sleep(0.5)  # a file system that is slow to show another host's files
        self._sweep(index)
        if builder == 0:
            self._warn_of_dark(rows["dark"].to_numpy(bool))
        return rows

    def _warn_of_dark(self, dark: np.ndarray) -> None:
        if dark.any():
            named = first_few([self.paths[index] for index in np.flatnonzero(dark)])
            log.warning(
                f"{dark.sum():,} of {len(dark):,} images are very dark, 95 % of each below {DARK} "
                f"of 255 grey levels: {named}. Perhaps films of fewer bits were converted as if they "
                "had 16. Export them again, or training suffers."
            )

    def _builders(self, gather: Callable) -> tuple[int, int | None]:
        """How many ranks build in this folder, one of each host, and which of them this one is, if
        it is one.
        """
        mark = self.folder / "id"
        if not mark.exists():
            with atomic_write(mark) as file:
                file.write(uuid.uuid4().hex.encode())
        gather(None)  # now all have written it, and the last one counts
        folder, host, pid = mark.read_bytes(), os.uname().nodename, os.getpid()
        first: dict[str, int] = {}
        for other_folder, other_host, other_pid in gather((folder, host, pid)):
            if other_folder == folder:
                first.setdefault(other_host, other_pid)
        builder = list(first).index(host) if first[host] == pid else None
        return len(first), builder

    def _index(self, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """All rows of the folder, pairs of files by number; `tables` keeps what was read before."""
        for path in self.folder.glob("*.parquet"):
            if path.name not in tables and path.is_file() and not path.is_symlink():
                try:
                    rows = _read_index(path)
                except FileNotFoundError:  # removed since, as damaged
                    continue
                except DataError as error:
                    log.warning("%s Its images are decoded anew.", error)
                    path.unlink(missing_ok=True)
                    continue
                number_of = {name: self._number(name) for name in rows["pixels"].unique()}
                tables[path.name] = rows.assign(
                    pixels=rows["pixels"].map(number_of), index=self._number(path.stem)
                )
        kinds = {**_COLUMNS, "pixels": np.int64, "index": np.int64}
        empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})
        return pd.concat([empty, *tables.values()], ignore_index=True)

    def _number(self, name: str) -> int:
        """The number of a pair of files, given by its name."""
        if name not in self._files:
            self._files.append(name)
        return self._files.index(name)

    def _sweep(self, index: pd.DataFrame) -> None:
        """Remove pixels that no index knows, an hour after a builder died or they were found
        damaged.
        """
        used = {self._files[number] for number in index["pixels"].unique()}
        for path in self.folder.glob(f"{'[0-9a-f]' * 32}.pixels"):
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in used and time.time() - path.stat().st_mtime > 3600:
                    path.unlink()

    def _add(self, pool: ThreadPoolExecutor, missing: pd.DataFrame, index: pd.DataFrame) -> int:
        """Write one pair of files with as many of the missing images as a round gives time for.

        Returns their number.
        """
        until = time.monotonic() + ROUND
        name = uuid.uuid4().hex
        kept = index.drop_duplicates("digest").set_index("digest")
        kept = kept[["pixels", "row", "crc", "dark"]]
        rows, written = [], 0
        with atomic_write(self.folder / f"{name}.pixels") as file:
            for start in range(0, min(len(missing), _ROWS), _CHUNK):
                chunk = missing.iloc[start : start + _CHUNK]
                paths = [self.paths[i] for i in chunk.index]
                contents = pool.map(lambda path: content(path, self.size, kept.index), paths)
                for key, (digest, pixels) in zip(chunk["key"], contents, strict=True):
                    if pixels is None:
                        number, *position = kept.loc[digest]
                        rows.append((key, digest, self._files[number], *position))
                        continue
                    file.write(pixels)
                    crc = zlib.crc32(pixels)
                    rows.append((key, digest, name, written, crc, too_dark(pixels)))
                    written += 1
                if time.monotonic() > until:
                    break
        table = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)
        with atomic_write(self.folder / f"{name}.parquet") as file:
            table.to_parquet(file, index=False)
        if not written:
            (self.folder / f"{name}.pixels").unlink()
        return len(rows)


def _read_index(path: Path) -> pd.DataFrame:
    """The rows of an index, as they are written; FileNotFoundError, or DataError if it is damaged."""
    try:
        if pq.read_metadata(path).num_rows > _ROWS:
            raise ValueError("it has more rows than a round writes")
        rows = pd.read_parquet(path, columns=list(_COLUMNS)).astype(_COLUMNS)
        if not rows["pixels"].str.fullmatch(r"[0-9a-f]{32}").all():
            raise ValueError("it names files that are none of the cache")
        if not rows["row"].between(0, _ROWS).all():
            raise ValueError("it names rows that no file has")
    except FileNotFoundError:
        raise
    except Exception as error:  # Arrow and pandas raise many kinds
        raise DataError(f"{path} is damaged ({first_line(error)}).") from error
    return rows


def content(path: str, size: int, known=()) -> tuple[int, np.ndarray | None]:
    """64 bits of a digest of the file, and its pixels of shape (size, size), uint8, unless the
    digest is `known`.
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {first_line(error)}. Copy it again, or leave it out. {SKIP}"
        ) from error
    digest = _digest(data)
    if digest in known:
        return digest, None
    try:
        return digest, resize_area(read_image(path, data), size)
    except DataError as error:
        raise DataError(f"{error} {SKIP}") from error


def _key(path: str) -> int:
    """64 bits of a file's name and what the system says of it; no change of its content leaves them
    as they were.
    """
    try:
        facts = os.stat(path)
        state = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"
    except OSError:
        state = "missing"  # and said so when it is read
    return _digest(f"{path}\0{state}".encode())


def _digest(data: bytes) -> int:
    """64 bits: that two of the release's 112,120 files agree by chance is as likely as 3 in 10,000
    million.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
