"""What plays the notebook in a fault trial, and the runner's hold on it.

It trains on two MPI engines, and writes what happens, with the time, to a log that the runner
reads.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

from chexlib.models.weights import load_model
from chexlib.mpi import find_mpi, thread_environment
from chexlib.phantom.write import write_phantom
from chexlib.training.config import TrainConfig
from chexlib.training.state import load_checkpoint

TESTS = Path(__file__).parent
LIMIT = 240  # seconds after which a training hangs
STEP = 0.6  # seconds that a step takes at least, so that all are told of


class FailedError(Exception):
    """The trial is not passed."""


class SkippedError(Exception):
    """The trial cannot be had here."""


def need(holds, text: str) -> None:
    """Fail the trial unless this holds."""
    if not holds:
        raise FailedError(text)


class Notebook:
    """One or more notebooks, one after another, that train in `folder`; all that they start is
    known by its name.
    """

    def __init__(self, folder: Path, config: dict):
        self.folder, self.run_dir, self.tmp = folder, folder / "run", folder / "tmp"
        self.tmp.mkdir(parents=True)
        (folder / "said.txt").touch()
        self.config, self.process = {**config, "run_dir": str(self.run_dir)}, None

    def start(
        self, *, restarts: int = 0, stall: int = 60, fault: dict | None = None, resume: bool = False
    ) -> None:
        """Start a notebook."""
        job = {
            "config": {**self.config, "resume": resume},
            "restarts": restarts,
            "stall": stall,
            "fault": fault,
        }
        (self.folder / "job.json").write_text(
            json.dumps({**job, "events": str(self.folder / "events.jsonl")})
        )
        paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        with open(self.folder / "said.txt", "ab") as said:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from fault_notebook import main; main()",
                    str(self.folder / "job.json"),
                ],
                env={
                    **os.environ,
                    "TMPDIR": str(self.tmp),
                    "PYTHONPATH": paths,
                },  # the cluster's folder is in TMPDIR
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def events(self, *names: str) -> list[dict]:
        """The events of these names so far, or all."""
        path = self.folder / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [event for event in found if not names or event["event"] in names]

    def await_step(self, step: int) -> None:
        """Wait until the training has told of this step."""
        until = time.monotonic() + LIMIT
        while not any(event["step"] >= step for event in self.events("step")):
            self.need_running()
            need(time.monotonic() < until, f"step {step} was not reached within {LIMIT} s")
            time.sleep(0.05)

    def need_running(self) -> None:
        """Fail if it has ended."""
        need(self.process.poll() is None, "the notebook ended before the fault")

    def ended(self) -> int:
        """Wait for its end: the status."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise FailedError(f"the notebook did not end within {LIMIT} s") from None

    def processes(self) -> list[psutil.Process]:
        """What has the folder in its environment or arguments: the notebook, and all that it
        started.
        """
        found = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            words = [*(process.info["environ"] or {}).values(), *(process.info["cmdline"] or [])]
            if process.pid != os.getpid() and any(f"{self.folder}/" in word for word in words):
                found.append(process)
        return found

    def left(self, files: bool) -> list[str]:
        """The processes and, if asked for, the temporary files and shared memory that are there."""
        left = [str(process) for process in self.processes()]
        if files:
            left += [str(path) for path in self.tmp.iterdir()]
            shared = [entry for up in self.events("up") for entry in up["shared"]]
            left += [
                name
                for name, inode in shared
                if Path(name).exists() and Path(name).stat().st_ino == inode
            ]
        return left

    def need_whole(self, *, but: Path | None = None) -> None:
        """Fail unless every file in the run's folder is one that is meant to be there, and can be
        read to its end.
        """
        readers = {".json": lambda path: json.loads(path.read_text()), ".parquet": pd.read_parquet}
        readers |= {".keras": load_model, ".npz": load_checkpoint}
        for path in self.run_dir.rglob("*"):
            if path.is_file() and path != but:
                need(
                    path.suffix in readers and not path.name.startswith("."),
                    f"{path} is a half file",
                )
                try:
                    readers[path.suffix](path)
                except Exception as error:
                    raise FailedError(f"{path} is not whole: {error}") from error

    def said(self) -> str:
        """Its last events and words, for a person."""
        events = "\n".join(map(str, self.events()[-12:]))
        return f"{events}\n{(self.folder / 'said.txt').read_text()[-3000:]}"


def prepare(home: Path) -> tuple[dict, list]:
    """The settings of every trial's training, and the weights it ends with when nothing happens."""
    data = write_phantom(home / "phantom", n_images=90, size=32, min_prevalence=0.1, workers=1)
    what = {
        "topology": "vgg16",
        "width": 0.25,
        "size": 32,
        "split": "patient",
        "learning_rate": 1e-4,
    }
    how = {"epochs": 2, "batch_size": 8, "checkpoint_steps": 2}  # 4 steps per epoch
    config = TrainConfig(
        data_dir=str(data), run_dir=str(home / "undisturbed"), **what, **how
    ).to_dict()
    (home / "config.json").write_text(json.dumps(config))
    mpi, train = find_mpi(), ["-m", "chexlib", "train", "--config", str(home / "config.json")]
    command = [mpi.command, "-n", "2", *mpi.flags(), sys.executable, *train]
    environment = {**os.environ, **thread_environment(1)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    need(done.returncode == 0, f"the undisturbed training failed:\n{done.stdout}{done.stderr}")
    return config, weights_of(home / "undisturbed" / "model.keras")


def weights_of(path) -> list:
    """Every weight in a model file."""
    return load_model(path)[0].get_weights()


def mount(folder: Path, options: str) -> None:
    """Lay a small disk over a folder, or change its size."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    command = [*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SkippedError(
            f"a small disk needs root, or sudo without a password ({error})"
        ) from error


def unmount(folder: Path) -> None:
    """Take the small disk away."""
    subprocess.run(
        [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "umount", "-l", str(folder)], timeout=30
    )


def note(path, event: str, **facts) -> None:
    """Add a line to the log; the engines write there too."""
    line = json.dumps({"seconds": time.time(), "event": event, **facts}) + "\n"
    with open(
        path, "ab", buffering=0
    ) as file:  # one write, so that the lines of several processes stay whole
        file.write(line.encode())


def break_at(fault: dict, events: str) -> None:
    """On an engine: let one rank raise or sleep for ever at a step, or note that a checkpoint
    cannot be written.

    The engines that are started after a fault know nothing of it, so that it happens once.
    """
    from chexlib.collectives import join_world
    from chexlib.errors import WeightsError
    from chexlib.training import state as resume

    if fault["how"] == "full":
        save = resume.save_checkpoint

        def noted(*args, **kwargs):
            began = time.time()
            try:
                return save(*args, **kwargs)
            except WeightsError:
                note(events, "fault", since=began)
                raise

        resume.save_checkpoint = noted
    elif fault["rank"] == join_world().rank:
        method = getattr(resume.Saver, fault["where"])

        def broken(self, batch, logs=None):
            if self.at.step >= fault["step"]:
                note(events, "fault", since=time.time())
                if fault["how"] == "raise":
                    raise RuntimeError("the fault of this trial")
                time.sleep(1e6)
            method(self, batch, logs)

        setattr(resume.Saver, fault["where"], broken)


def slow_down() -> None:
    """On an engine: let a step take long enough to be disturbed."""
    from chexlib.training import state as resume

    method = resume.Saver.on_train_batch_begin

    def slowly(self, batch, logs=None):
        time.sleep(STEP)
        method(self, batch, logs)

    resume.Saver.on_train_batch_begin = slowly


def shared_memory(pids: list[int]) -> list[tuple[str, int]]:
    """The files in /dev/shm that these processes share, and their inodes; Linux alone has such
    files.
    """
    if sys.platform != "linux":
        return []
    maps = [
        line.split() for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
    ]
    return sorted(
        {
            (words[5], int(words[4]))
            for words in maps
            if len(words) > 5 and words[5].startswith("/dev/shm/")
        }
    )


class _Noting(logging.Handler):
    def __init__(self, events: str):
        super().__init__()
        self.events = events

    def emit(self, record):
        note(self.events, "log", level=record.levelname, text=record.getMessage())


def main() -> None:
    """Do the job that a file describes.

    Status 3 means an error of chexlib's, which is in the log.
    """
    from chexlib.cluster.engines import mpi_engines
    from chexlib.errors import ChexlibError
    from chexlib.training.fit import fit

    job = json.loads(Path(sys.argv[1]).read_text())
    events, config = job["events"], TrainConfig.from_dict(job["config"])
    logging.getLogger("chexlib").addHandler(_Noting(events))

    def told(numbers):
        note(events, "step", step=(numbers["epoch"] - 1) * numbers["steps"] + numbers["step"])

    try:
        with mpi_engines(2, threads=1, stall=job["stall"]) as engines:
            ranks = [who["pid"] for who in engines.identities]
            controller = engines.cluster.controller.process.pid
            note(events, "up", ranks=ranks, controller=controller, shared=shared_memory(ranks))
            engines.run(slow_down)
            if job["fault"]:
                engines.run(break_at, job["fault"], events)
            try:
                result = fit(config, engines=engines, restarts=job["restarts"], report=told)
            except ChexlibError as error:
                note(events, "error", kind=type(error).__name__, text=str(error))
                raise
    except ChexlibError:
        sys.exit(3)
    note(events, "result", model=result.model, resumed_from=result.resumed_from)
