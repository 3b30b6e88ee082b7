"""Runs: one folder for what a notebook found, with everything needed to know how it came about.

`runs/<id>/<notebook>/` holds params.json, environment.json, metrics.json, figures/*.png and what
training wrote; `runs/latest` points to the newest run of which no notebook failed.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chexlib.errors import ConfigError, DataError, printable
from chexlib.files import (
    ROOT,
    atomic_write,
    file_lock,
    is_utf8,
    plain,
    read_json,
    write_json,
    writing_to,
)
from chexlib.machine import environment
from chexlib.phantom.population import REPEAT

ASKED = "run.json"  # what the run was asked for: notebooks, profile, settings
MOST = 2**32 - 1  # what NumPy and pandas take as a seed; no number of images comes near it
USE = {  # of the types that a notebook's parameters are annotated with
    "int": f"a whole number from 0 to {MOST}",
    "float": "a number of 0 or more",
    "bool": "True or False",
    "str": "text",
}
log = logging.getLogger(__name__)


def new_run(runs_dir: str | Path = "") -> Path:
    """Make and return a folder for a new run, `runs/<date-time>`."""
    parent = Path(runs_dir or ROOT / "runs").absolute()
    if not is_utf8(parent):
        raise ConfigError(f"the name of the run folder {parent} is not UTF-8. Name another.")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        path = parent / f"{stamp}{suffix}"
        with _writing(parent), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise ConfigError(f"{parent} has a hundred runs of this second. Name the folder yourself.")


def finished(folder: Path) -> bool:
    """Whether a notebook came to its end here: it left its metrics, and papermill noted its end and
    no error.
    """
    try:
        noted = read_json(folder / "notebook.ipynb")["metadata"]["papermill"]
        ended = bool(noted["end_time"]) and not noted["exception"]
    except (DataError, KeyError, TypeError):  # killed while it was written, or damaged since
        return False
    return ended and (folder / "metrics.json").exists()


@contextlib.contextmanager
def run_folder(
    asked: Mapping, *, runs_dir: str | Path = "", resume: bool = False
) -> Iterator[Path]:
    """A folder for a run, locked against other processes while the block lasts.

    Parameters
    ----------
    asked : dict
        notebooks, a list of names, and whatever else makes a run another one; plain values.
    runs_dir : where runs go; empty for `runs/` of the project
    resume : bool
        Go on in the newest run that was asked for the same, if not all of its notebooks are
        finished.

    Raises
    ------
    ConfigError
        The run to go on with is being executed by another process.
    """
    asked, parent = plain(dict(asked)), Path(runs_dir or ROOT / "runs").absolute()
    run = None
    if resume:
        same = [file.parent for file in parent.glob(f"[0-9]*/{ASKED}") if asked_for(file) == asked]
        run = max(same, default=None, key=lambda path: path.name)
    if run is None or all(finished(run / name) for name in asked["notebooks"]):
        run = new_run(runs_dir)
        try:
            with _writing(run):
                write_json(run / ASKED, asked)
        except ConfigError:
            run.rmdir()
            raise
    with file_lock(run / ".lock", wait=False) as locked:
        if not locked:
            raise ConfigError(
                f"another process is executing {run}. Wait for its end, or begin a new run without "
                "--resume (RESUME=1)."
            )
        yield run


def asked_for(file: Path) -> dict:
    """What a run was asked for, by its `ASKED`; nothing where that file is damaged, which the log
    tells.
    """
    try:
        return read_json(file)
    except DataError as error:
        log.warning("%s", error)
        return {}


def latest_run(runs_dir: str | Path = "") -> Path | None:
    """The newest run of which no notebook failed, or None."""
    link = Path(runs_dir or ROOT / "runs") / "latest"
    return link.resolve() if link.exists() else None


@dataclass(frozen=True)
class Run:
    """Run folder of one notebook: parameters, figures and metrics. Made by `start`."""

    notebook: str
    path: Path
    parameters: dict
    began: float  # of time.monotonic
    named: bool = False  # the folder was given: what lies around it is not ours
    # It began here before, with the same parameters, and did not finish: trainings go on.
    interrupted: bool = False

    def save_figure(self, figure, name: str, *, caption: str) -> None:
        """Write a matplotlib figure to `figures/<name>.png`, with the caption inside for the
        report.
        """
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{name}.png") as file:
            figure.savefig(
                file, format="png", dpi=120, bbox_inches="tight", metadata={"Description": caption}
            )

    def owns(self, path: str | Path) -> bool:
        """Whether a file lies below this folder or, where that is `<run>/<notebook>`, beside
        another of the run's.
        """
        folder, path = self.path.resolve(), Path(path).resolve()
        if path.is_relative_to(folder):
            return True
        return folder.name == self.notebook and path.parent.parent == folder.parent

    def finish(self, record=None, /, **metrics) -> Path:
        """Write `metrics.json`, undefined numbers as null; if the run is our own, point `latest`
        here.

        Parameters
        ----------
        record : dataclass of `chexlib.ledger.records`, optional
            What the ledger reads of this notebook.
        """
        read_by_ledger = {} if record is None else vars(record)
        seconds = round(time.monotonic() - self.began, 1)
        write_json(self.path / "metrics.json", {**read_by_ledger, **metrics, "seconds": seconds})
        if not self.named:
            point_latest(self.path.parent)
        log.info("Results: %s", self.path)
        return self.path

    def _repr_html_(self) -> str:
        return f"<p>Run folder: <code>{html.escape(str(self.path))}</code></p>"


def check_parameters(given: Mapping, kinds: Mapping | None = None) -> None:
    """Refuse a notebook's parameter of another type than its annotation: the text "false" is true.

    Parameters
    ----------
    given : dict
        Values by name; in a notebook its `globals()`, which have the annotations too.
    kinds : dict, optional
        "int", "float", "bool" or "str" by name, instead of these annotations.

    Raises
    ------
    ConfigError
        A value of another type, a whole number out of bounds, or a number below 0 or not finite.
    """
    if kinds is None:
        declared = given.get("__annotations__", {}).items()
        kinds = {name: getattr(kind, "__name__", kind) for name, kind in declared}
    for name, kind in kinds.items():
        if kind in USE and not _is_of(kind, value := given.get(name)):
            how = f" (with papermill by `-r {name} TEXT`)" if kind == "str" else ""
            raise ConfigError(f"{name}={value!r} is not accepted. Use {USE[kind]}{how}.")


def _is_of(kind: str, value) -> bool:
    """Whether a value is accepted where this kind of `USE` is annotated."""
    if kind == "bool" or isinstance(value, bool):  # which Python takes for a whole number
        return kind == "bool" and isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and 0 <= value <= MOST
    if kind == "float":
        return isinstance(value, int | float) and 0 <= value < math.inf
    return isinstance(value, str)


def check_above_zero(**values: float) -> None:
    """ConfigError for a parameter that is no number above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}={value!r} is not accepted. Use a number above 0.")


def numbers(name: str, text: str, kind: type = int) -> list:
    """The numbers of a notebook's parameter that lists some, such as "16,64".

    Raises
    ------
    ConfigError
        None, or something else than whole numbers of 1 or more (`kind` float: numbers of 0 or more).
    """
    least = 1 if kind is int else 0
    try:
        found = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(least <= number < math.inf for number in found):
        of = "whole numbers" if kind is int else "numbers"
        raise ConfigError(
            f"{name}={text!r} is not accepted. Use {of} of {least} or more, with commas between them."
        )
    return found


def start(notebook: str, *, run_dir: str = "", parameters: dict | None = None) -> Run:
    """Begin a notebook's run: its folder, its parameters and the environment on record, log lines
    shown.

    Parameters
    ----------
    notebook : str
        Name without ending, such as "03_train_baseline".
    run_dir : str
        Folder for the results; empty for a new one, `runs/<id>/<notebook>`.
    parameters : dict
        What the notebook was run with.

    Raises
    ------
    ConfigError
        The folder cannot be written.
    """
    show_log()
    path = Path(run_dir).absolute() if run_dir else new_run() / notebook
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        interrupted = _began_before(path, parameters or {})
        write_json(path / "params.json", parameters or {})
        write_json(path / "environment.json", environment())
    began = time.monotonic()
    return Run(notebook, path, dict(parameters or {}), began, bool(run_dir), interrupted)


def _began_before(path: Path, parameters: dict) -> bool:
    file = path / "params.json"
    if (path / "metrics.json").exists() or not file.exists():
        return False
    return asked_for(file) == json.loads(json.dumps(plain(parameters)))


def data_folder(
    data_dir: str = "", *, images: int, difficulty: str, seed: int, repeat: float = REPEAT
) -> Path:
    """The folder a notebook works on: `data_dir`, or without one a `kept_phantom`.

    A relative `data_dir` is taken from the project's root where it is not below the current folder.
    """
    if data_dir:
        here, of_project = Path(data_dir).absolute(), ROOT / data_dir
        # JupyterLab starts a kernel in the notebook's folder, papermill where it is called.
        return of_project if of_project.exists() and not here.exists() else here
    from chexlib.phantom.write import kept_phantom

    return kept_phantom(images=images, difficulty=difficulty, seed=seed, repeat=repeat)


def point_latest(run: Path) -> None:
    """Let `latest` beside `run` point to it, atomically; a warning says where that cannot be."""
    draft = run.parent / f".latest.{os.getpid()}"
    try:
        draft.unlink(missing_ok=True)
        draft.symlink_to(run.name)
        os.replace(draft, run.parent / "latest")
    except OSError as error:  # no links here, as on exFAT, or a folder of this name
        log.warning(
            "%s cannot point to this run (%s). Name %s itself.",
            run.parent / "latest",
            error.strerror,
            run,
        )
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def watermark() -> str:
    """One paragraph for the last cell of a notebook: what this was run with."""
    e = environment()
    packages = ", ".join(f"{name} {v}" for name, v in e["packages"].items())
    machine = f"{e['mpi']} · {e['processor']}, {e['cores']} cores · commit {e['commit']}"
    return f"{e['date']} · Python {e['python']} · {packages}\n{machine}"


def show_log(level: int = logging.INFO) -> None:
    """Show chexlib's log lines on standard output, once, as plain text."""
    logger = logging.getLogger("chexlib")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Printable("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


class _Printable(logging.Formatter):
    """What is logged, so that no name of a file in it steers the terminal."""

    def format(self, record):
        return printable(super().format(record))


def _writing(path: Path) -> contextlib.AbstractContextManager:
    step = "Name another folder with --runs-dir, or in a notebook with the parameter run_dir."
    return writing_to(f"the run folder {path}", step, kind=ConfigError)
