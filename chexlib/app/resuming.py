"""Runs that were killed, or of which a notebook failed, and go on in the same folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from chexlib.app.runs import new_run
from chexlib.errors import ConfigError
from chexlib.files import ROOT, plain, write_json

ASKED = "run.json"  # what the run was asked for: notebooks, profile, settings


def finished(folder: Path) -> bool:
    """Whether a notebook came to its end here: it left its metrics, and papermill noted its end and
    no error.
    """
    try:
        noted = json.loads((folder / "notebook.ipynb").read_text())["metadata"]["papermill"]
    except (OSError, ValueError, KeyError):  # ValueError: killed while it was written
        return False
    return bool(noted["end_time"]) and not noted["exception"] and (folder / "metrics.json").exists()


def asked_of(run: Path) -> dict:
    """What a run was asked for; empty if it is none of `execute`."""
    return json.loads((run / ASKED).read_text()) if (run / ASKED).exists() else {}


@contextlib.contextmanager
def run_folder(
    asked: Mapping, *, runs_dir: str | Path = "", resume: bool = False
) -> Iterator[Path]:
    """A folder for a run, ours alone while the block lasts.

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
    same = (
        [file.parent for file in parent.glob(f"[0-9]*/{ASKED}") if asked_of(file.parent) == asked]
        if resume
        else []
    )
    run = max(same, default=None, key=lambda path: path.name)
    if run is None or all(finished(run / name) for name in asked["notebooks"]):
        run = new_run(runs_dir)
        write_json(run / ASKED, asked)
    with open(run / ASKED) as held:
        try:
            # Given back by the system, however this process ends.
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run} is being executed. Wait for its end, or begin a new run without resume."
            ) from None
        yield run
