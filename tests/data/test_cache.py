"""Pixels come from the cache as they were decoded, never from another image, whatever happens to
files and builders.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chexlib.data import cache
from chexlib.data.cache import ImageStore, cache_folder, resize_area
from chexlib.errors import DataError
from chexlib.models.predict import _read
from chexlib.phantom.write import phantom_images


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and a count of the images that are decoded."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    decoded, decode = [], cache.read_image
    monkeypatch.setattr(
        cache, "read_image", lambda path, data: decoded.append(path) or decode(path, data)
    )
    return decoded


def save(path, level, side=8):
    Image.fromarray(np.full((side, side), level, np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("factor", "shape"), [(2, (64, 64)), (4, (64, 64)), (8, (256, 256)), (3, (96, 96))]
)
def test_resizing_is_the_mean_over_blocks(factor, shape):
    image = np.random.default_rng(factor).integers(0, 256, shape, np.uint8)
    small = resize_area(image, shape[0] // factor)
    assert small.dtype == np.uint8
    blocks = image.reshape(shape[0] // factor, factor, shape[1] // factor, factor).mean((1, 3))
    # Rows, then columns are rounded to 8 bits: together at most one grey level.
    assert np.abs(small - blocks).max() <= 1


def area_means(image, size):
    """Pixel by pixel in float64: the mean of the area of each output pixel, with the parts of
    pixels at its edges.
    """

    def overlaps(side):
        edges = np.linspace(0, side, size + 1)
        return [
            {
                i: min(end, i + 1) - max(start, i)
                for i in range(int(start), min(side, int(np.ceil(end))))
            }
            for start, end in itertools.pairwise(edges)
        ]

    means = np.empty((size, size))
    for y, rows in enumerate(overlaps(image.shape[0])):
        for x, columns in enumerate(overlaps(image.shape[1])):
            parts = [(image[i, j], h * w) for i, h in rows.items() for j, w in columns.items()]
            means[y, x] = sum(float(value) * area for value, area in parts) / sum(
                area for _, area in parts
            )
    return means


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 64), 56),
        ((128, 128), 28),
        ((100, 37), 16),
        ((30, 30), 32),
        ((7, 50), 20),
        ((5, 3), 4),
        ((48, 40), 16),
    ],
)  # 64 to 56 and 128 to 28 are 256 to 224 and 1024 to 224
def test_resizing_is_the_mean_of_the_area_where_ratios_are_not_whole_too(shape, size):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    assert np.abs(resize_area(image, size) - area_means(image, size)).max() <= 0.501  # rounded once


@pytest.mark.parametrize(
    ("shape", "size"), [((64, 64), 16), ((96, 48), 16), ((8, 8), 24), ((60, 120), 30)]
)
def test_resizing_by_whole_ratios_gives_the_bits_of_pillows_box_filter(shape, size):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    box = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
    np.testing.assert_array_equal(resize_area(image, size), np.asarray(box))


def test_training_and_prediction_resize_alike(tmp_path, own_cache):
    image = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(image).save(tmp_path / "film.png")
    trained = ImageStore([tmp_path / "film.png"], size=56).take([0])[0]
    np.testing.assert_array_equal(trained, _read(str(tmp_path / "film.png"), 56)[0])
    assert np.abs(trained - area_means(image, 56)).max() <= 0.501


def test_a_folder_of_very_dark_films_is_told_each_time_it_is_opened(own_cache, tmp_path, caplog):
    """16-bit colour of 12 or 14 bits, of which PIL keeps the upper 8 bits; or a mark in full white
    in such a film.
    """
    paths = []
    for i, (film, _) in enumerate(
        itertools.islice(phantom_images(0, size=64, difficulty="easy"), 6)
    ):
        film = film // 4 if i % 2 else film
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(film).save(paths[-1])
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        ImageStore(paths, size=32)
        assert (
            "3 of 6 images are very dark" in caplog.text
            and "1.png" in caplog.text
            and "0.png" not in caplog.text
        )
    shutil.copy(paths[1], tmp_path / "copy.png")
    caplog.clear()
    ImageStore([str(tmp_path / "copy.png")], size=32)
    assert "1 of 1 images are very dark" in caplog.text
    caplog.clear()
    ImageStore(paths[::2], size=32)
    assert not caplog.records


def test_resizing_covers_the_whole_of_an_oblong_image():
    image = np.zeros((60, 120), np.uint8)
    image[:, 60:] = 200
    small = resize_area(image, 30)
    assert small.shape == (30, 30)
    assert (small[:, :15] == 0).all()
    assert (small[:, 15:] == 200).all()


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    np.testing.assert_array_equal(resize_area(image, 32), image)


@pytest.mark.parametrize("indices", [[0], [10, 0, 3, 3], range(11), np.array([2, 1]), []])
def test_a_store_gives_the_pixels_of_the_images_asked_for(files, own_cache, indices):
    paths, pixels = files
    expected = np.array([resize_area(pixels[i], 12) for i in indices]).reshape(-1, 12, 12)
    for _ in range(2):  # built, and found again
        store = ImageStore(paths, size=12)
        images = store.take(indices)
        assert len(store) == 11 and images.dtype == np.uint8
        np.testing.assert_array_equal(images, expected)
    assert len(own_cache) == 11


def test_only_what_is_new_is_decoded_and_a_copy_is_known_by_its_content(files, own_cache, tmp_path):
    paths, pixels = files
    ImageStore(paths[:4], size=12)
    assert sorted(own_cache) == sorted(paths[:4])
    ImageStore(paths[2:7], size=12)
    assert sorted(own_cache) == sorted(paths[:7])
    copies = [shutil.copy(path, tmp_path / f"copy-{i}.png") for i, path in enumerate(paths[:7])]
    store = ImageStore([str(copy) for copy in copies], size=12)
    assert len(own_cache) == 7
    np.testing.assert_array_equal(store.take([6])[0], resize_area(pixels[6], 12))
    ImageStore(paths[:2], size=6)  # another size is another cache
    assert len(own_cache) == 9


def test_a_changed_image_is_never_read_stale_not_even_with_the_old_size_and_time(
    own_cache, tmp_path
):
    path = save(tmp_path / "a.png", 10)
    before = os.stat(path)
    assert ImageStore([path], size=8).take([0]).max() == 10
    save(path, 20)
    assert os.stat(path).st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ImageStore([path], size=8).take([0]).max() == 20
    save(path, 10)  # the old content is still there
    assert ImageStore([path], size=8).take([0]).max() == 10
    assert len(own_cache) == 2


def pixel_files(size):
    return sorted(cache_folder(size).glob("*.pixels"))


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "link", "pipe"])
def test_damaged_pixels_are_named_decoded_anew_and_mended(
    files, own_cache, tmp_path, caplog, damage
):
    paths, pixels = files
    ImageStore(paths, size=24)
    (file,) = pixel_files(24)
    if damage in ("gone", "link", "pipe"):
        theirs = file.rename(tmp_path / "theirs")
        if damage == "link":
            file.symlink_to(theirs)
        elif damage == "pipe":
            os.mkfifo(file)
    else:
        content = bytearray(file.read_bytes())
        content[5 * 24 * 24 + 7] ^= 4
        file.write_bytes(content if damage == "bit" else content[: 5 * 24 * 24])
    store = ImageStore(paths, size=24)
    np.testing.assert_array_equal(store.take(range(11)), pixels)
    assert file.name in caplog.text and paths[5] in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(ImageStore(paths, size=24).take(range(11)), pixels)
    assert not caplog.records
    assert damage != "link" or theirs.exists()


def _edit(**columns):
    return lambda file: pd.read_parquet(file).assign(**columns).to_parquet(file, index=False)


INDEX_DAMAGE = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "text": lambda file: file.write_text("hello"),
    "another table": lambda file: pd.DataFrame({"a": [1]}).to_parquet(file),
    "too many rows": lambda file: pd.concat([pd.read_parquet(file)] * 100).to_parquet(file),
    "row below 0": _edit(row=-5),
    "row that no file has": _edit(row=2**62),
    "row beyond the pixels": _edit(row=10**6),
    "no row": _edit(row=None),
    "no digest": _edit(digest=None),
    "checksum of text": _edit(crc="x"),
    "another checksum": _edit(crc=np.uint32(1)),
    "key of text": _edit(key="x"),
    "no pixels": _edit(pixels=None),
    "pixels by number": _edit(pixels=7),
    "zero byte": _edit(pixels="a\0b"),
    "elsewhere": _edit(pixels="../../elsewhere"),
    "long name": _edit(pixels="x/" * 3000),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index_gives_the_right_pixels_and_is_mended(
    files, own_cache, tmp_path, caplog, damage
):
    paths, pixels = files
    (tmp_path / "elsewhere.parquet").write_text("of others")
    ImageStore(paths, size=24)
    (index,) = cache_folder(24).glob("*.parquet")
    INDEX_DAMAGE[damage](index)
    np.testing.assert_array_equal(ImageStore(paths, size=24).take(range(11)), pixels)
    assert "damaged" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(ImageStore(paths, size=24).take(range(11)), pixels)
    assert not caplog.records and (tmp_path / "elsewhere.parquet").exists()


def test_damage_is_mended_for_a_copy_too_and_pixels_that_nobody_knows_are_swept(
    files, own_cache, tmp_path
):
    paths, pixels = files
    ImageStore(paths, size=24)
    copies = [shutil.copy(path, tmp_path / f"copy-{i}.png") for i, path in enumerate(paths)]
    ImageStore(copies, size=24)
    (file,) = pixel_files(24)
    os.truncate(file, 100)
    for names in (copies, paths):
        np.testing.assert_array_equal(ImageStore(names, size=24).take(range(11)), pixels)
        np.testing.assert_array_equal(ImageStore(names, size=24).take(range(11)), pixels)
    assert len(own_cache) == 3 * 11 and file in pixel_files(24)
    os.utime(file, (0, 0))
    ImageStore(paths, size=24)
    assert file not in pixel_files(24)


def test_a_broken_image_is_named_and_what_was_decoded_before_is_kept(
    files, own_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "ROUND", 0.0)  # a pair of files for each chunk
    monkeypatch.setattr(cache, "_CHUNK", 4)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageStore([*files[0], str(broken)], size=12)
    kept = len(own_cache) - 1
    ImageStore(files[0][:8], size=12)
    assert len(own_cache) == kept + 1


def test_a_build_holds_few_rows_at_a_time_whatever_it_is_given(files, own_cache, monkeypatch):
    """Of 20,000 images as of 1,000: `benchmarks/input_pipeline.py memory` measures it."""
    monkeypatch.setattr(cache, "_ROWS", 4)
    monkeypatch.setattr(cache, "_CHUNK", 2)
    store = ImageStore(files[0], size=24)
    assert [path.stat().st_size // 24**2 for path in pixel_files(24)].count(4) == 2 and len(
        pixel_files(24)
    ) == 3
    np.testing.assert_array_equal(store.take(range(11)), files[1])
    np.testing.assert_array_equal(
        ImageStore(files[0][::-1], size=24).take(range(11)), files[1][::-1]
    )
    assert len(own_cache) == 11


def test_a_cache_that_cannot_be_written_says_which_folder_and_what_to_do(
    files, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file"))
    with pytest.raises(DataError, match=rf"{tmp_path}/file.*{cache.FOLDER}"):
        ImageStore(files[0], size=12)


def test_a_killed_build_goes_on_where_it_was(tmp_path, own_cache):
    paths = [save(tmp_path / f"{i}.png", i % 256, 512) for i in range(300)]
    script = (
        "import sys, time; from chexlib.data import cache; cache.ROUND = 0.0; cache._CHUNK = 8; "
    )
    # After each round there is time to be killed, however fast the machine.
    script += "add = cache.ImageStore._add; "
    script += "cache.ImageStore._add = lambda *asked: (add(*asked), time.sleep(0.2))[0]; "
    script += "cache.ImageStore(sys.argv[1:], size=8)"
    builder = subprocess.Popen([sys.executable, "-c", script, *paths])
    until = time.monotonic() + 60
    while len(list(cache_folder(8).glob("*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not [path for path in cache_folder(8).iterdir() if path.name.startswith(".")]
    store = ImageStore(paths, size=8)
    assert 0 < len(own_cache) < 290
    assert store.take(range(300))[:, 0, 0].tolist() == [i % 256 for i in range(300)]


class Ranks:
    """Threads that play the ranks of a training: `gather` as `World.allgather_object` does it."""

    def __init__(self, n):
        self.barrier, self.values = threading.Barrier(n, timeout=60), [None] * n

    def gather_of(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return gather


def open_together(monkeypatch, hosts, paths):
    """Stores of ranks on these hosts that open the same paths, and for each rank the paths it
    decoded.
    """
    ranks, stores, decoded = Ranks(len(hosts)), [None] * len(hosts), [[] for _ in hosts]
    me = threading.local()

    class System:
        def __getattr__(self, name):
            return getattr(os, name)

        def uname(self):
            return os.uname_result(("", hosts[me.rank], "", "", ""))

        def getpid(self):
            return me.rank

    def run(rank):
        me.rank = rank
        stores[rank] = ImageStore(paths, size=12, gather=ranks.gather_of(rank))

    def add(self, pool, missing, index):
        decoded[me.rank] += [self.paths[i] for i in missing.index]
        return whole(self, pool, missing, index)

    whole = ImageStore._add
    monkeypatch.setattr(ImageStore, "_add", add)
    monkeypatch.setattr(cache, "os", System())
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stores, decoded


def test_one_rank_of_a_host_builds_and_hosts_that_share_a_folder_divide_the_images(
    files, own_cache, monkeypatch
):
    paths, pixels = files
    stores, decoded = open_together(monkeypatch, ["a", "a", "b", "b"], paths)
    assert [len(found) for found in decoded] == [6, 0, 5, 0]
    assert sorted(own_cache) == sorted(paths)
    for store in stores:
        np.testing.assert_array_equal(
            store.take([10, 1]), [resize_area(pixels[i], 12) for i in (10, 1)]
        )


def test_a_broken_image_ends_all_ranks_with_the_same_error(files, own_cache, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    ranks, errors = Ranks(2), []

    def run(rank):
        with pytest.raises(DataError) as error:
            ImageStore([*files[0], str(broken)], size=12, gather=ranks.gather_of(rank))
        errors.append(str(error.value))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and errors[0] == errors[1] and "broken.png" in errors[0]
