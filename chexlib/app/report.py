"""`runs/<id>/index.html`: the page a person opens after a run. It needs no network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection
from pathlib import Path

from chexlib.app.notebook_page import caption, write_page
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS


def build_report(run: Path, only: Collection[str] | None = None) -> Path:
    """Turn every executed notebook of a run into HTML and write the run's `index.html` over them:
    the ledger first.

    A page that is newer than its notebook stays, so that the report can be written anew after each
    notebook.

    Parameters
    ----------
    run : Path
        `runs/<id>`, with one folder a notebook.
    only : names of notebooks, optional
        Those that are done, while others are being executed.

    Returns
    -------
    Path
        The page.
    """
    import jinja2

    from chexlib.ledger.answers import VERDICTS, build_ledger, count_verdicts

    folders = [folder for folder in sorted(run.iterdir()) if (folder / "notebook.ipynb").exists()]
    pages = [_page(folder) for folder in folders if only is None or folder.name in only]
    judged = {
        page["title"]: page["metrics"]["auroc"] for page in pages if "auroc" in page["metrics"]
    }
    environment = next((page["environment"] for page in pages if page["environment"]), {})
    table = build_ledger(run)
    asked, there = _read(run / "run.json"), {page["name"] for page in pages}
    topics = {topic: own.to_dict("records") for topic, own in table.groupby("topic", sort=False)}
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    jinja = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["figure"] = figure
    text = jinja.get_template("report.html").render(
        run=run.name,
        asked=asked,
        pages=pages,
        links=there,
        waiting=[name for name in asked.get("notebooks", []) if name not in there],
        judged=judged,
        findings=[*FINDINGS, "mean"],
        environment=environment,
        topics=topics,
        counts=count_verdicts(table).to_dict("index"),
        verdicts=VERDICTS,
    )
    index = run / "index.html"
    with atomic_write(index) as file:
        file.write(text.encode())
    return index


def figure(value: float | None, unit: str) -> str:
    """A figure in words: an AUROC with three digits, a count whole, anything else with four that
    count.
    """
    if value is None or math.isnan(value):
        return ""
    if unit == "AUROC":
        return f"{value:.3f}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.4g}"


def _page(folder: Path) -> dict:
    """What the report shows of one notebook."""
    import nbformat

    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    first = next(
        (
            c.source
            for c in notebook.cells
            if c.cell_type == "markdown" and c.source.startswith("# ")
        ),
        "# ?",
    )
    title, written = first.splitlines()[0].removeprefix("# "), folder / "notebook.html"
    if (
        not written.exists()
        or written.stat().st_mtime_ns <= (folder / "notebook.ipynb").stat().st_mtime_ns
    ):
        write_page(notebook, written, title=title)
    return {
        "name": folder.name,
        "title": title,
        "error": _error(notebook),
        "seconds": notebook.metadata.get("papermill", {}).get("duration"),
        "metrics": _read(folder / "metrics.json"),
        "parameters": _read(folder / "params.json"),
        "environment": _read(folder / "environment.json"),
        "figures": [_figure(path) for path in sorted((folder / "figures").glob("[!.]*.png"))],
    }


def _error(notebook) -> str | None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"
    return None


def _figure(path: Path) -> dict:
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    data = base64.b64encode(path.read_bytes()).decode()
    return {
        "name": path.stem,
        "caption": caption(path),
        "width": width,
        "height": height,
        "data": data,
    }


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
