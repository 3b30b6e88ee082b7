"""Whose statistics normalise, on real MPI ranks: N ranks against one, real ranks against virtual ones."""

import os

import numpy as np
import pytest
from test_distributed import run_ranks

from chexlib.data.phantom import write_phantom

LONG = bool(os.environ.get("CHEXLIB_LONG"))
KINDS = {"weights": "w", "statistics": "s", "optimizer": "o"}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", n_images=40, size=64, workers=1)


def distance(a, b, kind):
    """Of all arrays of a kind together: the norm of their difference, relative to their own."""
    names = [name for name in b if name[0] == KINDS[kind] and name[1:].isdigit()]
    off, whole = (np.sqrt(sum((v.astype(float) ** 2).sum() for v in values)) for values in (
        [a[name] - b[name] for name in names], [b[name] for name in names]
    ))  # fmt: skip
    return off / whole


@pytest.mark.parametrize("topology", ["resnet50", "densenet121"])
def test_a_virtual_rank_is_a_real_one_to_float_rounding(phantom, tmp_path, topology):
    """4 virtual ranks of 4 images on one rank, and on two: as 4 real ones, their averaged statistics too."""
    steps = {"topology": topology, "steps": 3, "batch": 4, "rate": 1e-4, "name": "ranks"}
    real = run_ranks(tmp_path, phantom, [steps], ranks=4)["ranks"][0]
    for ranks in (1, 2):
        virtual = run_ranks(tmp_path, phantom, [{**steps, "accumulation": 4 // ranks}], ranks=ranks)["ranks"][0]
        for kind in KINDS:
            assert distance(virtual, real, kind) <= 1e-5, (ranks, kind)
        np.testing.assert_allclose(virtual["losses"], real["losses"], rtol=1e-5)
