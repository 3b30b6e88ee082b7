"""What the processors of this machine are, as Linux tells it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_SYSTEM = Path("/sys/devices/system")
_CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """Processors that this process may use; two hardware threads of one core are two."""
    return len(os.sched_getaffinity(0))


def kind() -> dict:
    """Processor and cores: what a measured time belongs to."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(names, "unknown"), "cores": cores()}


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction sets, in the kernel's words, such as "avx2" or "amx_bf16"."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def native_precision() -> str:
    """ "mixed_bfloat16" if this processor multiplies bfloat16 faster than float32, else "float32".

    AMX does, and so does AVX512_BF16 up to processors that have AVX512_FP16 too: on these (Sapphire Rapids and later
    without AMX, as some clouds offer them) a matrix product was measured at half of the speed of float32
    (benchmarks/README.md). Without any of them bfloat16 is emulated, and far slower.
    """
    flags = processor_flags()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "avx512_fp16" not in flags)
    return "mixed_bfloat16" if fast else "float32"


def topology() -> dict[str, int]:
    """Of the processors that this process may use: `sockets`, `numa_nodes`, `physical_cores`, `processors`."""
    mine = sorted(os.sched_getaffinity(0))
    packages = [_read(cpu, "physical_package_id") for cpu in mine]
    physical = [(package, _read(cpu, "core_id")) for package, cpu in zip(packages, mine, strict=True)]
    nodes = [_members(path / "cpulist") for path in (_SYSTEM / "node").glob("node[0-9]*")]
    return {
        "sockets": len(set(packages)),
        "numa_nodes": max(1, sum(bool(node & set(mine)) for node in nodes)),
        "physical_cores": len(set(physical)),
        "processors": len(mine),
    }


def _read(cpu: int, name: str) -> str:
    """A fact of one processor. Where the kernel does not tell, each is a core of the one socket."""
    path = _SYSTEM / "cpu" / f"cpu{cpu}" / "topology" / name
    return path.read_text().strip() if path.exists() else (str(cpu) if name == "core_id" else "0")


def _members(path: Path) -> set[int]:
    """Of a list such as "0-3,8"."""
    ends = [part.split("-") for part in path.read_text().strip().split(",") if part]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}
