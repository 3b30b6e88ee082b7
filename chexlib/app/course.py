"""The course that a teacher hands out: copies of the notebooks, with blanks and with solutions."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import nbformat

from chexlib.app.execute import find_notebooks
from chexlib.errors import ConfigError
from chexlib.files import writing_to


def write_course(out: str | Path) -> Path:
    """Write every notebook to `out/student` and `out/solved`, whole or not at all.

    In a student's copy a cell tagged `solution` keeps its leading comment lines, followed by `...`.
    A cell tagged `check` may fail there, and the notebook runs on.

    Returns
    -------
    Path
        The folder `out`.

    Raises
    ------
    ConfigError
        `out` holds something: it may be answers.
    DataError
        It cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty, and may hold answers. Name a new folder.")
    with writing_to(out.parent, "Name another folder."):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as draft:
            made = Path(draft, "course")
            for kind in ("student", "solved"):
                (made / kind).mkdir(parents=True)
                for path in find_notebooks():
                    notebook = nbformat.read(path, as_version=4)
                    if kind == "student":
                        _make_blanks(notebook)
                    nbformat.write(notebook, made / kind / path.name)
            os.replace(made, out)
    return out


def _make_blanks(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            lines = cell.source.splitlines()
            comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
            cell.source = "\n".join([*comments, "..."])
            cell.metadata.pop("jupyter", None)  # a solution is folded, a blank is not
        if "check" in tags:
            tags.append("raises-exception")
