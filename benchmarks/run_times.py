"""Where the time of a run of notebooks goes, cell by cell, from the executed notebooks.

python benchmarks/run_times.py                  # the newest run
python benchmarks/run_times.py runs/ID --cells 5

Prints a JSON line for each notebook: seconds in all, of its start (until its first cell began, from
the end of the one before), of the cell that imports, and of its longest other cells, each with its
first line.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def seconds_between(start: str, end: str) -> float:
    """Seconds from one ISO time to another."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def times_of(notebook, *, cells: int) -> dict:
    """Of one executed notebook."""
    whole = notebook.metadata.papermill
    timed = [(cell.metadata.get("papermill") or {}, cell.source) for cell in notebook.cells]
    timed = [(about, source) for about, source in timed if about.get("duration")]
    imports = [
        about["duration"]
        for about, source in timed
        if "\nimport " in f"\n{source}" or "\nfrom " in f"\n{source}"
    ]
    others = [(about["duration"], source.splitlines()[0][:60]) for about, source in timed]
    longest = sorted(others, reverse=True)[:cells]
    return {
        "seconds": round(whole.duration, 1),
        "start": round(seconds_between(whole.start_time, timed[0][0]["start_time"]), 1),
        "imports": round(sum(imports), 1),
        "longest": [[round(duration, 1), line] for duration, line in longest],
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("run", nargs="?", default=str(ROOT / "runs" / "latest"))
    options.add_argument("--cells", type=int, default=3)
    asked = options.parse_args()
    for file in sorted(Path(asked.run).glob("[0-9]*/notebook.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        if notebook.metadata.papermill.duration:  # else it is still running
            print(
                json.dumps({"notebook": file.parent.name, **times_of(notebook, cells=asked.cells)})
            )


if __name__ == "__main__":
    main()
