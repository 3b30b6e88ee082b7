"""The Slurm script: clean shell, what it asks for, and a training by it on two hosts, srun played
by mpiexec.
"""

import json
import os
import shlex
import signal
import subprocess
import sys

import pandas as pd
import pytest
from small_training import config_for

from benchmarks.lab.emulated import EmulatedHosts, why_not
from chexlib.cluster.slurm import launch_script
from chexlib.errors import ConfigError
from chexlib.files import ROOT
from chexlib.mpi import find_mpi, thread_environment

# Takes srun's place: the ranks that it is asked for, on the hosts, with the environment that Slurm
# would hand over.
SRUN = """#!/bin/bash
set -euo pipefail
for word in "$@"; do case "$word" in --ntasks=*) n="${word#*=}" ;; esac; done
while [[ $1 == -* ]]; do shift; done
exec MPIEXEC -n "$n" FLAGS "$@"
"""


@pytest.fixture
def script(tmp_path):
    settings = {
        "nodes": 256,
        "per_node": 2,
        "threads": 22,
        "spare": 2,
        "hours": 1.25,
    }
    (file := tmp_path / "train.sbatch").write_text(
        launch_script("settings of mine.json", **settings)
    )
    return file


@pytest.mark.parametrize("check", [["bash", "-n"], ["shellcheck", "--severity=style"]])
def test_the_script_for_256_nodes_is_clean_shell(script, check):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    answer = subprocess.run(
        [*check, str(script)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_script_asks_for_nodes_ranks_threads_and_time(script):
    lines = script.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {
        "--nodes=256",
        "--ntasks-per-node=2",
        "--cpus-per-task=24",
        "--time=01:15:00",
    } <= {*asked}
    assert {"--exclusive", "--hint=nomultithread"} <= {*asked}  # whole nodes, and a core a thread
    exported = dict(
        line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export ")
    )
    assert thread_environment(22).items() <= exported.items()
    assert exported["OMPI_MCA_btl_tcp_flags"] == "send"  # where its ranks speak over TCP
    assert any("'settings of mine.json'" in line for line in lines)


# Takes srun's place: one rank that stops as trainings do.
STOPPED = """#!PYTHON
import time
from chexlib import stopping
stopping.listen()
print("listening", flush=True)
until = time.monotonic() + 60
while not stopping.requested() and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(0.5)  # its checkpoint
print("stopped" if stopping.requested() else "time limit", flush=True)
"""


def test_what_slurm_sends_ahead_of_the_time_limit_stops_the_training(script, tmp_path):
    lines = script.read_text().splitlines()
    (sent,) = [
        line.split("B:")[1].split("@")[0] for line in lines if line.startswith("#SBATCH --signal=")
    ]
    (tmp_path / "srun").write_text(STOPPED.replace("PYTHON", sys.executable))
    (tmp_path / "srun").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    job = subprocess.Popen(
        ["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "listening\n"
    job.send_signal(signal.Signals[f"SIG{sent}"])  # to the script alone: that is what B: says
    told, _ = job.communicate(timeout=60)
    assert (told, job.returncode) == ("stopped\n", 0)  # the script waited for the checkpoint


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"threads": 0}, {"hours": 0}, {"spare": -1}])
def test_a_script_that_cannot_run_is_refused(wrong):
    with pytest.raises(ConfigError, match="is not accepted"):
        launch_script("train.json", **{"nodes": 2, "per_node": 2, "threads": 1, **wrong})


def test_srun_is_asked_for_what_the_batch_system_was(script):
    text = script.read_text()
    asked = dict(
        line.removeprefix("#SBATCH ").partition("=")[::2]
        for line in text.splitlines()
        if "#SBATCH" in line
    )
    (step,) = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("srun")]
    flags = dict(word.partition("=")[::2] for word in shlex.split(step) if word.startswith("--"))
    for name in ("--nodes", "--ntasks-per-node", "--cpus-per-task"):
        assert flags[name] == asked[name], name
    assert int(flags["--ntasks"]) == int(asked["--nodes"]) * int(asked["--ntasks-per-node"])
    assert flags["--kill-on-bad-exit"] == "1" and '"${SLURM_MPI_TYPE:-pmix}"' in text


def test_ranks_that_mpi_did_not_join_do_not_train_each_on_its_own(phantom, tmp_path):
    """As where srun's --mpi does not fit the MPI of the ranks: each would take itself for the only
    one.
    """
    config = config_for(phantom, tmp_path / "run", epochs=1, max_steps=1, batch_size=2)
    (tmp_path / "train.json").write_text(json.dumps(config.to_dict()))
    text = launch_script(f"{tmp_path}/train.json", nodes=2, per_node=2, threads=1)
    (tmp_path / "train.sbatch").write_text(text.replace(".venv/bin/python", sys.executable))
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    own = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_STEP_NUM_TASKS": "4",
    }
    command = ["bash", str(tmp_path / "train.sbatch")]
    answer = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300
    )
    assert (
        answer.returncode != 0
        and "4 processes were started, but MPI joined 1 of them" in answer.stderr
    )
    assert not list((tmp_path / "run").glob("*.keras"))


@pytest.mark.cores
@pytest.mark.hosts
@pytest.mark.skipif(bool(reason := why_not()), reason=reason)
def test_the_script_trains_on_two_hosts(phantom, tmp_path):
    config = config_for(phantom, tmp_path / "run", epochs=1, max_steps=2, batch_size=2)
    (tmp_path / "train.json").write_text(json.dumps(config.to_dict()))
    text = launch_script(f"{tmp_path}/train.json", nodes=2, per_node=1, threads=1)
    (tmp_path / "train.sbatch").write_text(text.replace(".venv/bin/python", sys.executable))
    mpi = find_mpi()
    with EmulatedHosts(2) as hosts:
        passed = [*thread_environment(1), "CHEXLIB_CACHE"]
        flags = [*mpi.flags(hosts.slots(1), hosts.network, passed), *hosts.agent_flags]
        srun = SRUN.replace("MPIEXEC", shlex.quote(mpi.command)).replace("FLAGS", shlex.join(flags))
        (tmp_path / "srun").write_text(srun)
        (tmp_path / "srun").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = hosts[0].wrap(["timeout", "500", "bash", str(tmp_path / "train.sbatch")])
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr[-3000:]
        told = json.loads(
            next(line for line in answer.stdout.splitlines() if line.startswith('{"model"'))
        )
    assert told["ranks"] == 2 and os.path.exists(told["model"])
    steps = pd.read_parquet(tmp_path / "run" / "steps.parquet")
    # A rank with one thread once noted the beginning of a step at its end: microseconds.
    assert len(steps) == 2 and steps["fastest"].min() > 1e-4
