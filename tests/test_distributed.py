"""Real MPI ranks: what they must agree on, and what must be left when they are gone. Needs mpiexec and Horovod."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from chexlib.cluster.engines import mpi_engines
from chexlib.cluster.profiles import find_mpi, thread_environment
from chexlib.cluster.watchdog import members
from chexlib.data.phantom import write_phantom
from chexlib.errors import ClusterError, ConfigError
from chexlib.training.collectives import identify
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.steps import seven_steps

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(
        tmp_path_factory.mktemp("data") / "phantom", n_images=70, size=32, min_prevalence=0.1, workers=1
    )


def run_ranks(out, data_dir, *, ranks, batch, topology="vgg16", steps=3, own_start=False):
    """Weights, losses and pixels of every rank after a few steps of tests/rank_job.py."""
    job = {"out": str(out), "data_dir": str(data_dir), "batch": batch, "topology": topology, "steps": steps}
    mpi = find_mpi()
    launch = [mpi.command, "-n", str(ranks), *mpi.flags()] if ranks > 1 else []
    command = [*launch, sys.executable, str(TESTS / "rank_job.py"), json.dumps({**job, "own_start": own_start})]
    done = subprocess.run(
        command, env={**os.environ, **thread_environment(1)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [dict(np.load(Path(out) / f"{ranks}ranks-{rank}.npz")) for rank in range(ranks)]


def weights_of(result):
    return [result[name] for name in sorted(result) if name.startswith("w")]


@pytest.fixture(scope="module")
def one_rank(phantom, tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("one"), phantom, ranks=1, batch=16)[0]


def test_ranks_fed_different_data_end_with_identical_weights_unlike_one_rank(phantom, one_rank, tmp_path):
    first, second = run_ranks(tmp_path, phantom, ranks=2, batch=16, own_start=True)
    assert not np.array_equal(first["fed"], second["fed"])
    for a, b in zip(weights_of(first), weights_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    apart = [np.abs(a - b).max() for a, b in zip(weights_of(first), weights_of(one_rank), strict=True)]
    assert max(apart) > 1e-4


def test_two_ranks_of_8_equal_one_rank_of_16(phantom, one_rank, tmp_path):
    first, _ = run_ranks(tmp_path, phantom, ranks=2, batch=8)
    for a, b in zip(weights_of(first), weights_of(one_rank), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
    np.testing.assert_allclose(first["losses"], one_rank["losses"], rtol=1e-4)


def test_the_last_smaller_batch_counts_by_its_images(phantom, tmp_path):
    """70 images in global batches of 32: the third has 6, so the equality must hold over uneven shares as well."""
    alone = run_ranks(tmp_path, phantom, ranks=1, batch=33)[0]
    three = run_ranks(tmp_path, phantom, ranks=3, batch=11)
    assert [len(r["fed"]) for r in three] == [24, 23, 23]
    for a, b in zip(weights_of(three[2]), weights_of(alone), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def nothing_left(marker, seconds=20):
    until = time.monotonic() + seconds
    while members(marker) and time.monotonic() < until:
        time.sleep(0.2)
    return not members(marker)


def test_engines_train_in_one_world_and_are_gone_afterwards(phantom, tmp_path):
    config = TrainConfig(
        data_dir=str(phantom), run_dir=str(tmp_path), topology="vgg16", size=32, epochs=2, batch_size=8, split="patient"
    )
    told = []
    with mpi_engines(2, threads=1) as engines:
        profile = engines.cluster.profile_dir
        assert [who["rank"] for who in engines.run(identify)] == [0, 1]
        assert "2 MPI engines" in engines._repr_html_()
        seen = engines.run(seven_steps, config)
        results = engines.run(fit, config, report=told.append)
        with pytest.raises(ConfigError, match="nonsense"):
            engines.run(TrainConfig.from_dict, {"nonsense": 1})
        with pytest.raises(ClusterError, match=r"rank [01] on .* ZeroDivisionError"):
            engines.run(divmod, 1, 0)
        with pytest.raises(ClusterError, match="did not end within 1 s"):
            engines.run(time.sleep, 3, timeout=1)
    assert nothing_left(profile) and not Path(profile).exists()

    assert seen[0]["broadcast"]["before"] != seen[1]["broadcast"]["before"]
    assert seen[0]["broadcast"]["after"] == seen[1]["broadcast"]["after"]
    assert seen[0]["repeat"]["checksum"] == seen[1]["repeat"]["checksum"]
    mine = [set(s["distribute"]["indices"]) for s in seen]
    assert not mine[0] & mine[1] and len(mine[0] | mine[1]) == seen[0]["distribute"]["images"]

    strip = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in r.history] for r in results]
    assert strip[0] == strip[1] and results[0].ranks == 2
    assert len(told[-1]["history"]) == 2 and told[-1]["epochs"] == 2
    assert Path(results[0].model).exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_notebook_that_dies_leaves_no_process(number, tmp_path):
    script = (
        "from chexlib.cluster.engines import mpi_engines\n"
        "import time\n"
        "with mpi_engines(2, threads=1) as e:\n"
        "    print(e.cluster.profile_dir, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        profile = process.stdout.readline().strip()
        assert len(members(profile)) >= 4  # the controller, mpiexec and two engines
        process.send_signal(number)
    assert nothing_left(profile)
    until = time.monotonic() + 10
    while Path(profile).exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert not Path(profile).exists()


def test_a_killed_rank_is_reported_by_rank_and_host():
    with mpi_engines(2, threads=1) as engines:
        victim = engines.identities[1]
        psutil.Process(victim["pid"]).kill()
        with pytest.raises(ClusterError, match=victim["host"]):
            engines.run(time.sleep, 30)


def test_engines_that_cannot_start_say_why(monkeypatch):
    monkeypatch.setattr("chexlib.cluster.profiles.Mpi.flags", lambda self, *more: ["--no-such-flag"])
    with pytest.raises(ClusterError, match="no-such-flag"), mpi_engines(1, timeout=30):
        pass


def test_ctrl_c_in_the_middle_of_a_run_leaves_no_process(phantom, tmp_path):
    parameters = {"topology": "vgg16", "size": "32", "epochs": "500"}
    command = [
        sys.executable,
        "-m",
        "chexlib",
        "run",
        "04",
        "--data",
        str(phantom),
        "--runs-dir",
        str(tmp_path / "runs"),
    ]
    command += [word for pair in parameters.items() for word in ("-p", *pair)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # the cluster's folder is made there: a marker of its own
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while len(members(str(tmp_path))) < 4 and time.monotonic() < until:
            time.sleep(0.5)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family and len(members(str(tmp_path))) >= 4
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert nothing_left(str(tmp_path))
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
