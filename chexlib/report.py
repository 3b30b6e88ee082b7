"""`runs/<id>/index.html`: the page a person opens after a run. It needs no network."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from chexlib.files import replacing
from chexlib.findings import FINDINGS


def build_report(run: Path) -> Path:
    """Turn every executed notebook of a run into HTML and write the run's `index.html` over them.

    Parameters
    ----------
    run : Path
        `runs/<id>`, with one folder a notebook.

    Returns
    -------
    Path
        The page.
    """
    import jinja2

    pages = [_page(folder) for folder in sorted(run.iterdir()) if (folder / "notebook.ipynb").exists()]
    judged = {page["title"]: page["metrics"]["auroc"] for page in pages if "auroc" in page["metrics"]}
    environment = next((page["environment"] for page in pages if page["environment"]), {})
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    text = template.render(
        run=run.name, pages=pages, judged=judged, findings=[*FINDINGS, "mean"], environment=environment
    )
    index = run / "index.html"
    with replacing(index) as file:
        file.write(text.encode())
    return index


def _page(folder: Path) -> dict:
    """What the report shows of one notebook."""
    import nbformat

    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("# ")), "# ?")
    timing = notebook.metadata.get("papermill", {})
    _write_html(notebook, folder / "notebook.html")
    return {
        "name": folder.name,
        "title": first.splitlines()[0].removeprefix("# "),
        "error": _error(notebook),
        "seconds": timing.get("duration"),
        "metrics": _read(folder / "metrics.json"),
        "parameters": _read(folder / "params.json"),
        "environment": _read(folder / "environment.json"),
        "figures": [_figure(path) for path in sorted((folder / "figures").glob("[!.]*.png"))],
    }


def _write_html(notebook, path: Path) -> None:
    from nbconvert import HTMLExporter

    # The exporter would otherwise load scripts from other people's servers; our notebooks need none.
    exporter = HTMLExporter(
        mathjax_url="",
        require_js_url="",
        jquery_url="",
        mermaid_js_url="",
        mermaid_layout_elk_js_url="",
        jupyter_widgets_base_url="",
        embed_images=True,
    )
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page = exporter.from_notebook_node(notebook)[0]
    path.write_text(re.sub(r'<script src=""[^>]*></script>', "", page))


def _error(notebook) -> str | None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"
    return None


def _figure(path: Path) -> dict:
    from PIL import Image

    with Image.open(path) as image:
        caption, width, height = image.info.get("Description", path.stem), *image.size
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem, "caption": caption, "width": width, "height": height, "data": data}


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
