"""Seeded fault trials: something is killed, stalled, filled up or damaged in the middle of a
training on two ranks.

python tests/faults.py --trials 20 --seed 0            # or: make faults
python tests/faults.py --only 7                        # the seventh of them again

A trial is passed if it ends in an error that says what happened, or in a resumed training whose
weights are those of the undisturbed one to the bit, and if 15 s later no process of it and no half
file is left.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from fault_notebook import Notebook, SkippedError, mount, need, prepare, unmount, weights_of

from chexlib.training.state import checkpoint_files

PATIENCE = 15  # seconds after which nothing may be left
STALL = 15  # seconds that a rank may keep the others waiting, where that is the fault
# What the report must say, where one is due; {rank} is the victim's.
KINDS = {
    "rank killed": r"rank {rank} on {host} died of signal 9",
    "rank raises": r"rank {rank} on {host} failed with RuntimeError: the fault of this trial",
    "rank frozen": r"rank {rank} on {host} does not run: it was stopped by a signal",
    "rank stalled": r"rank {rank} on {host} kept the other ranks waiting for more than 15 s",
    "controller killed": r"the engines' controller on {host} has ended",
    "notebook SIGTERM": None,
    "notebook SIGKILL": None,
    "everything killed": None,
    "disk full": r"checkpoint .*step-\d+\.npz of .* MB cannot be written \(No space left on "
    r"device\)",
    "checkpoint truncated": r"rank {rank} on {host} died of signal 9",
    "checkpoint flipped": r"rank {rank} on {host} died of signal 9",
}
INSIDE = {"rank raises": "raise", "rank stalled": "stall"}  # what an engine does to itself
FACTS = ("number", "kind", "drawn", "outcome", "to_report", "seconds")


def kinds_of(seed: int, trials: int, kinds: list[str]) -> list[str]:
    """A kind for each trial: every round has each kind once, in a drawn order."""
    rng = np.random.default_rng(seed)
    return [kind for _ in range(0, trials, len(kinds)) for kind in rng.permutation(kinds).tolist()][
        :trials
    ]


class Trial:
    """One fault, drawn from the seed and the trial's number, and what came of it."""

    def __init__(
        self,
        number: int,
        kind: str,
        *,
        seed: int,
        home: Path,
        config: dict,
        weights: list,
        restarts=None,
    ):
        self.number, self.kind, self.weights = number, kind, weights
        self.notebook = Notebook(home / str(number), config)
        self.checkpoints = self.notebook.run_dir / "checkpoints"
        self.rng = rng = np.random.default_rng([seed, number])
        self.damages = kind.startswith("checkpoint")
        self.drawn = {
            "rank": int(rng.integers(2)),
            "step": int(rng.integers(5 if self.damages else 1, 7)),
        }
        if kind in INSIDE:
            self.drawn["where"] = str(rng.choice(["on_train_batch_begin", "on_train_batch_end"]))
        else:
            self.drawn["delay"] = round(float(rng.uniform(0, 1)), 2)
        if kind in (*INSIDE, "rank killed", "rank frozen", "controller killed"):
            self.drawn["restarts"] = int(rng.integers(2)) if restarts is None else restarts
        if not kind.startswith("rank") and not self.damages:
            del self.drawn["rank"]
        self.fault_at, self.to_report, self.seconds, self.damaged, self.outcome = (
            None,
            None,
            0.0,
            None,
            "",
        )

    def play(self) -> None:
        """Do it, and look at what is left. Raises FailedError or SkippedError."""
        began = time.monotonic()
        try:
            if self.kind == "disk full":
                self._disk_full()
            elif self.damages:
                self._damage()
            elif KINDS[self.kind]:
                self._engines_fail()
            else:
                self._notebook_dies()
            self._nothing_left()
            self.notebook.need_whole(but=self.damaged)
        finally:
            self.seconds = time.monotonic() - began
            self._clear()

    def _engines_fail(self) -> None:
        restarts = self.drawn.get("restarts", 0)
        if self.kind in INSIDE:
            fault = {"how": INSIDE[self.kind], **self.drawn}
            self.notebook.start(
                restarts=restarts, fault=fault, stall=STALL if self.kind == "rank stalled" else 60
            )
        else:
            self.notebook.start(restarts=restarts)
            up = self._await_step()
            victim = (
                up["controller"]
                if self.kind == "controller killed"
                else up["ranks"][self.drawn["rank"]]
            )
            self._signal([victim], signal.SIGSTOP if self.kind == "rank frozen" else signal.SIGKILL)
        self._reported("ClusterError", restarts)
        if restarts:
            self._same_weights()

    def _notebook_dies(self) -> None:
        self.notebook.start()
        self._await_step()
        everything = self.kind == "everything killed"
        doomed = (
            [process.pid for process in self.notebook.processes()]
            if everything
            else [self.notebook.process.pid]
        )
        self._signal(
            self.rng.permutation(doomed).tolist(),
            getattr(signal, self.kind.split()[-1], signal.SIGKILL),
        )
        self.notebook.ended()
        gone = self._nothing_left(files=not everything)  # there is nobody who could remove them
        self.notebook.need_whole(but=self.damaged)
        self.outcome = f"all gone in {gone:.1f} s"
        self._resume()

    def _disk_full(self) -> None:
        self.drawn = {
            "megabytes": int(self.rng.integers(7, 36))
        }  # no room for the first, second or third
        self.checkpoints.mkdir(parents=True)
        mount(self.checkpoints, f"size={self.drawn['megabytes']}m,mode=0777")
        self.notebook.start(restarts=1, fault={"how": "full"})
        self._reported("WeightsError")
        self.notebook.need_whole(but=self.damaged)
        mount(self.checkpoints, "remount,size=2g")
        self._resume()

    def _damage(self) -> None:
        self._engines_fail()
        files = checkpoint_files(self.checkpoints)
        need(len(files) == 2, f"there are {len(files)} checkpoints, not 2")
        place = self.drawn["byte"] = int(files[0].stat().st_size * self.rng.random())
        if self.kind == "checkpoint truncated":
            os.truncate(files[0], place)
        else:
            bit = self.drawn["bit"] = int(self.rng.integers(8))
            with open(files[0], "r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << bit]))
        self.damaged = files[0]
        self.notebook.need_whole(but=self.damaged)
        self._resume()
        log = "\n".join(event["text"] for event in self.notebook.events("log"))
        need(f"{files[0]} is damaged" in log, "the log does not name the damaged file")
        came_from = self.notebook.events("result")[-1]["resumed_from"]
        need(came_from == files[1].name, f"resumed from {came_from}, not {files[1].name}")
        self.damaged = None  # written anew since

    def _await_step(self) -> dict:
        self.notebook.await_step(self.drawn["step"])
        time.sleep(self.drawn["delay"])
        return self.notebook.events("up")[-1]

    def _signal(self, pids: list[int], number: int) -> None:
        self.notebook.need_running()
        self.fault_at = time.time()
        for pid in pids:
            os.kill(pid, number)

    def _reported(self, kind: str, restarts: int = 0) -> None:
        status = self.notebook.ended()
        if injected := self.notebook.events("fault"):
            self.fault_at = injected[-1]["since"]
        pattern = KINDS[self.kind].format(
            rank=self.drawn.get("rank"), host=re.escape(socket.gethostname())
        )
        reports = [
            event
            for event in self.notebook.events("log", "error")
            if re.search(pattern, event["text"])
        ]
        need(self.fault_at and reports, f"no report says {pattern!r}")
        self.to_report = reports[0]["seconds"] - self.fault_at
        need(status == (0 if restarts else 3), f"the notebook ended with status {status}")
        if not restarts:
            need(self.notebook.events("error")[-1]["kind"] == kind, f"the error is not a {kind}")
            self.outcome = f"clear {kind}"

    def _resume(self) -> None:
        self.notebook.start(resume=True)
        need(self.notebook.ended() == 0, "the resumed training failed")
        self._same_weights()

    def _same_weights(self) -> None:
        result = self.notebook.events("result")[-1]
        found = weights_of(result["model"])
        differ = sum(not np.array_equal(a, b) for a, b in zip(self.weights, found, strict=True))
        need(
            not differ, f"{differ} of {len(found)} weights differ from those of the undisturbed run"
        )
        self.outcome += f"{', then ' * bool(self.outcome)}equal weights from {result['resumed_from'] or 'the start'}"

    def _nothing_left(self, *, files: bool = True) -> float:
        """Wait until no process and, if asked for, no file of a cluster is left: the seconds it
        took.
        """
        began = time.monotonic()
        while left := self.notebook.left(files):
            need(time.monotonic() - began < PATIENCE, f"left after {PATIENCE} s: {', '.join(left)}")
            time.sleep(0.2)
        return time.monotonic() - began

    def _clear(self) -> None:
        for process in self.notebook.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.checkpoints.is_mount():
            unmount(self.checkpoints)
        shutil.rmtree(self.notebook.run_dir, ignore_errors=True)

    def line(self) -> str:
        """The trial in one line."""
        drawn = " ".join(f"{name}={value}" for name, value in self.drawn.items())
        report = "" if self.to_report is None else f"{self.to_report:.1f} s"
        return f"{self.number:2} {self.kind:20} {drawn:58} {self.outcome:75} {report:>7} {self.seconds:4.0f} s"


def main() -> int:
    """The trials asked for, a line each. Status 0 if all are passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="of these, with commas between them"
    )
    parser.add_argument("--only", type=int, nargs="*", help="these numbers alone")
    parser.add_argument("--json", type=Path, help="write the lines there too")
    asked = parser.parse_args()
    kinds = kinds_of(asked.seed, asked.trials, asked.kinds.split(","))
    chosen = [(i, kind) for i, kind in enumerate(kinds, 1) if not asked.only or i in asked.only]
    rows, failed, skipped = [], 0, 0
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        config, weights = prepare(Path(home))
        print(
            f"the undisturbed training is done; {len(chosen)} trials of seed {asked.seed}:",
            flush=True,
        )
        for number, kind in chosen:
            trial = Trial(
                number, kind, seed=asked.seed, home=Path(home), config=config, weights=weights
            )
            try:
                trial.play()
            except SkippedError as reason:
                skipped, trial.outcome = skipped + 1, f"SKIPPED: {reason}"
            except Exception as reason:  # a FailedError, or what nobody thought of
                failed, trial.outcome = failed + 1, f"FAILED: {reason!r}"
                print(trial.notebook.said(), file=sys.stderr)
            print(trial.line(), flush=True)
            rows.append({name: getattr(trial, name) for name in FACTS})
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    done = len(rows) - skipped
    print(f"{done - failed} of {done}{f', and {skipped} skipped' if skipped else ''}")
    if times := [row["to_report"] for row in rows if row["to_report"] is not None]:
        print(f"the longest time from fault to report: {max(times):.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
