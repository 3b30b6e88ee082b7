"""Engines beyond this host: two hosts (made of namespaces, where root can), Slurm (in effigy), and
their settings.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from hosts_job import MARKER, notebook, write_slurm
from test_distributed import nothing_left
from test_engines_unit import HYDRA, INTEL, OPEN_MPI_4, OPEN_MPI_5
from two_hosts import Recording, TwoHosts

from benchmarks.lab.emulated import INTERFACE, why_not
from chexlib.cluster.engines import mpi_engines
from chexlib.cluster.sites import Site, find_site
from chexlib.collectives import identify
from chexlib.errors import ClusterError, ConfigError
from chexlib.files import ROOT
from chexlib.mpi import LOOPBACK, recognise_mpi
from chexlib.phantom.write import write_phantom

REASON = why_not()
ENGINE = "-m ipyparallel.engine "


def on_two_hosts(test):
    return pytest.mark.cores(
        pytest.mark.hosts(pytest.mark.skipif(bool(REASON), reason=REASON)(test))
    )


@pytest.fixture(scope="module")
def hosts():
    with TwoHosts() as hosts:
        yield hosts


def within(seconds, what):
    """Does `what()` come to hold?"""
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.1)
    return what()


def send(number, pids):
    for pid in pids:
        os.kill(pid, number)


def nothing_runs(hosts):
    return not hosts.a.processes() and not hosts.b.processes()


@pytest.fixture(scope="module")
def training(hosts, tmp_path_factory):
    """What a training over two hosts told, and a recording of all that crossed the cable."""
    folder = tmp_path_factory.mktemp("training")
    phantom = write_phantom(folder / "phantom", n_images=70, size=32, min_prevalence=0.1, workers=1)
    job = {"data_dir": str(phantom), "run_dir": str(folder)}
    with Recording(hosts.a) as wire, notebook(hosts, folder, **job) as told:
        seen = {**told("hosts"), **told("echo"), **told("steps"), **told("fit"), **told("ended")}
        gone = within(20, lambda: nothing_runs(hosts))
    return SimpleNamespace(**seen, run=folder, wire=wire, gone=gone)


@pytest.fixture(scope="module")
def unencrypted(hosts, tmp_path_factory):
    """The same without encryption, up to a marker's way to the engines and back; then they hang in
    a collective.
    """
    folder = tmp_path_factory.mktemp("unencrypted")
    with notebook(hosts, folder, clear=True, hold=True) as told:
        with Recording(hosts.a) as wire:
            seen = {**told("hosts"), **told("echo"), **told("waiting")}
            time.sleep(1)  # now rank 1 is in the collective as well
        yield SimpleNamespace(**seen, told=told, wire=wire)


@on_two_hosts
def test_engines_on_two_hosts_are_one_world_and_gone_afterwards(training):
    assert training.hosts == ["hostA", "hostB"]
    assert "2 MPI engines on 2 hosts" in training.html
    assert training.gone and not Path(training.folder).exists()


@on_two_hosts
def test_twenty_steps_leave_equal_weights_on_both_hosts(training):
    first, second = training.steps
    assert [first["host"], second["host"]] == ["hostA", "hostB"]
    assert (first["rank"], second["rank"]) == (0, 1) and first["ranks"] == second["ranks"] == 2
    assert first["start"] != second["start"] and first["common"] == second["common"]
    assert len(first["fed"]) == 20 and not set(first["fed"]) & set(second["fed"])
    assert first["steps"] == second["steps"] == 20
    assert first["end"] == second["end"] != first["common"]
    # `fit` compares the ranks' weights by itself, and raises if they differ.
    assert training.fit["ranks"] == 2 and Path(training.fit["model"]).exists()
    assert len(pd.read_parquet(training.run / "steps.parquet")) == 20


@on_two_hosts
def test_gradients_cross_the_cable_but_no_argument_and_no_key(training):
    mpi = [size for _, size in training.wire.sizes.most_common(2)]  # there and back
    assert min(mpi) > 20 * 900_000 * 4
    assert training.wire.dropped == 0
    assert (
        training.folder in training.wire
    )  # a variable that mpiexec hands over: what it sends can be read
    assert len(training.keys) == 2
    assert all(len(key) >= 40 and key not in training.wire for key in training.keys)
    assert training.echo == [MARKER, MARKER] and MARKER not in training.wire


@on_two_hosts
def test_without_encryption_the_argument_could_be_read(unencrypted):
    assert MARKER in unencrypted.wire
    (key,) = unencrypted.keys  # signs messages; it is handed over in the shared folder
    assert key not in unencrypted.wire


@on_two_hosts
def test_engines_end_by_themselves_when_the_cable_is_cut(hosts, unencrypted):
    assert hosts.b.processes(ENGINE)
    hosts.a.ip_command(f"link set {INTERFACE} down")
    try:
        assert within(25, lambda: not hosts.b.processes(ENGINE))
        assert "rank 1 on hostB" in unencrypted.told("error")["error"]
        unencrypted.told("ended")
        assert within(20, lambda: not hosts.a.processes())
    finally:
        hosts.a.ip_command(f"link set {INTERFACE} up")


@on_two_hosts
@pytest.mark.usefixtures("without_tensorflow")
def test_engines_end_by_themselves_when_all_that_started_them_was_killed(hosts, tmp_path):
    with notebook(hosts, tmp_path, hold=True) as told:
        told("waiting")
        time.sleep(1)  # now rank 1 is in a collective
        daemons = hosts.b.processes("prted")  # they would end it, when mpiexec is gone
        doomed = [
            hosts.a.processes(word)
            for word in ("hosts_job.py", "chexlib.cluster.controller", "prterun")
        ]
        assert all(doomed) and daemons and hosts.b.processes(ENGINE)
        send(signal.SIGSTOP, daemons)
        for pid in itertools.chain(*doomed):
            with contextlib.suppress(
                ProcessLookupError
            ):  # an earlier one's end has ended it: as good as killed
                os.kill(pid, signal.SIGKILL)
        assert within(20, lambda: not hosts.b.processes(ENGINE))
        send(signal.SIGCONT, daemons)
        assert within(20, lambda: nothing_runs(hosts))


# Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with commands that do here what Slurm's do: notes of what they were asked are left
    in it.
    """
    write_slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.cores
@pytest.mark.usefixtures("without_tensorflow")
def test_engines_in_slurm_are_one_world_and_can_be_restarted(slurm):
    site = find_site(
        slurm=True, interface=LOOPBACK, options=["--partition=short", "--time=10"], shared=slurm
    )
    with mpi_engines(2, threads=1, site=site) as engines:
        assert [who["rank"] for who in engines.run(identify)] == [0, 1]
        script = (slurm / "script").read_text()
        asked = [
            line.removeprefix("#SBATCH ")
            for line in script.splitlines()
            if line.startswith("#SBATCH")
        ]
        assert {"--ntasks=2", "--cpus-per-task=1", "--partition=short", "--time=10"} <= set(asked)
        subprocess.run(["scancel", "4711"], check=True)  # somebody else, or the time limit
        with pytest.raises(
            ClusterError, match=r"rank [01] on .*|launcher of the engines has ended"
        ):
            engines.run(time.sleep, 60)
        assert within(20, lambda: not engines.launcher_runs())
        engines.restart()
        assert [who["rank"] for who in engines.run(identify)] == [0, 1]
        (slurm / "cancelled").unlink()
    assert (slurm / "cancelled").read_text() == "4711\n"
    assert nothing_left(str(slurm))


@pytest.mark.cores
def test_a_slurm_job_that_ends_early_says_why(slurm):
    (slurm / "broken").touch()
    began = time.monotonic()
    site = find_site(slurm=True, interface=LOOPBACK, shared=slurm)
    with (
        pytest.raises(ClusterError, match="no node wants this") as error,
        mpi_engines(2, threads=1, site=site),
    ):
        pytest.fail("engines came up")
    assert "launcher ended" in str(error.value) and time.monotonic() - began < 60


# Settings


def test_one_host_needs_no_interface():
    assert find_site() == Site() and Site().address == "127.0.0.1"


def test_hosts_are_understood_in_a_list_and_in_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"hostfile cannot be read \(No such file or directory\)"):
        find_site(tmp_path / "hostfile", interface=LOOPBACK)
    (file := tmp_path / "hostfile").write_text(
        "# rack 1\nnode1 slots=4 max_slots=8\n\nnode-2.lan slots = 2 # half\nnode3\n"
    )
    expected = (("node1", 4), ("node-2.lan", 2), ("node3", 1))
    text = "node1:4, node-2.lan:2,node3"
    for hosts in (file, str(file), ["node1:4", "node-2.lan:2", "node3"], text):
        site = find_site(hosts, interface=LOOPBACK, shared=tmp_path, options=["--verbose"])
        assert site == Site(
            expected, "127.0.0.1", "127.0.0.0/8", False, ("--verbose",), str(tmp_path)
        )


def test_a_hostfile_in_this_folder_is_read_and_of_lines_of_one_host_the_slots_are_summed(
    tmp_path, monkeypatch
):
    (tmp_path / "nodes").write_text("node1\nnode1\nnode2\nnode1\n")  # as PBS writes its own
    monkeypatch.chdir(tmp_path)
    site = find_site("nodes", interface=LOOPBACK)
    assert site.hosts == (("node1", 3), ("node2", 1))
    assert find_site("nodes:2", interface=LOOPBACK).hosts == (("nodes", 2),)  # a host's name


@pytest.mark.parametrize(
    "line", ["node1:0", "node1:", "node1:two", "node1 slots=0", "node1 4", "user@node1"]
)
def test_a_host_that_is_not_understood_is_quoted(line):
    with pytest.raises(ConfigError, match=f"the host '{line}' is not accepted"):
        find_site(["node0", line], interface=LOOPBACK)


def test_options_of_slurm_are_one_line_of_its_script_as_they_were_written(slurm):
    site = find_site(slurm=True, interface=LOOPBACK, options=" --time 10  --partition=short ")
    assert site.slurm and site.options == ("--time 10 --partition=short",)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ({"hosts": "node1", "slurm": True}, "Use only one of both"),
        ({"hosts": "node1", "options": "--time=10"}, "slurm_options='--time=10' is not accepted"),
        ({"slurm": True, "options": "time=10"}, "slurm_options='time=10' is not accepted"),
        ({"slurm": True}, "this host has no sbatch"),
        ({"hosts": "a b"}, "'a b' is not accepted"),
    ],
)
def test_a_site_that_cannot_be_is_refused_with_the_value_and_the_next_step(
    monkeypatch, tmp_path, where, named
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=named):
        find_site(**where, interface=LOOPBACK)


def test_notebook_04_starts_its_engines_where_its_parameters_say():
    class Asked(Exception):
        pass

    def ask(n, **settings):
        raise Asked(n, settings)

    cells = [
        cell.source
        for cell in nbformat.read(ROOT / "notebooks" / "04_train_distributed.ipynb", 4).cells
        if cell.cell_type == "code"
        and ("find_site(" in cell.source or "(mpi_engines(" in cell.source)
    ]
    assert len(cells) == 2
    lines = "\n".join(cells).splitlines()
    source = "\n".join(line for line in lines if not line.startswith("%"))
    given = {"engines": 3, "threads": 2, "hosts": "node1:2,node2", "interface": LOOPBACK}
    given |= {"slurm": False, "slurm_options": ""}
    with pytest.raises(Asked) as asked:
        exec(source, {**given, "ExitStack": contextlib.ExitStack, "mpi_engines": ask})
    n, settings = asked.value.args
    assert (n, settings["threads"]) == (3, 2)
    assert settings["site"].hosts == (("node1", 2), ("node2", 1))
    assert settings["site"].address == "127.0.0.1"


@pytest.mark.parametrize("where", [{"hosts": ["node1"]}, {"slurm": True}])
@pytest.mark.parametrize("interface", ["", "eth77"])
def test_an_unknown_interface_is_answered_with_those_there_are(where, interface):
    with pytest.raises(ConfigError, match=rf"interface='{interface}' has no IPv4 .*\b{LOOPBACK}\b"):
        find_site(**where, interface=interface)


def test_more_engines_than_slots_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(
        "subprocess.Popen", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    site = find_site(["node1:2", "node2"], interface=LOOPBACK)
    with (
        pytest.raises(ConfigError, match="engines=4 is more than the 3 slots of the hosts"),
        mpi_engines(4, site=site),
    ):
        pytest.fail("engines came up")


def flags(text, *hosts):
    more = (hosts, "10.0.0.0/24", ["OMP_NUM_THREADS", "PYTHONPATH"]) if hosts else ()
    return " ".join(recognise_mpi("mpiexec", text).flags(*more))


@pytest.mark.parametrize(
    ("text", "across", "here"),
    [
        (
            OPEN_MPI_5,
            "--prtemca prte_if_include 10.0.0.0/24 --mca btl self,sm,tcp",
            "--mca btl self,sm",
        ),
        (
            OPEN_MPI_4,
            "--mca oob_tcp_if_include 10.0.0.0/24 --mca btl self,vader,tcp",
            "--mca btl self,vader",
        ),
        (HYDRA, "-hosts a:2,b:1", f"-iface {LOOPBACK}"),
        (INTEL, "-genv I_MPI_FABRICS shm:ofi", "-genv I_MPI_FABRICS shm"),
    ],
)
def test_each_mpi_is_told_of_hosts_in_its_own_words_and_else_stays_here(text, across, here):
    alone, several = flags(text) + " ", flags(text, ("a", 2), ("b", 1)) + " "
    assert (
        f"{here} " in alone
        and f"{here} " not in several
        and "host" not in alone
        and "10.0.0.0" not in alone
    )
    assert (
        f"{across} " in several
        and ("--host" if "Open MPI" in text else "-hosts") + " a:2,b:1 " in several
    )
    exported = "--mca btl_tcp_flags send --mca btl_tcp_if_include 10.0.0.0/24 -x OMP_NUM_THREADS -x PYTHONPATH "
    assert (exported in several) is ("Open MPI" in text)
