"""Real MPI ranks: what they must agree on, and what must be left when they are gone.

Needs mpiexec and Horovod.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import rank_job
from eavesdropper import mechanism
from sklearn.metrics import roc_auc_score
from small_training import config_for

from chexlib.cluster.cleanup import members, memory_folder
from chexlib.cluster.engines import mpi_engines
from chexlib.collectives import World, identify
from chexlib.errors import ClusterError, ConfigError
from chexlib.findings import FINDINGS
from chexlib.models.weights import load_model
from chexlib.mpi import find_mpi, thread_environment
from chexlib.phantom.write import write_phantom
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit

pytestmark = pytest.mark.cores
TOPOLOGIES = ("densenet121", "resnet50", "vgg16")
LONG = bool(os.environ.get("CHEXLIB_LONG"))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(
        tmp_path_factory.mktemp("data") / "phantom",
        n_images=70,
        size=32,
        min_prevalence=0.1,
        workers=1,
    )


# The ranks join first, as TensorFlow's import is then the quick one.
START = """
import json, sys
from chexlib.collectives import join_world
world = join_world()
import rank_job
rank_job.take(world, json.loads(sys.argv[1]))
"""


def run_ranks(out, data_dir, trainings, *, ranks, parts=()):
    """What each rank saved, by name of the training and rank, after tests/rank_job.py has taken all
    trainings. A rank alone is this process.
    """
    job = {"out": str(out), "data_dir": str(data_dir), "trainings": trainings, "parts": parts}
    if ranks == 1:
        rank_job.take(World(), job)
    else:
        mpi = find_mpi()
        launch = [mpi.command, "-n", str(ranks), *mpi.flags()]
        paths = filter(None, [str(Path(rank_job.__file__).parent), os.environ.get("PYTHONPATH")])
        done = subprocess.run(
            [*launch, sys.executable, "-c", START, json.dumps(job)],
            env={**os.environ, **thread_environment(1), "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def saved(name, rank):
        return dict(np.load(Path(out) / f"{name}-{ranks}ranks-{rank}.npz"))

    names = [training["name"] for training in trainings]
    return {name: [saved(name, rank) for rank in range(ranks)] for name in names}


def weights_of(result, kinds="w"):
    return [result[name] for name in sorted(result) if name[0] in kinds and name[1:].isdigit()]


def distances(a, b):
    """Of each kernel relative to its norm; of each bias, gamma and beta, which may be next to 0,
    ten times absolute.
    """
    pairs = zip(weights_of(a), weights_of(b), strict=True)
    return [
        np.linalg.norm(x - y) / np.linalg.norm(y) if y.ndim > 1 else 10 * np.abs(x - y).max()
        for x, y in pairs
    ]


# How ranks agree does not depend on the number of channels or blocks; a network takes longer to
# trace than to step.
VGG = {"name": "vgg16", "topology": "vgg16", "width": 0.25, "steps": 10}
BLOCKS = 0 if LONG else 1
NETWORKS = ("resnet50", "densenet121") if LONG else ("resnet50",)
FROZEN = [
    {"name": t, "topology": t, "width": 0.25, "blocks": BLOCKS, "steps": 10, "freeze": True}
    for t in NETWORKS
]
BITS = {"width": 1.0 if LONG else 0.25, "blocks": BLOCKS, "steps": 50 if LONG else 5, "batch": 3}
KINDS = [("resnet50", "mixed_bfloat16"), ("densenet121", "float32")]
if LONG:
    KINDS = [
        (topology, precision)
        for topology in TOPOLOGIES
        for precision in ("float32", "mixed_bfloat16")
    ]
SAME_BITS = [{"name": f"{t}-{p}", "topology": t, "precision": p, **BITS} for t, p in KINDS]


@pytest.fixture(scope="module")
def one_rank(phantom, tmp_path_factory):
    trainings = [{**settings, "batch": 16} for settings in (VGG, *FROZEN)]
    trainings.append({**VGG, "name": "uneven", "batch": 33})
    return run_ranks(tmp_path_factory.mktemp("one"), phantom, trainings, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(phantom, tmp_path_factory):
    trainings = [{**settings, "batch": 8} for settings in (VGG, *FROZEN)]
    trainings.append({**VGG, "name": "own start", "batch": 16, "own_start": True})
    return run_ranks(tmp_path_factory.mktemp("two"), phantom, trainings, ranks=2)


@pytest.fixture(scope="module")
def three_ranks(phantom, tmp_path_factory):
    uneven = {**VGG, "name": "uneven", "batch": 11}
    return run_ranks(tmp_path_factory.mktemp("three"), phantom, [uneven, *SAME_BITS], ranks=3)


def test_ranks_fed_different_data_end_with_identical_weights_unlike_one_rank(one_rank, two_ranks):
    first, second = two_ranks["own start"]
    assert not np.array_equal(first["fed"], second["fed"])
    for a, b in zip(weights_of(first, "wo"), weights_of(second, "wo"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(distances(first, one_rank["vgg16"][0])) > 5e-4  # what counts as equal below is 1e-4


@pytest.mark.parametrize("name", ["vgg16", *NETWORKS])
def test_two_ranks_of_8_equal_one_rank_of_16_after_10_steps(one_rank, two_ranks, name):
    """VGG-16 has no batch norm; the others have theirs frozen, as each rank would normalise its own
    images only.
    """
    first, alone = two_ranks[name][0], one_rank[name][0]
    assert alone["moved"] > 0.95
    assert max(distances(first, alone)) <= 1e-4
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-4)


def test_the_last_smaller_batch_counts_by_its_images(one_rank, three_ranks):
    """70 images in global batches of 33: the third has 4, so the equality must hold over uneven
    shares as well.
    """
    three = three_ranks["uneven"]
    assert [len(r["fed"]) for r in three] == [24, 23, 23]
    assert max(distances(three[2], one_rank["uneven"][0])) <= 1e-4


@pytest.mark.parametrize("ranks", [2, 3] if LONG else [3])
def test_steps_leave_the_same_bits_on_all_ranks_for_each_topology_and_precision(
    phantom, three_ranks, tmp_path, ranks
):
    """50 steps of all six with CHEXLIB_LONG=1, some 20 minutes where bfloat16 is emulated; else 5
    steps of two.
    """
    trained = three_ranks if ranks == 3 else run_ranks(tmp_path, phantom, SAME_BITS, ranks=ranks)
    found = {settings["name"]: trained[settings["name"]] for settings in SAME_BITS}
    assert len(found) == (6 if LONG else 2)
    for name, (first, *others) in found.items():
        assert first["types"] == ("bfloat16" if "bfloat16" in name else "float32")
        assert first["moved"] > 0.95 and np.isfinite(first["losses"]).all(), name
        for other in others:
            assert not np.array_equal(first["fed"], other["fed"])
            for a, b in zip(weights_of(first, "wo"), weights_of(other, "wo"), strict=True):
                assert a.tobytes() == b.tobytes(), name


def nothing_left(marker, seconds=20):
    until = time.monotonic() + seconds
    while members(marker) and time.monotonic() < until:
        time.sleep(0.2)
    return not members(marker)


def test_engines_train_in_one_world_and_are_gone_afterwards(phantom, tmp_path):
    config = config_for(phantom, tmp_path, learning_rate=1e-3, precision="auto")
    told = []
    with mpi_engines(2, threads=1) as engines:
        profile = engines.cluster.profile_dir
        assert [who["rank"] for who in engines.run(identify)] == [0, 1]
        assert "2 MPI engines" in engines._repr_html_()
        results = engines.run(fit, config, report=told.append)
        assert engines.run(os.getpid) == [who["pid"] for who in engines.identities]
        with pytest.raises(ConfigError, match="nonsense"):
            engines.run(TrainConfig.from_dict, {"nonsense": 1})
        with pytest.raises(ClusterError, match=r"rank [01] on .* ZeroDivisionError"):
            engines.run(divmod, 1, 0)
        with pytest.raises(ClusterError, match="did not end within 1 s"):
            engines.run(time.sleep, 3, timeout=1)
    assert nothing_left(profile) and not Path(profile).exists()

    strip = [
        [
            {k: v for k, v in row.items() if k not in ("images_per_second", "skew")}
            for row in r.history
        ]
        for r in results
    ]
    assert strip[0] == strip[1] and results[0].ranks == 2
    assert len(told[-1]["history"]) == 2 and told[-1]["epochs"] == 2
    assert Path(results[0].model).exists()

    rows = pd.read_parquet(results[0].predictions).query("part == 'validation'")
    assert len(rows) % 2 == 1  # the ranks score 1 image more and 1 less
    pairs = [(rows[f"label_{finding}"], rows[f"score_{finding}"]) for finding in FINDINGS]
    expected = np.mean([roc_auc_score(y, p) for y, p in pairs if 0 < y.sum() < len(y)])
    assert abs(results[0].history[results[0].best_epoch]["val_auroc"] - expected) <= 1e-12

    # The same config under plain mpiexec gives what the notebook's engines gave.
    plain = tmp_path / "plain.json"
    plain.write_text(
        json.dumps(
            {**json.loads((tmp_path / "config.json").read_text()), "run_dir": str(tmp_path / "p")}
        )
    )
    mpi = find_mpi()
    command = [
        mpi.command,
        "-n",
        "2",
        *mpi.flags(),
        sys.executable,
        "-m",
        "chexlib",
        "train",
        "--config",
        str(plain),
    ]
    done = subprocess.run(
        command, env={**os.environ, **thread_environment(1)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and '"ranks": 2' in done.stdout, done.stderr[-2000:]
    for a, b in zip(
        *(load_model(tmp_path / p)[0].get_weights() for p in ("model.keras", "p/model.keras")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, "and its watchdog"])
def test_a_notebook_that_dies_leaves_no_process(number, tmp_path):
    script = (
        "from chexlib.cluster.engines import mpi_engines\n"
        "import time\n"
        "with mpi_engines(2, threads=1) as e:\n"
        "    print(e.cluster.profile_dir, flush=True)\n"
        "    time.sleep(60)\n"
    )
    killed = number == "and its watchdog"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        profile = process.stdout.readline().strip()
        assert len(members(profile)) >= 4  # the controller, mpiexec and two engines
        (watchdog,) = (
            child
            for child in psutil.Process(process.pid).children()
            if "chexlib.cluster.cleanup" in child.cmdline()
        )
        assert memory_folder(Path(profile).parent).is_dir() or sys.platform != "linux"
        if killed:
            watchdog.kill()
        process.send_signal(signal.SIGKILL if killed else number)
    assert nothing_left(profile, 40)
    left = [Path(profile), memory_folder(Path(profile).parent)]
    until = time.monotonic() + 10
    while any(path.exists() for path in left) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(path.exists() for path in left)


@pytest.mark.usefixtures("without_tensorflow")
def test_what_engines_say_is_encrypted_and_a_killed_launcher_leaves_no_memory(caplog):
    with mpi_engines(2, threads=1) as engines:
        ports = set()
        for process in members(engines.folder):
            ports |= {c.laddr.port for c in process.net_connections() if c.status == "LISTEN"}
        assert {mechanism(port) for port in ports} - {None} == {"CURVE"}
        assert "insecure" not in caplog.text
        memory = memory_folder(engines.folder)
        before = set(memory.glob("*"))
        assert len(before) >= 2 or sys.platform != "linux"
        os.kill(engines.launched.launcher.pid, signal.SIGKILL)
        with pytest.raises(ClusterError, match=r"launcher of the engines has ended|died of"):
            engines.run(time.sleep, 30)
        assert not list(memory.glob("*"))
    assert not memory.exists()


@pytest.mark.usefixtures("without_tensorflow")
def test_a_killed_rank_is_reported_by_rank_and_host():
    with mpi_engines(2, threads=1) as engines:
        victim = engines.identities[1]
        psutil.Process(victim["pid"]).kill()
        with pytest.raises(ClusterError, match=victim["host"]):
            engines.run(time.sleep, 30)


def test_engines_that_cannot_start_say_why(monkeypatch):
    monkeypatch.setattr("chexlib.mpi.Mpi.flags", lambda self, *more: ["--no-such-flag"])
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
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
    }  # the cluster's folder is made there: a marker of its own
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
