"""What is read off a processor, and what follows from it."""

import os
import subprocess
import sys

import pytest

from chexlib import machine
from chexlib.machine import cores, hardware, native_precision, processor_flags, topology
from chexlib.training.config import TrainConfig

ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd4f

processor\t: 1
Features\t: fp
CPU part\t: 0xd4e
"""  # a Neoverse V2, as the kernel tells it on aarch64, with another core beside it


@pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot bind a process to processors")
def test_cores_are_those_this_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that lays out a machine as the kernel would: for each processor its socket, core
    and node.
    """

    def make(*processors, flags=""):
        for cpu, (socket, core, _) in enumerate(processors):
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "physical_package_id").write_text(f"{socket}\n")
            (folder / "core_id").write_text(f"{core}\n")
        for node in {node for _, _, node in processors}:
            folder = tmp_path / "node" / f"node{node}"
            folder.mkdir(parents=True)
            mine = [str(cpu) for cpu, (_, _, n) in enumerate(processors) if n == node]
            (folder / "cpulist").write_text(",".join(mine) + "\n")
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu avx2 {flags}\n")
        monkeypatch.setattr(machine, "_SYSTEM", tmp_path)
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda pid: set(range(len(processors))), raising=False
        )
        processor_flags.cache_clear()

    yield make
    processor_flags.cache_clear()


def test_two_sockets_of_two_cores_with_two_threads_each(pretend):
    pretend(*[(socket, core, socket) for _ in range(2) for socket in (0, 1) for core in (0, 1)])
    assert topology() == {"sockets": 2, "numa_nodes": 2, "physical_cores": 4, "processors": 8}


def test_a_kernel_that_tells_nothing_has_one_socket_of_as_many_cores(pretend, monkeypatch):
    pretend()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert topology() == {"sockets": 1, "numa_nodes": 1, "physical_cores": 3, "processors": 3}


# A container's limit as the kernel tells it: lines of /proc/self/cgroup, files, and the cores left.
QUOTAS = {
    "version 2": ("0::/\n", {"cpu.max": "200000 100000"}, 2),
    "no limit": ("0::/\n", {"cpu.max": "max 100000"}, 8),
    "half of a core": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "a part of a core more": ("0::/\n", {"cpu.max": "250000 100000"}, 3),
    "more than there are": ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
    "of a group above": (
        "0::/pod/box\n",
        {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "max 100000"},
        3,
    ),
    "a path of the host": ("0::/kubepods/pod/box\n", {"cpu.max": "300000 100000"}, 3),
    "a path above": ("0::/../../box\n", {"cpu.max": "300000 100000"}, 3),
    "version 1": (
        "3:cpu,cpuacct:/docker/box\n1:name=systemd:/docker/box\n0::/\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
        2,
    ),
    "version 1, a group": (
        "3:cpu:/box\n",
        {"cpu/box/cpu.cfs_quota_us": "400000", "cpu/box/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, no limit": (
        "3:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        8,
    ),
    "of another kind": ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1"}, 8),
    "nothing": ("", {}, 8),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_container_has_as_many_cores_as_its_quota_pays_for(tmp_path, monkeypatch, case):
    groups, told, expected = QUOTAS[case]
    for name, text in told.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(f"{text}\n")
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "tree")
    monkeypatch.setattr(machine, "processors", lambda: set(range(8)))
    assert cores() == expected


def test_ranges_of_processors_are_read(tmp_path):
    (tmp_path / "cpulist").write_text("0-2,5,8-9\n")
    assert machine._members(tmp_path / "cpulist") == {0, 1, 2, 5, 8, 9}


@pytest.fixture
def mac(pretend, tmp_path, monkeypatch):
    """What macOS lacks is away: affinity, /proc and /sys. It has 8 processors."""
    pretend()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "none")
    monkeypatch.setattr("platform.system", lambda: "Darwin")


def test_a_mac_uses_all_its_processors_and_computes_in_float32(mac):
    assert cores() == 8
    assert topology() == {"sockets": 1, "numa_nodes": 1, "physical_cores": 8, "processors": 8}
    assert processor_flags() == frozenset()
    assert native_precision() == "float32"


def test_a_mac_names_its_processor_by_sysctl(mac, tmp_path, monkeypatch):
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(
        '#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "Apple M4 Pro"\n'
    )
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware() == {"processor": "Apple M4 Pro", "cores": 8}
    sysctl.unlink()
    assert hardware() == {"processor": "unknown", "cores": 8}


def test_an_arm_processor_is_told_by_its_design_and_computes_in_float32(
    pretend, tmp_path, monkeypatch
):
    pretend((0, 0, 0), (0, 1, 0))
    (tmp_path / "cpuinfo").write_text(ARM)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert hardware() == {
        "processor": "aarch64 implementer 0x41 variant 0x0 part 0xd4f",
        "cores": 2,
    }
    assert processor_flags() == {"fp", "asimd", "sve", "bf16", "i8mm"}
    assert native_precision() == "float32"


def test_a_processor_of_x86_goes_by_the_name_that_the_kernel_gives(pretend, tmp_path):
    pretend((0, 0, 0))
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: AMD EPYC: 7763\nflags\t\t: avx2\n\n"
    )
    assert hardware() == {"processor": "AMD EPYC: 7763", "cores": 1}


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("", "float32"),
        ("avx512f avx512_vnni", "float32"),
        ("avx512_bf16", "mixed_bfloat16"),
        ("avx512_bf16 avx512_fp16", "float32"),
        ("avx512_bf16 avx512_fp16 amx_bf16", "mixed_bfloat16"),
    ],
)
def test_the_precision_of_a_training_follows_the_processor_unless_named(
    pretend, tmp_path, flags, precision
):
    pretend((0, 0, 0), flags=flags)
    assert native_precision() == precision
    folders = dict(data_dir=str(tmp_path), run_dir=str(tmp_path))
    assert TrainConfig(**folders).precision == precision
    assert (
        TrainConfig(**folders).to_dict()["precision"] == precision
    )  # what is kept says what was used
    assert TrainConfig(**folders, precision="float32").precision == "float32"


def test_tensorflow_starts_without_a_word():
    code = "from chexlib.machine import import_tensorflow; import_tensorflow()"
    code += "; import sys; print('end', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "end\n")


def test_what_keras_need_not_find_is_there_afterwards():
    code = """
import gc, sys
from chexlib.machine import import_tensorflow
import_tensorflow()
assert not {"sklearn", "matplotlib"} & set(sys.modules) and gc.isenabled()
import keras, matplotlib.pyplot, sklearn.metrics
import_tensorflow()
assert sys.modules["sklearn"] is sklearn and sys.modules["matplotlib"] is matplotlib
assert keras.ops.convert_to_numpy(keras.ops.ones(2)).sum() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_said_at_a_start_that_fails_is_shown(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os; os.write(2, b'a library is missing\\n'); raise ImportError('no')"
    )
    code = "from chexlib.machine import import_tensorflow; import_tensorflow()"
    own = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=own, cwd=tmp_path
    )
    assert (
        done.returncode == 1
        and "a library is missing" in done.stderr
        and "ImportError: no" in done.stderr
    )
