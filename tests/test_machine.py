"""What is read off a processor, and what follows from it."""

import os

import pytest

from chexlib import machine
from chexlib.machine import cores, native_precision, processor_flags, topology
from chexlib.training.config import TrainConfig


def test_cores_are_those_this_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that lays out a machine as the kernel would: for each processor its socket, core and node."""

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
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(processors))))
        processor_flags.cache_clear()

    yield make
    processor_flags.cache_clear()


def test_two_sockets_of_two_cores_with_two_threads_each(pretend):
    pretend(*[(socket, core, socket) for _ in range(2) for socket in (0, 1) for core in (0, 1)])
    assert topology() == {"sockets": 2, "numa_nodes": 2, "physical_cores": 4, "processors": 8}


def test_a_kernel_that_tells_nothing_has_one_socket_of_as_many_cores(pretend, monkeypatch):
    pretend()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert topology() == {"sockets": 1, "numa_nodes": 1, "physical_cores": 3, "processors": 3}


def test_ranges_of_processors_are_read(tmp_path):
    (tmp_path / "cpulist").write_text("0-2,5,8-9\n")
    assert machine._members(tmp_path / "cpulist") == {0, 1, 2, 5, 8, 9}


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
def test_the_precision_of_a_training_follows_the_processor_unless_named(pretend, tmp_path, flags, precision):
    pretend((0, 0, 0), flags=flags)
    assert native_precision() == precision
    folders = dict(data_dir=str(tmp_path), run_dir=str(tmp_path))
    assert TrainConfig(**folders).precision == precision
    assert TrainConfig(**folders).to_dict()["precision"] == precision  # what is kept says what was used
    assert TrainConfig(**folders, precision="float32").precision == "float32"
