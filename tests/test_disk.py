"""A disk that is full or broken at any moment: each command ends in one line, no file is half, and
the same command then does all of it. The same if the process is killed there.

`faulty_disk.c` is put before libc, and lets one call after the other that changes a file fail. The
quick tier tries some of them, `CHEXLIB_LONG=1` all (of a training and of heat maps, the first of
each call on each file), and prints how many.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Every so manyth call in the quick tier.
QUICK = {"phantom": 17, "cache": 13, "card": 3, "tune": 11, "fetch": 29, "clean": 2}
# 1: every call. 0: the first of each call on each file.
WHOLE = [*dict.fromkeys([*QUICK, "evaluate", "compare", "run", "report"], 1).items()]
WHOLE += [("predict", 0), ("train", 0)]
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="needs Linux and gcc"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("library") / "disk.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(made), str(HERE / "faulty_disk.c")]
    subprocess.run([*command, "-ldl"], check=True, timeout=60)
    return made


@pytest.mark.parametrize(
    "commands", [QUICK, *(pytest.param(dict([one]), marks=pytest.mark.long) for one in WHOLE)]
)
def test_a_disk_that_fails_at_any_call_costs_one_line_and_leaves_nothing_half(
    commands, library, phantom, vgg_file, tmp_path
):
    asked = {"commands": commands, "folder": str(tmp_path / "trials"), "library": str(library)}
    asked |= {"data": str(phantom), "model": str(vgg_file)}
    done = subprocess.run(
        [sys.executable, str(HERE / "disk_job.py"), json.dumps(asked)],
        env={**os.environ, "LD_PRELOAD": str(library), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=7200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [found["command"] for found in told] == list(commands)
    for found in told:
        assert not found["faults"], "\n".join([*found["faults"], *found["said"]])
        if found["command"] in ("evaluate", "compare"):
            assert found["calls"]["EIO"] == 0  # they write nothing
        print(f"{found['command']}: {found['calls']} calls, {found['tried']} of them failed")
