"""Each image once an epoch whatever the number of ranks, resized by area, in memory or not, mirrored where said."""

import itertools

import numpy as np
import pytest
from PIL import Image

from chexlib.data.pipeline import ImageStore, partition, resize_area, steps_per_epoch, training_batches
from chexlib.errors import ConfigError

SIZES = [(n, batch) for n in (4, 10, 17, 64) for batch in (4, 5, 16)]


def epoch_of(n, *, ranks=1, epoch=0, seed=0, global_batch=8, mirror=False):
    """The shares of every rank: shares[rank][step]."""
    order = {"global_batch": global_batch, "epoch": epoch, "seed": seed, "mirror": mirror}
    return [list(partition(n, rank=rank, ranks=ranks, **order)) for rank in range(ranks)]


def order_of(shares):
    """(images, mirrored) of each step over all ranks, sorted by image; stand-ins left out."""
    steps = []
    for parts in zip(*shares, strict=True):
        images = np.concatenate([part.indices[part.weights > 0] for part in parts])
        mirrored = np.concatenate([part.mirrored[part.weights > 0] for part in parts])
        place = np.argsort(images)
        steps.append((images[place].tolist(), mirrored[place].tolist()))
    return steps


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of 11 random grey images of 24 x 24 pixels, and their pixels."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (11, 24, 24), np.uint8)
    paths = [str(folder / f"{i}.png") for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths, pixels


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "global_batch"), SIZES)
def test_every_image_is_seen_exactly_once_over_all_ranks(n, global_batch, ranks):
    shares = epoch_of(n, ranks=ranks, global_batch=global_batch, epoch=3, seed=5)
    counted = np.zeros(n)
    for share in itertools.chain.from_iterable(shares):
        assert share.weights.dtype == np.float32
        assert share.mirrored.dtype == bool
        assert len(share.indices) == len(share.weights) == len(share.mirrored) > 0
        np.add.at(counted, share.indices, share.weights)
    np.testing.assert_array_equal(counted, 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "global_batch"), SIZES)
def test_all_ranks_take_equally_many_steps_and_none_has_an_image_more_than_its_fair_share(n, global_batch, ranks):
    shares = epoch_of(n, ranks=ranks, global_batch=global_batch)
    assert {len(share) for share in shares} == {int(np.ceil(n / global_batch))}
    assert steps_per_epoch(n, global_batch=global_batch) == len(shares[0])
    for parts in zip(*shares, strict=True):
        held = [part.weights.sum() for part in parts]
        assert max(held) - min(held) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("n", "global_batch"), SIZES)
def test_images_of_a_step_and_their_mirroring_do_not_depend_on_the_ranks(n, global_batch, ranks):
    one, many = (epoch_of(n, ranks=r, global_batch=global_batch, seed=2, mirror=True) for r in (1, ranks))
    assert order_of(many) == order_of(one)


def test_about_half_of_the_images_are_mirrored_and_none_without_mirror():
    (share,) = epoch_of(2000, global_batch=2000, mirror=True)[0]
    assert 850 < share.mirrored.sum() < 1150
    (share,) = epoch_of(2000, global_batch=2000, mirror=False)[0]
    assert not share.mirrored.any()


def test_another_epoch_or_seed_gives_another_order_and_mirroring_and_the_same_gives_the_same():
    reference = order_of(epoch_of(64, epoch=1, seed=1, mirror=True))
    assert order_of(epoch_of(64, epoch=1, seed=1, mirror=True)) == reference
    others = [order_of(epoch_of(64, epoch=epoch, seed=seed, mirror=True)) for epoch, seed in ((2, 1), (1, 2), (0, 0))]
    for other in others:
        assert [images for images, _ in other] != [images for images, _ in reference]
        by_image = [dict(pair for step in order for pair in zip(*step, strict=True)) for order in (other, reference)]
        assert by_image[0] != by_image[1]


def test_shuffle_mixes_the_whole_list():
    images = np.concatenate([share.indices for share in epoch_of(1000, global_batch=10)[0]])
    assert abs(np.corrcoef(images, np.arange(1000))[0, 1]) < 0.1


def test_more_ranks_than_images_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"(?s)\b4\b.*\b3\b"):
        list(partition(3, global_batch=8, epoch=0, seed=0, rank=0, ranks=4))


def test_a_global_batch_that_does_not_reach_every_rank_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"(?s)\b2\b.*\b3\b"):
        list(partition(30, global_batch=2, epoch=0, seed=0, rank=1, ranks=3))


@pytest.mark.parametrize(("factor", "shape"), [(2, (64, 64)), (4, (64, 64)), (8, (256, 256)), (3, (96, 96))])
def test_resizing_is_the_mean_over_blocks(factor, shape):
    image = np.random.default_rng(factor).integers(0, 256, shape, np.uint8)
    small = resize_area(image, shape[0] // factor)
    assert small.dtype == np.uint8
    blocks = image.reshape(shape[0] // factor, factor, shape[1] // factor, factor).mean((1, 3))
    # Rows, then columns are rounded to 8 bits: together at most one grey level.
    assert np.abs(small - blocks).max() <= 1


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


@pytest.mark.parametrize("indices", [[0], [10, 0, 3, 3], range(11), np.array([2, 1])])
def test_store_gives_the_same_pixels_from_memory_and_decoded_anew(files, indices):
    paths, pixels = files
    stores = [ImageStore(paths, size=12, memory_fraction=fraction) for fraction in (0.2, 0)]
    taken = [store.take(indices) for store in stores]
    for store, images in zip(stores, taken, strict=True):
        assert len(store) == 11
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, [resize_area(pixels[i], 12) for i in indices])


def test_store_in_memory_needs_its_files_no_more_and_without_memory_reads_them(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 10, np.uint8)).save(path)
    kept, anew = ImageStore([str(path)], size=8), ImageStore([str(path)], size=8, memory_fraction=0)
    Image.fromarray(np.full((8, 8), 20, np.uint8)).save(path)
    assert kept.take([0]).max() == 10
    assert anew.take([0]).max() == 20


def batches_of(files, n_batches, **settings):
    """Batches as NumPy arrays beside the shares they must come from; labels tell which image a row is."""
    paths, _ = files
    store = ImageStore(paths, size=24, memory_fraction=settings.pop("memory_fraction", 0.2))
    labels = np.random.default_rng(1).random((len(paths), 14)).astype(np.float32)
    dataset = training_batches(store, labels, **settings)
    return store, labels, list(dataset.take(n_batches).as_numpy_iterator())


@pytest.mark.parametrize("memory_fraction", [0.2, 0])
def test_batches_hold_the_images_of_the_partition_mirrored_where_it_says_with_their_labels(files, memory_fraction):
    order = {"global_batch": 4, "seed": 3, "rank": 1, "ranks": 2, "mirror": True}
    store, labels, batches = batches_of(files, 6, memory_fraction=memory_fraction, **order)
    expected = [share for epoch in (0, 1) for share in partition(11, epoch=epoch, **order)]
    assert {bool(m) for share in expected for m in share.mirrored} == {True, False}
    for (pixels, y, weights), share in zip(batches, expected, strict=True):
        images = store.take(share.indices)
        images = np.stack([np.fliplr(i) if m else i for i, m in zip(images, share.mirrored, strict=True)])
        assert pixels.dtype == y.dtype == weights.dtype == np.float32
        np.testing.assert_array_equal(pixels, images[..., None].astype(np.float32))
        np.testing.assert_array_equal(y, labels[share.indices])
        np.testing.assert_array_equal(weights, share.weights)


def test_batch_shapes_are_known_to_tensorflow(files):
    paths, _ = files
    dataset = training_batches(ImageStore(paths, size=24), np.zeros((11, 14), np.float32), global_batch=4, seed=0)
    pixels, labels, weights = dataset.element_spec
    assert pixels.shape.as_list() == [None, 24, 24, 1]
    assert labels.shape.as_list() == [None, 14]
    assert weights.shape.as_list() == [None]


def test_pixels_reach_from_0_to_255(files):
    _, _, batches = batches_of(files, 1, global_batch=11, seed=0, mirror=False)
    assert batches[0][0].min() < 5
    assert batches[0][0].max() > 250


def test_an_epoch_cut_short_is_followed_by_the_next_epochs_shuffle(files):
    _, labels, batches = batches_of(files, 4, global_batch=4, seed=0, images=8, first_epoch=5)
    expected = [
        share
        for epoch in (5, 6)
        for share in itertools.islice(partition(11, global_batch=4, epoch=epoch, seed=0, mirror=True), 2)
    ]
    for (_, y, _), share in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(y, labels[share.indices])


def test_a_rank_without_an_image_gets_a_stand_in_that_counts_nothing(files):
    # 11 images in batches of 10 leave one image for 3 ranks.
    order = {"global_batch": 10, "seed": 0, "ranks": 3, "mirror": False}
    last = [batches_of(files, 2, rank=rank, **order)[2][1] for rank in range(3)]
    assert [weights.tolist() for _, _, weights in last] == [[1], [0], [0]]
    assert all(pixels.shape == (1, 24, 24, 1) for pixels, _, _ in last)
