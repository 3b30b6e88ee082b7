"""The MPI at hand is recognised, each rank gets its threads, and no process outlives its notebook."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from chexlib import mpi as profiles
from chexlib.cluster import cleanup, faults
from chexlib.cluster.cleanup import end_members, members
from chexlib.cluster.engines import mpi_engines
from chexlib.cluster.launch import launcher_settings
from chexlib.cluster.sites import Site
from chexlib.errors import ClusterError, ConfigError
from chexlib.mpi import find_mpi, recognise_mpi, thread_environment

OPEN_MPI_5 = (
    "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
)
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.6\n\nReport bugs to http://www.open-mpi.org/community/help/\n"
OPEN_RTE_4 = "mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n"
PRRTE_3 = "prterun (PRRTE) 3.0.11\n\nReport bugs to https://github.com/openpmix/prrte/\n"
HYDRA = """HYDRA build details:
    Version:                                 4.2.1
    Release Date:                            Wed Apr 17 15:30:02 CDT 2024
    CC:                              gcc -Wdate-time -D_FORTIFY_SOURCE=3
    Configure options:                       '--disable-option-checking' '--prefix=/usr' '--with-hwloc-prefix=/usr'
    Process Manager:                         pmi
    Launchers available:                     ssh rsh fork slurm ll lsf sge manual persist
    Resource management kernels available:   user slurm ll lsf sge pbs cobalt
"""
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701 (id: 179630a)\nCopyright 2003-2024\n"
SLEEPER = "import time; time.sleep(120)"


@pytest.mark.parametrize(
    ("text", "family", "major", "version"),
    [
        (OPEN_MPI_5, "Open MPI", 5, "mpiexec (Open MPI) 5.0.11"),
        (OPEN_MPI_4, "Open MPI", 4, "mpirun (Open MPI) 4.1.6"),
        (OPEN_RTE_4, "Open MPI", 4, "mpiexec (OpenRTE) 4.1.4"),
        (HYDRA, "MPICH", 0, "HYDRA build details:"),
        (INTEL, "Intel MPI", 0, INTEL.splitlines()[0]),
        ("\n\n" + OPEN_MPI_5, "Open MPI", 5, "mpiexec (Open MPI) 5.0.11"),
    ],
)
def test_mpi_is_recognised_by_its_version_text(text, family, major, version):
    mpi = recognise_mpi("/opt/mpiexec", text)
    assert (mpi.command, mpi.family, mpi.major, mpi.version) == (
        "/opt/mpiexec",
        family,
        major,
        version,
    )


def test_prrte_3_is_open_mpi_5s_runtime_and_gets_its_flags():
    assert recognise_mpi("prterun", PRRTE_3).flags() == recognise_mpi("mpiexec", OPEN_MPI_5).flags()


@pytest.mark.parametrize(
    "text", ["", "srun: slurm 23.02.6\n", "mpiexec: command not found", "5.0.11"]
)
def test_an_unknown_mpi_is_an_error_that_quotes_it_and_names_the_known(text):
    with pytest.raises(ClusterError, match="Open MPI 4 and 5, MPICH, Intel MPI") as error:
        recognise_mpi("/opt/odd/mpiexec", text)
    assert "/opt/odd/mpiexec" in str(error.value)
    assert text.strip() in str(error.value)


def flags(text):
    return " ".join(recognise_mpi("mpiexec", text).flags())


@pytest.mark.parametrize("text", [OPEN_MPI_4, OPEN_MPI_5])
def test_open_mpi_ranks_are_unbound_and_yield_when_idle(text):
    assert "--bind-to none" in flags(text)
    assert "--mca mpi_yield_when_idle 1" in flags(text)


def test_open_mpi_flags_follow_the_major_version():
    # `vader` became `sm`, `--oversubscribe` became a modifier of --map-by, and oob is gone.
    assert "--map-by :OVERSUBSCRIBE" in flags(OPEN_MPI_5)
    assert "self,sm" in flags(OPEN_MPI_5)
    assert "vader" not in flags(OPEN_MPI_5)
    assert "oob_tcp" not in flags(OPEN_MPI_5)
    assert "--oversubscribe" in flags(OPEN_MPI_4)
    assert "self,vader" in flags(OPEN_MPI_4)


@pytest.mark.parametrize("text", [OPEN_MPI_4, OPEN_MPI_5])
@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed_for_root_alone(monkeypatch, text, user, allowed):
    monkeypatch.setattr(profiles.os, "geteuid", lambda: user)
    assert ("--allow-run-as-root" in flags(text)) is allowed


def test_other_families_get_no_flag_of_open_mpi():
    for text in (HYDRA, INTEL):
        assert "--mca" not in flags(text)
        assert "--allow-run-as-root" not in flags(text)
    assert "-bind-to none" in flags(HYDRA)
    assert "-genv I_MPI_PIN 0" in flags(INTEL)


def test_the_mpi_of_this_environment_is_open_mpi_5_and_takes_its_flags():
    mpi = find_mpi()
    assert (mpi.family, mpi.major) == ("Open MPI", 5)
    answer = subprocess.run(
        [mpi.command, *mpi.flags(), "-n", "2", sys.executable, "-c", "print('here')"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.stdout.split() == ["here", "here"], answer.stderr


# What batch systems, their launchers and other MPI jobs leave in the environment of a notebook.
ALLOCATIONS = {
    "Slurm": {
        "SLURM_JOBID": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "node-[a-b]",
        "SLURM_TASKS_PER_NODE": "1(x2)",
    },
    "a shell within a job": {"SLURM_JOBID": "1", "SLURM_JOB_ID": "1"},
    "PBS": {"PBS_JOBID": "1", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_NODEFILE": "/none"},
    "Grid Engine": {"SGE_ROOT": "/none", "ARC": "x", "PE_HOSTFILE": "/none", "JOB_ID": "1"},
    "LSF": {"LSB_JOBID": "1", "LSB_HOSTS": "node-a node-b", "LSB_DJOB_HOSTFILE": "/none"},
    "a rank": {"PMIX_RANK": "0", "PMIX_NAMESPACE": "x", "PMI_FD": "9", "OMPI_COMM_WORLD_SIZE": "2"},
    "no home": {},
}


@pytest.mark.parametrize("system", ALLOCATIONS)
def test_ranks_of_this_host_alone_start_whatever_surrounds_the_notebook(monkeypatch, system):
    for name, value in ALLOCATIONS[system].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOME")
    mpi = find_mpi()
    show = "import os; print(os.environ['HOME'], 'SLURM_JOBID' in os.environ)"
    answer = subprocess.run(
        [*mpi.start(), *mpi.flags(), "-n", "2", sys.executable, "-c", show],
        capture_output=True,
        text=True,
        timeout=60,
    )
    home = os.path.expanduser("~")
    assert answer.stdout.splitlines() == [f"{home} False"] * 2, answer.stderr


def test_what_a_killed_launcher_left_is_removed_before_another_has_its_number(
    tmp_path, monkeypatch
):
    """Open MPI 5 fails where the folder of its process number is there: seen in 1 of 300 starts on
    a machine on which launchers had been killed.
    """
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    kept = {"alive": (os.getpid(), host), "elsewhere": (ended.pid, "another-host")}
    folders = {}
    for name, (number, on) in {"dead": (ended.pid, host), **kept}.items():
        folders[name] = tmp_path / name / f"ompi.{number}"
        folders[name].mkdir(parents=True)
        (folders[name] / f"pmix.{on}.tool.{number}").write_text("")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        find_mpi().start()
    assert [name for name, folder in folders.items() if folder.exists()] == list(kept)


def test_a_command_of_mpiexec_is_plain_where_nothing_is_in_its_way(monkeypatch):
    for name in list(os.environ):
        if profiles._ALLOCATION.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/me")
    mpi = recognise_mpi("mpiexec", OPEN_MPI_5)
    monkeypatch.setenv("PMIX_MCA_gds", "hash")  # a setting of the user's
    assert mpi.start() == ["mpiexec"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert mpi.start() == ["env", "-u", "SLURM_JOB_ID", "mpiexec"]
    assert mpi.start(alone=False) == ["mpiexec"]  # hosts of the allocation are wanted
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(profiles.os.path, "expanduser", lambda path: path)  # in no list of users
    assert mpi.start(alone=False) == ["env", f"HOME={tempfile.gettempdir()}", "mpiexec"]


@pytest.fixture
def in_a_rank_of_a_job(monkeypatch):
    """As in a notebook that `srun` has started within an allocation."""
    for name in list(os.environ):
        if profiles._ALLOCATION.match(name):
            monkeypatch.delenv(name)
    variables = ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_CONF", "SLURM_MPI_TYPE", "PMIX_RANK")
    for name in variables:
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("in_a_rank_of_a_job")
def test_engines_of_an_allocation_use_it_but_are_no_part_of_the_notebooks_own_mpi_job():
    mpi = recognise_mpi("mpiexec", OPEN_MPI_5)
    assert mpi.start(alone=False) == ["env", "-u", "PMIX_RANK", "mpiexec"]
    own = ["-u", "PMIX_RANK", "-u", "SLURM_JOB_ID", "-u", "SLURM_MEM_PER_NODE"]
    assert mpi.start() == ["env", *own, "mpiexec"]


@pytest.mark.usefixtures("in_a_rank_of_a_job")
@pytest.mark.parametrize(
    ("joined", "flags"),
    [(True, "--kill-on-bad-exit=1"), (False, "--kill-on-bad-exit=0 --mpi=none")],
)
def test_engines_that_slurm_places_take_nothing_from_the_allocation_of_the_notebook(joined, flags):
    mpi, site = recognise_mpi("mpiexec", OPEN_MPI_5), Site(slurm=True, shared="/shared")
    settings = launcher_settings(site, mpi, 2, 60, "/shared/x", joined=joined)
    launcher = settings.SlurmEngineSetLauncher
    own = ["-u", "PMIX_RANK", "-u", "SLURM_JOB_ID", "-u", "SLURM_MEM_PER_NODE"]
    assert launcher.submit_command == ["env", *own, "sbatch"]
    assert launcher.namespace["flags"] == flags


def test_ranks_start_within_a_rank_of_another_job():
    mpi = find_mpi()
    nested = (
        "import subprocess, sys\n"
        "from chexlib.mpi import find_mpi\n"
        "mpi = find_mpi()\n"
        "show = 'import os; print(os.environ[\"OMPI_COMM_WORLD_SIZE\"])'\n"
        "words = [*mpi.start(), '-n', '2', *mpi.flags(), sys.executable, '-c', show]\n"
        "sys.exit(subprocess.run(words).returncode)\n"
    )
    words = [*mpi.start(), "-n", "1", *mpi.flags(), sys.executable, "-c", nested]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert answer.stdout.split() == ["2", "2"], answer.stderr


def test_a_missing_mpiexec_is_an_error_with_the_next_step(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    find_mpi.cache_clear()
    try:
        with pytest.raises(ClusterError, match="make env"):
            find_mpi()
    finally:
        find_mpi.cache_clear()


def test_threads_are_set_for_openmp_and_tensorflow():
    one, three = thread_environment(1), thread_environment(3)
    assert (
        one["OMP_NUM_THREADS"]
        == one["TF_NUM_INTRAOP_THREADS"]
        == one["TF_NUM_INTEROP_THREADS"]
        == "1"
    )
    assert three["OMP_NUM_THREADS"] == three["TF_NUM_INTRAOP_THREADS"] == "3"
    assert all(isinstance(value, str) for value in three.values())


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused_with_the_number(threads):
    with pytest.raises(ConfigError, match=f"threads={threads} "):
        thread_environment(threads)


@pytest.mark.parametrize(
    ("settings", "named"),
    [((0, 0), "engines=0 "), ((-2, 0), "engines=-2 "), ((1, -1), "threads=-1 ")],
)
def test_impossible_engines_are_refused_with_the_number_before_anything_starts(
    monkeypatch, settings, named
):
    monkeypatch.setattr(
        "subprocess.Popen", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    monkeypatch.setattr(
        "tempfile.mkdtemp", lambda *args, **kwargs: pytest.fail("a folder was made")
    )
    find_mpi.cache_clear()
    monkeypatch.setattr(
        "chexlib.cluster.engines.find_mpi", lambda: recognise_mpi("mpiexec", OPEN_MPI_5)
    )
    n, threads = settings
    with pytest.raises(ConfigError, match=named), mpi_engines(n, threads=threads):
        pytest.fail("engines came up")


@pytest.fixture
def sleeper():
    """A function that starts a process as ipyparallel would, marked by a profile folder."""
    started = []

    def start(profile_dir, program=SLEEPER):
        process = subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True); {program}"],
            env={**os.environ, "IPP_PROFILE_DIR": str(profile_dir)},
            stdout=subprocess.PIPE,
        )
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def watchdog(profile_dir):
    return subprocess.Popen(
        [sys.executable, "-m", "chexlib.cluster.cleanup", str(profile_dir)], stdin=subprocess.PIPE
    )


@pytest.mark.parametrize("last_word", [b"", b"don"])
def test_engines_are_ended_and_their_folder_removed_when_the_notebook_is_gone(
    tmp_path, sleeper, last_word
):
    folder, other = tmp_path / "cluster-a", tmp_path / "cluster-b"
    folder.mkdir()
    engine, stranger = sleeper(folder), sleeper(other)
    guard = watchdog(folder)
    assert engine.poll() is None
    guard.stdin.write(last_word)
    guard.stdin.close()  # what the system does when the notebook's process dies
    assert engine.wait(timeout=60) == -15
    assert guard.wait(timeout=60) == 0
    assert stranger.poll() is None
    assert not folder.exists()


def test_engines_are_left_alone_after_a_normal_end(tmp_path, sleeper):
    folder = tmp_path / "cluster-c"
    folder.mkdir()
    engine, guard = sleeper(folder), watchdog(folder)
    guard.communicate(b"done", timeout=60)
    assert guard.returncode == 0
    assert engine.poll() is None
    assert folder.exists()


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells which signals a process ignores"
)
def test_the_watchdog_outlives_ctrl_c_and_terminate(tmp_path, sleeper):
    engine, guard = sleeper(tmp_path / "cluster-d"), watchdog(tmp_path / "cluster-d")
    started, handled = time.monotonic(), False
    while not handled and time.monotonic() - started < 60:  # until its handlers are set
        ignored = int(
            Path(f"/proc/{guard.pid}/status").read_text().split("SigIgn:")[1].split()[0], 16
        )
        handled = all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))
        time.sleep(0.1)
    assert handled
    for number in (signal.SIGINT, signal.SIGTERM):
        guard.send_signal(number)
    time.sleep(0.3)
    assert guard.poll() is None
    guard.stdin.close()
    assert engine.wait(timeout=60) == -15
    assert guard.wait(timeout=60) == 0


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path, sleeper, monkeypatch):
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    stubborn = sleeper(tmp_path / "cluster-e", f"{ignore}; {SLEEPER}")
    stubborn.stdout.readline()
    monkeypatch.setattr(cleanup, "PATIENCE", 0.5)
    assert end_members(str(tmp_path / "cluster-e")) == 1
    assert not psutil.pid_exists(stubborn.pid)


def test_members_are_the_processes_of_that_folder_without_the_caller(
    tmp_path, sleeper, monkeypatch
):
    folder = str(tmp_path / "cluster-f")
    monkeypatch.setenv("IPP_PROFILE_DIR", folder)
    process = sleeper(folder)
    assert [member.pid for member in members(folder)] == [process.pid]
    assert members(str(tmp_path / "cluster-g")) == []
    assert end_members(str(tmp_path / "cluster-g")) == 0


def test_ranks_of_a_measurement_end_with_the_process_that_was_killed_while_it_measured(tmp_path):
    script = (
        "import os, subprocess, sys\n"
        "from chexlib.cluster.cleanup import no_longer_than_this\n"
        "with no_longer_than_this() as guarded:\n"
        f"    command = [sys.executable, '-c', {SLEEPER!r}]\n"
        "    rank = subprocess.Popen(command, env={**os.environ, **guarded})\n"
        "    print(rank.pid, guarded['IPP_PROFILE_DIR'], flush=True)\n"
        "    rank.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        pid, folder = process.stdout.readline().split()
        rank = psutil.Process(int(pid))
        process.kill()
    _, alive = psutil.wait_procs([rank], timeout=30)
    until = time.monotonic() + 30
    while Path(folder).exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive and not Path(folder).exists() and not cleanup.memory_folder(folder).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who sees the processes of others")
def test_root_does_not_end_what_is_another_users(tmp_path, sleeper):
    folder = tmp_path / "cluster-h"
    own = sleeper(folder)
    others = sleeper(folder, f"import os; os.setuid(65534); print(flush=True); {SLEEPER}")
    others.stdout.readline()
    assert [member.pid for member in members(str(folder))] == [own.pid]
    assert end_members(str(folder)) == 1
    assert others.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it lies in the cluster's folder")
def test_the_memory_of_killed_ranks_goes_with_their_folder(tmp_path):
    folder = tmp_path / f"{cleanup.PREFIX}{os.getpid()}"
    folder.mkdir()
    cleanup.sign(folder)
    owner = json.loads((folder / cleanup.OWNER).read_text())
    noted = Path(cleanup.SHARED_MEMORY) / f"segment-{os.getpid()}"
    memory = cleanup.memory_folder(folder)
    memory.mkdir()
    elsewhere = tmp_path / "precious"
    for path in (noted, memory / "sm_segment.0", elsewhere):
        path.touch()
    (folder / cleanup.OWNER).write_text(
        json.dumps({**owner, "pid": 2**22 + 1, "shared": [str(noted), str(elsewhere)]})
    )
    cleanup.sweep(tmp_path)
    assert not noted.exists() and not memory.exists() and not folder.exists()
    assert elsewhere.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_memory_that_another_user_has_put_in_the_way_is_not_used_and_not_removed(tmp_path):
    folder, theirs = tmp_path / f"{cleanup.PREFIX}taken-{os.getpid()}", tmp_path / "precious"
    folder.mkdir()
    theirs.mkdir()
    (theirs / "thesis").touch()
    link = cleanup.memory_folder(folder)
    link.symlink_to(theirs)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    try:
        assert cleanup.memory_variables(folder) == {}
        cleanup.remove(folder)
        assert (theirs / "thesis").exists() and link.is_symlink() and not folder.exists()
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "process rank 1 with PID 7 on node b exited on signal 9 (Killed).",
            "rank 1 on b died of",
        ),
        ("prterun: out of memory", "the launcher of the engines has ended"),
    ],
)
def test_a_launcher_that_ends_before_its_ranks_are_missed_still_says_which_died(said, told):
    answer = SimpleNamespace(wait=lambda timeout: False, data=None, exception=lambda: None)
    engines = SimpleNamespace(
        identities=[{"rank": 0, "host": "a", "pid": 1}, {"rank": 1, "host": "b", "pid": 7}],
        cluster=SimpleNamespace(
            controller=SimpleNamespace(process=SimpleNamespace(pid=os.getpid()))
        ),
        launcher_runs=lambda: False,
        output=lambda: said,
    )
    with pytest.raises(ClusterError, match=told):
        faults.follow(engines, [answer, answer], None, None, "train")
