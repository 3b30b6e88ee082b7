"""Each image once an epoch whatever the number of ranks, mirrored and cropped where said."""

import itertools

import numpy as np
import pytest

from chexlib.data.cache import ImageStore
from chexlib.data.pipeline import (
    AUGMENTATIONS,
    PURPOSES,
    generator_for,
    partition,
    random_boxes,
    steps_per_epoch,
    training_batches,
)
from chexlib.errors import ConfigError

SIZES = [(n, batch) for n in (4, 10, 17, 64) for batch in (4, 5, 16)]


def epoch_of(n, *, ranks=1, epoch=0, seed=0, global_batch=8, mirror=False):
    """The shares of every rank: shares[rank][step]."""
    order = {"global_batch": global_batch, "epoch": epoch, "seed": seed, "mirror": mirror}
    return [list(partition(n, rank=rank, ranks=ranks, **order)) for rank in range(ranks)]


def order_of(shares):
    """(images, mirrored) of each step over all ranks, sorted by image; padding left out."""
    steps = []
    for parts in zip(*shares, strict=True):
        images = np.concatenate([part.indices[part.weights > 0] for part in parts])
        mirrored = np.concatenate([part.mirrored[part.weights > 0] for part in parts])
        place = np.argsort(images)
        steps.append((images[place].tolist(), mirrored[place].tolist()))
    return steps


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
def test_all_ranks_take_equally_many_steps_and_none_has_an_image_more_than_its_fair_share(
    n, global_batch, ranks
):
    shares = epoch_of(n, ranks=ranks, global_batch=global_batch)
    assert {len(share) for share in shares} == {int(np.ceil(n / global_batch))}
    assert steps_per_epoch(n, global_batch=global_batch) == len(shares[0])
    for parts in zip(*shares, strict=True):
        held = [part.weights.sum() for part in parts]
        assert max(held) - min(held) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("n", "global_batch"), SIZES)
def test_images_of_a_step_and_their_mirroring_do_not_depend_on_the_ranks(n, global_batch, ranks):
    one, many = (
        epoch_of(n, ranks=r, global_batch=global_batch, seed=2, mirror=True) for r in (1, ranks)
    )
    assert order_of(many) == order_of(one)


def test_about_half_of_the_images_are_mirrored_and_none_without_mirror():
    (share,) = epoch_of(2000, global_batch=2000, mirror=True)[0]
    assert 850 < share.mirrored.sum() < 1150
    (share,) = epoch_of(2000, global_batch=2000, mirror=False)[0]
    assert not share.mirrored.any()


def test_another_epoch_or_seed_gives_another_order_and_mirroring_and_the_same_gives_the_same():
    reference = order_of(epoch_of(64, epoch=1, seed=1, mirror=True))
    assert order_of(epoch_of(64, epoch=1, seed=1, mirror=True)) == reference
    others = [
        order_of(epoch_of(64, epoch=epoch, seed=seed, mirror=True))
        for epoch, seed in ((2, 1), (1, 2), (0, 0))
    ]
    for other in others:
        assert [images for images, _ in other] != [images for images, _ in reference]
        by_image = [
            dict(pair for step in order for pair in zip(*step, strict=True))
            for order in (other, reference)
        ]
        assert by_image[0] != by_image[1]


def test_no_two_things_drawn_from_one_seed_are_drawn_alike():
    orders = [generator_for(purpose, seed=7).permutation(100) for purpose in PURPOSES]
    orders += [generator_for("order", seed=7, epoch=epoch).permutation(100) for epoch in (1, 2, 3)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_of_an_epoch_is_numpys_permutation_for_seed_and_epoch():
    images = np.concatenate(
        [share.indices for share in epoch_of(50, global_batch=10, epoch=3, seed=7)[0]]
    )
    np.testing.assert_array_equal(images, np.random.default_rng([7, 3]).permutation(50))


def test_shuffle_mixes_the_whole_list():
    images = np.concatenate([share.indices for share in epoch_of(1000, global_batch=10)[0]])
    assert abs(np.corrcoef(images, np.arange(1000))[0, 1]) < 0.1


def test_more_ranks_than_images_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"(?s)\b4\b.*\b3\b"):
        list(partition(3, global_batch=8, epoch=0, seed=0, rank=0, ranks=4))


def test_a_global_batch_that_does_not_reach_every_rank_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"(?s)\b2\b.*\b3\b"):
        list(partition(30, global_batch=2, epoch=0, seed=0, rank=1, ranks=3))


def batches_of(files, n_batches, **settings):
    """Batches as NumPy arrays beside the shares they must come from; labels tell which image a row
    is.
    """
    paths, _ = files
    store = ImageStore(paths, size=24)
    labels = np.random.default_rng(1).random((len(paths), 14)).astype(np.float32)
    dataset = training_batches(store, labels, **settings)
    return store, labels, list(dataset.take(n_batches).as_numpy_iterator())


def test_batches_hold_the_images_of_the_partition_mirrored_where_it_says_with_their_labels(files):
    order = {"global_batch": 4, "seed": 3, "rank": 1, "ranks": 2, "mirror": True}
    store, labels, batches = batches_of(files, 6, **order)
    expected = [share for epoch in (0, 1) for share in partition(11, epoch=epoch, **order)]
    assert {bool(m) for share in expected for m in share.mirrored} == {True, False}
    for (pixels, y, weights), share in zip(batches, expected, strict=True):
        images = store.take(share.indices)
        images = np.stack(
            [np.fliplr(i) if m else i for i, m in zip(images, share.mirrored, strict=True)]
        )
        assert pixels.dtype == y.dtype == weights.dtype == np.float32
        np.testing.assert_array_equal(pixels, images[..., None].astype(np.float32))
        np.testing.assert_array_equal(y, labels[share.indices])
        np.testing.assert_array_equal(weights, share.weights)


def test_batch_shapes_are_known_to_tensorflow(files):
    paths, _ = files
    dataset = training_batches(
        ImageStore(paths, size=24), np.zeros((11, 14), np.float32), global_batch=4, seed=0
    )
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
        for share in itertools.islice(
            partition(11, global_batch=4, epoch=epoch, seed=0, mirror=True), 2
        )
    ]
    for (_, y, _), share in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(y, labels[share.indices])


def test_an_epoch_cut_short_ends_there_also_when_it_goes_on_in_larger_batches(files):
    _, labels, batches = batches_of(files, 3, global_batch=4, seed=0, images=9, first_image=3)
    order = np.random.default_rng([0, 0]).permutation(11)
    following = np.random.default_rng([0, 1]).permutation(11)
    for (_, y, _), images in zip(batches, (order[3:7], order[7:9], following[:4]), strict=True):
        np.testing.assert_array_equal(y, labels[images])


def test_a_rank_without_an_image_gets_padding_that_counts_nothing(files):
    # 11 images in batches of 10 leave one image for 3 ranks.
    order = {"global_batch": 10, "seed": 0, "ranks": 3, "mirror": False}
    last = [batches_of(files, 2, rank=rank, **order)[2][1] for rank in range(3)]
    assert [weights.tolist() for _, _, weights in last] == [[1], [0], [0]]
    assert all(pixels.shape == (1, 24, 24, 1) for pixels, _, _ in last)


@pytest.mark.parametrize(
    "n", [37, 26]
)  # in global batches of 12 with a last one of 1 and of 2 images: padding
def test_a_rank_with_virtual_ranks_has_their_shares_one_after_the_other(n):
    order = dict(global_batch=12, epoch=1, seed=3, mirror=True)
    four = [list(partition(n, rank=rank, ranks=4, **order)) for rank in range(4)]
    two = [list(partition(n, rank=rank, ranks=2, accumulation=2, **order)) for rank in range(2)]
    for rank, shares in enumerate(two):
        for step, share in enumerate(shares):
            parts = [four[2 * rank + i][step] for i in range(2)]
            for found, expected in zip(share, zip(*parts, strict=True), strict=True):
                np.testing.assert_array_equal(found, np.concatenate(expected))
            sizes = [
                len(part.indices) for part in parts
            ]  # the trainer cuts a share as array_split does
            assert sizes == [len(piece) for piece in np.array_split(share.indices, 2)]


@pytest.mark.parametrize("augment", ["study", "radiograph"])
def test_crops_have_the_area_aspect_and_place_that_are_asked_for(augment):
    least, narrowest = AUGMENTATIONS[augment]
    top, left, bottom, right = random_boxes(
        20000, augment=augment, generator=np.random.default_rng(0)
    ).T.astype(float)
    height, width = bottom - top, right - left
    assert min(top.min(), left.min()) >= 0 and max(bottom.max(), right.max()) <= 1 + 1e-6
    whole = (height < 0.999) & (width < 0.999)  # not clipped at a side
    area, aspect = (height * width)[whole], (height / width)[whole]
    assert area.min() >= least - 1e-5 and area.max() < 1
    assert aspect.min() >= narrowest - 1e-5 and aspect.max() <= 1 / narrowest + 1e-5
    assert area.min() < least + 0.01 and aspect.min() < narrowest + 0.01
    inside = (top / np.maximum(1 - height, 1e-9))[whole]
    assert np.abs(np.quantile(inside, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.02


def crop(image, box):
    """The bilinear crop of a box, corner pixels on its corners, at the image's size, in float64."""
    side = len(image)
    rows, columns = (np.linspace(box[i], box[i + 2], side) * (side - 1) for i in (0, 1))
    r, c = (np.minimum(np.floor(x).astype(int), side - 2) for x in (rows, columns))
    dr, dc = (rows - r)[:, None], (columns - c)[None]
    image = image.astype(np.float64)
    upper = image[r][:, c] * (1 - dc) + image[r][:, c + 1] * dc
    return upper * (1 - dr) + (image[r + 1][:, c] * (1 - dc) + image[r + 1][:, c + 1] * dc) * dr


def test_batches_are_cropped_as_the_partition_says_and_only_while_it_is_on(files):
    order = {"global_batch": 4, "seed": 3, "mirror": True, "augment": "study"}
    when = np.array([True, False, True, True, False])  # the last value holds on
    store, _, batches = batches_of(files, 6, when=when, **order)
    expected = [share for epoch in (0, 1) for share in partition(11, epoch=epoch, **order)]
    for on, (pixels, _, _), share in zip([*when, False], batches, expected, strict=True):
        images = store.take(share.indices)
        images = [np.fliplr(i) if m else i for i, m in zip(images, share.mirrored, strict=True)]
        cropped = [crop(i, box) for i, box in zip(images, share.boxes, strict=True)]
        np.testing.assert_allclose(
            pixels[..., 0], cropped if on else images, rtol=0, atol=0.02 if on else 0
        )
        assert np.abs(np.array(cropped) - images).max() > 50


def test_the_crops_of_an_image_do_not_depend_on_the_ranks_and_change_with_the_epoch():
    def boxes(ranks, epoch):
        order = {"global_batch": 8, "epoch": epoch, "seed": 1, "augment": "radiograph"}
        shares = [
            share
            for rank in range(ranks)
            for share in partition(17, rank=rank, ranks=ranks, **order)
        ]
        held = {
            i: tuple(b)
            for s in shares
            for i, b, w in zip(s.indices, s.boxes, s.weights, strict=True)
            if w
        }
        return [held[i] for i in range(17)]

    assert boxes(1, 0) == boxes(2, 0) == boxes(3, 0)
    assert all(a != b for a, b in zip(boxes(1, 0), boxes(1, 1), strict=True))
