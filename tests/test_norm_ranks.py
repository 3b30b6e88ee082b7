"""Whose statistics normalise, on real MPI ranks: N ranks against one, real ranks against virtual ones."""

import os
import subprocess
import sys
from pathlib import Path

import norm_job
import numpy as np
import pytest
from test_distributed import run_ranks

from chexlib.cluster.profiles import find_mpi, thread_environment
from chexlib.data.phantom import write_phantom

NAMES = ("outputs", "inputs", "gamma", "beta", "mean", "variance")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", n_images=40, size=64, workers=1)


def on_ranks(parts, folder):
    """`norm_job.outcomes` of ranks with so many images each: outputs and their gradients of all, the rest summed."""
    mpi, job = find_mpi(), Path(norm_job.__file__)
    command = [mpi.command, "-n", str(len(parts)), *mpi.flags(), sys.executable, str(job), str(folder)]
    command.append(",".join(map(str, parts)))
    done = subprocess.run(command, env={**os.environ, **thread_environment(1)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    each = [dict(np.load(folder / f"{rank}.npz")) for rank in range(len(parts))]
    join = {"outputs": np.concatenate, "inputs": np.concatenate, "gamma": sum, "beta": sum}
    first = {name: array for name, array in each[0].items() if name.endswith(("mean", "variance"))}
    return first | {
        name: join[name.split("/")[1]]([rank[name] for rank in each]) for name in each[0] if name not in first
    }


@pytest.mark.parametrize("parts", [(8, 8), (7, 5, 4)])
def test_sync_norm_over_ranks_is_batch_norm_of_all_their_images(parts, tmp_path):
    alone, ranks = norm_job.outcomes(*norm_job.data()), on_ranks(parts, tmp_path)
    for name in NAMES:
        scale = np.abs(alone[f"plain/{name}"]).max()
        np.testing.assert_allclose(ranks[f"sync/{name}"] / scale, alone[f"plain/{name}"] / scale, rtol=0, atol=1e-5)


def test_synchronized_of_keras_synchronises_nothing_under_mpi(tmp_path):
    alone, ranks = norm_job.outcomes(*norm_job.data()), on_ranks((8, 8), tmp_path)
    for name in NAMES:
        np.testing.assert_allclose(ranks[f"synchronized/{name}"], ranks[f"plain/{name}"], rtol=1e-3, atol=1e-3)
    assert np.abs(ranks["synchronized/outputs"] - alone["synchronized/outputs"]).max() > 0.05


def distance(a, b, kind):
    """Of all arrays of a kind (w, s, o) together: the norm of their difference, relative to their own."""
    names = [name for name in b if name[0] == kind and name[1:].isdigit()]
    off = sum(((a[name] - b[name]).astype(float) ** 2).sum() for name in names)
    return np.sqrt(off / sum((b[name].astype(float) ** 2).sum() for name in names))


@pytest.mark.parametrize("topology", ["resnet50", "densenet121"])
def test_virtual_ranks_are_real_ones(phantom, tmp_path, topology):
    """4 virtual ranks of 4 images as 4 real ones, weights, momenta and the mean of the ranks' moving statistics."""
    steps = {"topology": topology, "steps": 3, "batch": 4, "rate": 1e-4, "name": "ranks", "size": 64}
    real = run_ranks(tmp_path, phantom, [steps], ranks=4)["ranks"][0]
    virtual = run_ranks(tmp_path, phantom, [{**steps, "accumulation": 4}], ranks=1)["ranks"][0]
    for kind in "wso":
        assert distance(virtual, real, kind) <= 1e-5, kind
    np.testing.assert_allclose(virtual["losses"], real["losses"], rtol=1e-5)
