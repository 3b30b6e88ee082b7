"""What ranks do together, by Horovod and by mpi4py: the same, and as NumPy says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from collectives_job import shares

from chexlib import collectives
from chexlib.cluster.faults import stalled_ranks
from chexlib.errors import ClusterError, ConfigError
from chexlib.mpi import find_mpi, thread_environment

JOB = Path(__file__).parent / "collectives_job.py"
RANKS = 3
BUILT = collectives.importlib.util.find_spec("horovod") is not None
CARRIERS = [
    pytest.param(
        "horovod", marks=pytest.mark.skipif(not BUILT, reason="Horovod is not built here")
    ),
    "mpi4py",
]


def ranks(what, carrier, **environment):
    """The ended job of `RANKS` ranks, and its seconds."""
    mpi, began = find_mpi(), time.monotonic()
    command = [mpi.command, "-n", str(RANKS), *mpi.flags(), sys.executable, str(JOB), what]
    own = {**thread_environment(1), "CHEXLIB_COLLECTIVES": carrier, **environment}
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300
    )
    return done, time.monotonic() - began


@pytest.fixture(scope="module", params=CARRIERS)
def found(request):
    done, _ = ranks("agree", request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "asked": request.param}


def test_sums_over_ranks_are_those_of_numpy_in_a_graph_too(found):
    wanted = [np.sum(arrays, axis=0) for arrays in zip(*map(shares, range(RANKS)), strict=True)]
    for rank in found["ranks"]:
        for way in ("eager", "graph"):
            for got, want in zip(rank[way], wanted, strict=True):
                assert np.shape(got) == want.shape or not want.size
                np.testing.assert_allclose(np.reshape(got, want.shape), want, rtol=1e-5, atol=1e-6)


def test_collectives_that_do_not_depend_on_each_other_are_not_mixed_up(found):
    for rank in found["ranks"]:
        assert rank["order"] == [4 * 6.0 * i for i in range(20)]
        assert rank["loop"] == [6.0 * RANKS * RANKS] * 2
        assert rank["rows"] == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]


def test_every_rank_gets_the_average_the_values_and_the_errors_of_the_others(found):
    for rank in found["ranks"]:
        assert rank["average"] == [[[2.0, 2.0], [2.0, 2.0]], 2.0]
        assert rank["broadcast"] == [[[5.0, 5.0], [5.0, 5.0]], 2.0]
        assert rank["shared"] == {"of": 0} and rank["gathered"] == ["", "x", "xx"]
        assert rank["refused"] == "refused on rank 0"


def test_a_rank_says_what_carries_its_collectives(found):
    assert (
        found["carrier"].lower().startswith(found["asked"])
        and found["identity"]["carrier"] == found["carrier"]
    )
    assert bool(found["identity"]["why"]) == (found["asked"] == "mpi4py")


def test_a_rank_that_stays_away_is_named_and_given_up():
    settings = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "5"}
    done, seconds = ranks("away", "mpi4py", **settings)
    assert done.returncode != 0 and seconds < 60
    assert stalled_ranks(done.stderr) == [1]
    assert "rank 1 kept the others waiting for more than 5 s" in done.stderr


def test_a_rank_that_ends_alone_does_not_leave_the_others_waiting():
    done, _ = ranks("alone", "mpi4py")
    assert done.returncode != 0 and "rank 1 has ended" in done.stderr


def test_a_rank_may_go_on_by_itself_when_the_others_have_ended():
    done, _ = ranks("later", "mpi4py")
    assert (done.returncode, done.stdout) == (0, "rank 0 is done\n"), done.stderr[-2000:]


@pytest.fixture
def fresh(monkeypatch):
    """No carrier yet in this process."""
    monkeypatch.setattr(collectives, "_CARRIER", [])
    return monkeypatch


def test_without_horovod_one_line_says_that_mpi4py_carries_and_why(fresh, caplog):
    fresh.setitem(sys.modules, "horovod", None)  # as if it were not installed
    fresh.delenv("CHEXLIB_COLLECTIVES", raising=False)
    assert collectives.carrier() is collectives.carrier()
    (line,) = caplog.messages
    assert line.startswith("Ranks communicate through mpi4py 4") and "\n" not in line
    assert "Horovod is not built here" in line


def test_a_horovod_of_another_tensorflow_gives_way_to_mpi4py(fresh, tmp_path, caplog):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (tmp_path / "horovod" / "tensorflow.py").write_text(
        "raise OSError('undefined symbol: _ZN10tensorflow')"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        fresh.delitem(sys.modules, name)
    fresh.syspath_prepend(tmp_path)
    fresh.delenv("CHEXLIB_COLLECTIVES", raising=False)
    assert collectives.carrier().name.startswith("mpi4py")
    assert "Horovod is not built here (undefined symbol" in caplog.text


def test_a_carrier_that_is_not_there_or_unknown_is_refused_with_the_remedy(fresh):
    fresh.setitem(sys.modules, "horovod", None)
    fresh.setenv("CHEXLIB_COLLECTIVES", "horovod")
    with pytest.raises(ClusterError, match="needs no compiler"):
        collectives.carrier()
    fresh.setenv("CHEXLIB_COLLECTIVES", "nccl")
    for find in (collectives.carrier, collectives.join_world, collectives.expected_carrier):
        with pytest.raises(ConfigError, match="'nccl' is not accepted"):
            find()


def test_what_is_expected_to_carry_is_known_without_loading_it():
    code = "import sys; from chexlib.collectives import expected_carrier as e; print(*e());"
    code += "print({'tensorflow', 'horovod', 'mpi4py'} & set(sys.modules))"
    for wanted, said in {
        "mpi4py": "mpi4py CHEXLIB_COLLECTIVES asks for it",
        "horovod": "horovod ",
    }.items():
        own = {**os.environ, "CHEXLIB_COLLECTIVES": wanted}
        out = subprocess.run(
            [sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True
        ).stdout
        assert out.splitlines() == [said, "set()"]
