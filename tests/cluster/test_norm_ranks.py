"""Whose statistics normalise, on real MPI ranks: N ranks against one, real ranks against virtual
ones.
"""

import os

import norm_job
import numpy as np
import pytest
from test_distributed import run_ranks

from chexlib.phantom.write import write_phantom

pytestmark = pytest.mark.cores
TWO_PARTS = (8, 8)
NAMES = ("outputs", "inputs", "gamma", "beta", "mean", "variance")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(
        tmp_path_factory.mktemp("data") / "phantom", n_images=40, size=64, workers=1
    )


@pytest.fixture(scope="module")
def on_ranks(two_ranks, phantom, tmp_path_factory):
    """A function that gives the `outcomes_in` of ranks with so many images each."""
    made = {TWO_PARTS: outcomes_in(two_ranks[0], 2)}

    def get(parts):
        if parts not in made:
            folder = tmp_path_factory.mktemp("ranks")
            run_ranks(folder, phantom, [], ranks=len(parts), parts=parts)
            made[parts] = outcomes_in(folder, len(parts))
        return made[parts]

    return get


def outcomes_in(folder, ranks):
    """`norm_job.outcomes` that ranks saved: outputs and their gradients of all, the rest summed."""
    each = [dict(np.load(folder / f"layer-{rank}.npz")) for rank in range(ranks)]
    join = {"outputs": np.concatenate, "inputs": np.concatenate, "gamma": sum, "beta": sum}
    first = {name: array for name, array in each[0].items() if name.endswith(("mean", "variance"))}
    return first | {
        name: join[name.split("/")[1]]([rank[name] for rank in each])
        for name in each[0]
        if name not in first
    }


@pytest.mark.parametrize("parts", [TWO_PARTS, (7, 5, 4)])
def test_sync_norm_over_ranks_is_batch_norm_of_all_their_images(parts, on_ranks):
    alone, ranks = norm_job.outcomes(*norm_job.data()), on_ranks(parts)
    for name in NAMES:
        scale = np.abs(alone[f"plain/{name}"]).max()
        np.testing.assert_allclose(
            ranks[f"sync/{name}"] / scale, alone[f"plain/{name}"] / scale, rtol=0, atol=1e-5
        )
    images, _ = norm_job.data()
    np.testing.assert_allclose(ranks["population/mean"], images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(ranks["population/variance"], images.var((0, 1, 2)), rtol=1e-5)


def test_synchronized_of_keras_synchronises_nothing_under_mpi(on_ranks):
    alone, ranks = norm_job.outcomes(*norm_job.data()), on_ranks(TWO_PARTS)
    for name in NAMES:
        np.testing.assert_allclose(
            ranks[f"synchronized/{name}"], ranks[f"plain/{name}"], rtol=1e-3, atol=1e-3
        )
    assert np.abs(ranks["synchronized/outputs"] - alone["synchronized/outputs"]).max() > 0.05


def distance(a, b, kind):
    """Of all arrays of a kind (w, s, o) together: the norm of their difference, relative to their
    own.
    """
    names = [name for name in b if name[0] == kind and name[1:].isdigit()]
    off = sum(((a[name] - b[name]).astype(float) ** 2).sum() for name in names)
    return np.sqrt(off / sum((b[name].astype(float) ** 2).sum() for name in names))


LONG = pytest.mark.long  # whole networks on ranks take minutes each, most of them tracing


# Building and tracing a whole network takes far longer than its steps, and a norm does not depend
# on its depth.
BASE = {"rate": 1e-4, "size": 64, "blocks": 0 if os.environ.get("CHEXLIB_LONG") else 1}
REAL = {**BASE, "name": "ranks", "topology": "resnet50", "steps": 10, "batch": 4}
# The training of one rank of 16 images and of two of 8, with sync and without, and of one with
# ghosts of 8.
WHOLE = {"name": "whole", "batch": 16}
GHOST = {"name": "ghost", "batch": 16, "norm": "ghost", "ghost_size": 8}
PLAIN, SYNC = ({"name": norm, "batch": 8, "norm": norm} for norm in ("batch", "sync"))


def four_ways(folder, phantom, base, *, one=(), two=(), parts=()):
    """The four trainings, and those of `one` and `two` beside them on as many ranks; by name, what
    rank 0 saved.
    """
    found = run_ranks(folder, phantom, [{**base, **WHOLE}, {**base, **GHOST}, *one], ranks=1)
    two = [{**base, **PLAIN}, {**base, **SYNC}, *two]
    found |= run_ranks(folder, phantom, two, ranks=2, parts=parts)
    return {name: ranks[0] for name, ranks in found.items()}


@pytest.fixture(scope="module")
def two_ranks(phantom, tmp_path_factory):
    """The folder and the findings of the one start of two ranks: of a layer; and of ResNet-50 one
    step of the four ways, and ten steps of two ranks and of two virtual ones.
    """
    base, virtual = (
        {**BASE, "topology": "resnet50", "steps": 1},
        {**REAL, "accumulation": 2, "name": "virtual"},
    )
    folder = tmp_path_factory.mktemp("resnet")
    found = four_ways(folder, phantom, base, one=[virtual], two=[REAL], parts=TWO_PARTS)
    return folder, found


@pytest.fixture
def resnet(two_ranks):
    return two_ranks[1]


def require_virtual_as_real(virtual, real):
    """Weights, momenta, the mean of the ranks' moving statistics, and what the noise scale is made
    of.
    """
    for kind in "wso":
        assert distance(virtual, real, kind) <= 1e-5, kind
    np.testing.assert_allclose(virtual["losses"], real["losses"], rtol=1e-5)
    np.testing.assert_allclose(virtual["squares"], real["squares"], rtol=1e-3)
    assert real["squares"][2] >= 2  # parts


def require_what_they_stand_for(found):
    """Sync as one rank of 16, ghost as two ranks; and these two are far from each other."""
    whole, ghost, plain, sync = (found[name] for name in ("whole", "ghost", "batch", "sync"))
    for kind in "ws":
        assert distance(sync, whole, kind) <= 1e-5 and distance(ghost, plain, kind) <= 1e-5, kind
    pairs = {"sync": (sync, whole), "ghost": (ghost, plain), "not the same": (plain, whole)}
    off = {
        name: distance(*pair, "o") for name, pair in pairs.items()
    }  # momenta after one step: the gradients
    assert max(off["sync"], off["ghost"]) < 0.1 * off["not the same"], off


def test_virtual_ranks_are_real_ones(resnet):
    require_virtual_as_real(resnet["virtual"], resnet["ranks"])


def test_sync_on_2_ranks_of_8_and_ghost_of_8_are_what_they_stand_for(resnet):
    """One step of a whole network."""
    require_what_they_stand_for(resnet)


@LONG
@pytest.mark.parametrize(
    ("topology", "ranks", "steps"),
    [("resnet50", 4, 1), ("densenet121", 2, 10), ("densenet121", 4, 1)],
)
def test_virtual_ranks_are_real_ones_in_other_networks_and_numbers(
    phantom, tmp_path, topology, ranks, steps
):
    """Two addends have one sum; four are added in another order by MPI than here, which these
    networks, at their random start and with 4 images to normalise by, make a thousand times larger
    at every step.
    """
    settings = {**REAL, "topology": topology, "steps": steps}
    real = run_ranks(tmp_path, phantom, [settings], ranks=ranks)["ranks"][0]
    virtual = run_ranks(tmp_path, phantom, [{**settings, "accumulation": ranks}], ranks=1)["ranks"][
        0
    ]
    require_virtual_as_real(virtual, real)


@LONG
def test_sync_and_ghost_are_what_they_stand_for_in_densenet(phantom, tmp_path):
    require_what_they_stand_for(
        four_ways(tmp_path, phantom, {**BASE, "topology": "densenet121", "steps": 1})
    )


@pytest.mark.parametrize(
    "topology", [pytest.param("resnet50", marks=LONG), pytest.param("densenet121", marks=LONG)]
)
def test_ten_steps_of_sync_and_ghost_are_those_of_what_they_stand_for(tmp_path, topology):
    """From weights that have learnt for a while: at a random start a rounding error grows a
    thousandfold a step.

    At ten times the rate DenseNet-121's statistics are 6e-5 apart with sync after ten steps, and
    9e-3 without it. All batches are whole: a last one of 8 images is one virtual batch to ghost,
    and 4 images each to two ranks.
    """
    phantom = write_phantom(tmp_path / "phantom", n_images=160, size=64, workers=1)
    file = tmp_path / "start.weights.h5"
    start = {
        "topology": topology,
        "steps": 100,
        "rate": 1e-2,
        "size": 64,
        "batch": 16,
        "name": "start",
    }
    run_ranks(tmp_path, phantom, [{**start, "keep": str(file)}], ranks=1)
    base = {"topology": topology, "steps": 10, "rate": 1e-4, "size": 64, "weights": str(file)}
    found = four_ways(tmp_path, phantom, base)
    whole, ghost, plain, sync = (found[name] for name in ("whole", "ghost", "batch", "sync"))
    pairs = {"sync": (sync, whole), "ghost": (ghost, plain), "not the same": (plain, whole)}
    for kind in "wso":
        print(
            topology, kind, {name: f"{distance(*pair, kind):.1e}" for name, pair in pairs.items()}
        )
    for kind in "ws":
        assert distance(sync, whole, kind) <= 1e-5 and distance(ghost, plain, kind) <= 1e-5, kind
        assert distance(plain, whole, kind) > 10 * max(
            distance(sync, whole, kind), distance(ghost, plain, kind)
        ), kind
