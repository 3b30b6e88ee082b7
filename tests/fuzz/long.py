"""The long form: `make fuzz`, or `python tests/fuzz/long.py --trials 200000 [DOOR...]`.

Each door has a process of its own, which may use so much memory and, for one file, so much time. A
file that ends it, or that its door neither reads nor refuses, is kept. What was done is kept too:
the same command goes on, and with another --seed begins anew.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0  # of processor for one file
STUCK = 120.0  # seconds without the end of a file, however little it computes
MEMORY = 2**31  # bytes, at most
ROUND = 500  # files from one seed
FIGURES = ("trials", "read", "refused", "faults", "seconds", "peak_mib")


def work(door: str, trials: int, seed: int, folder: Path) -> None:
    """Do what is left of a door's trials; the figures so far are in `folder`."""
    sys.path.insert(0, str(ROOT))
    from doors import DOORS, enter
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if door == "checkpoints":
        import chexlib.training.state  # noqa: F401
    state = folder / "state.json"
    done = json.loads(state.read_text()) if state.exists() else dict.fromkeys(FIGURES, 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it was, and ends
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    current = folder / "current"

    def one(data):
        shutil.rmtree(current, ignore_errors=True)
        current.mkdir()
        DOORS[door][0](data.draw, current)
        began = time.monotonic()
        done["trials"] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            done[enter(door, current)] += 1
        except BaseException:
            keep(folder, done, traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        done["seconds"] = max(done["seconds"], time.monotonic() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if peak > MEMORY / 2**20 >= done["peak_mib"]:
            keep(folder, done, f"it took {peak:.0f} MiB")
        done["peak_mib"] = max(done["peak_mib"], peak)
        if done["trials"] % 50 == 0:
            state.write_text(json.dumps(done))

    options = {"deadline": None, "database": None}
    while done["trials"] < trials:
        options["max_examples"] = min(ROUND, trials - done["trials"])
        run = settings(**options, phases=[Phase.generate], suppress_health_check=list(HealthCheck))(
            given(st.data())(one)
        )
        seeded(f"{door} {seed} {done['trials']}")(run)()
        state.write_text(json.dumps(done))


def keep(folder: Path, done: dict, reason: str) -> None:
    """Keep the current file and why it is a fault."""
    done["faults"] += 1
    place = folder / f"fault-{done['faults']:04d}"
    shutil.copytree(folder / "current", place, dirs_exist_ok=True)
    (place / "reason.txt").write_text(reason)
    print(f"FAULT {place}: {reason.strip().splitlines()[-1][:300]}", flush=True)


def watch(door: str, trials: int, seed: int, folder: Path) -> dict:
    """Let a process do a door's trials, and another one go on where it was ended."""
    folder.mkdir(parents=True, exist_ok=True)
    state, current = folder / "state.json", folder / "current"
    command = [sys.executable, __file__, "--trials", str(trials), "--seed", str(seed)]
    while True:
        errors = folder / "errors.txt"
        with open(errors, "wb") as file:
            worker = subprocess.Popen([*command, "--work", str(folder), door], stderr=file)
        began = time.monotonic()
        while worker.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                began = max(began, time.monotonic() - (time.time() - current.stat().st_mtime))
            if time.monotonic() - began > STUCK:
                worker.kill()
        done = json.loads(state.read_text()) if state.exists() else dict.fromkeys(FIGURES, 0)
        if worker.returncode == 0:
            return done
        if not current.exists():
            raise SystemExit(f"Error: {door} did not begin: {errors.read_text()[-2000:]}")
        keep(folder, done, f"ended by {worker.returncode}: {errors.read_text()[-4000:]}")
        done["trials"] += 1  # another seed
        state.write_text(json.dumps(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("doors", nargs="*")
    parser.add_argument("--trials", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.work:
        with tempfile.TemporaryDirectory() as scratch:  # for what doors unpack
            os.environ["TMPDIR"] = tempfile.tempdir = scratch
            work(asked.doors[0], asked.trials, asked.seed, asked.work)
        return
    sys.path.insert(0, str(ROOT))
    from doors import DOORS

    os.environ |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    total = dict.fromkeys(FIGURES, 0)
    print("door         " + "".join(f"{name:>10}" for name in FIGURES), flush=True)
    for door in asked.doors or DOORS:
        trials = round(asked.trials * DOORS[door][2])
        done = watch(door, trials, asked.seed, asked.folder / f"{asked.seed}-{door}")
        print(f"{door:13}" + "".join(f"{done[name]:10.0f}" for name in FIGURES), flush=True)
        for name in FIGURES:
            most = name in ("seconds", "peak_mib")
            total[name] = max(total[name], done[name]) if most else total[name] + done[name]
    print(f"{'all':13}" + "".join(f"{total[name]:10.0f}" for name in FIGURES))
    sys.exit(1 if total["faults"] else 0)


if __name__ == "__main__":
    main()
