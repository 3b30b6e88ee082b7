"""Reports that a person opens after a run: `index.html`, a page of each notebook, model cards.

They need no network, fit a phone, and can be read by a screen reader.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jinja2
import nbformat
from PIL import Image

from chexlib.app.runs import ASKED, asked_for
from chexlib.data.nih import data_name
from chexlib.errors import DataError, WeightsError, one_line
from chexlib.evaluation.auroc import in_words, judge
from chexlib.evaluation.scores import read_predictions
from chexlib.evaluation.verdicts import CHECKED, NOT_COMPARABLE, VERDICTS
from chexlib.files import atomic_write, read_json
from chexlib.findings import FINDINGS
from chexlib.ledger.answers import build_ledger, count_verdicts
from chexlib.markup import inert
from chexlib.models.weights import config_of, find_weights, read_card

# What a notebook leaves beside its pages.
RESULTS = {
    "metrics": "metrics.json",
    "parameters": "params.json",
    "environment": "environment.json",
}
# Tags of cells that a reader of the page does not need, or should first try without.
HIDDEN = {"plumbing", "solution", "check"}
CHOSEN = "chosen"  # tag of the cell whose figure stands for its notebook; else the last one does
SAVED = re.compile(r"""save_figure\(\s*[\w.]+,\s*["'](\w+)["']""")
POINT = re.compile(r"^- (.+(?:\n  .+)*)", re.M)  # of a list
TEMPLATES = Path(__file__).parent / "templates"
JINJA = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=jinja2.select_autoescape(),  # of HTML, not of the model card
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# What TensorFlow 2.21 says at its start, before it reads TF_CPP_MIN_LOG_LEVEL.
START = re.compile(
    r"WARNING: All log messages before absl::InitializeLog.*\n?|I\d{4} \d\d:.*oneDNN custom "
    r"operations.*\n?"
)


def build_report(run: Path, only: Collection[str] | None = None) -> Path:
    """Turn every executed notebook of a run into HTML and write the run's `index.html` over them:
    what the run found first, the ledger of published figures last.

    A notebook that is still to come has a page that says so, since others link to it. A page that is
    of its notebook as it is now stays, so that the report can be written anew after each notebook.

    Parameters
    ----------
    run : Path
        `runs/<id>`, with one folder per notebook.
    only : names of notebooks, optional
        Those that are done, while others are being executed.

    Returns
    -------
    Path
        The page.
    """
    asked = asked_for(run / ASKED)
    done = [file.parent.name for file in sorted(run.glob("*/notebook.ipynb"))]
    done = [name for name in done if only is None or name in only]
    waiting = [name for name in asked.get("notebooks", []) if name not in done]
    names = sorted({*done, *waiting})
    for name in waiting:
        page = run / name / "notebook.html"
        page.parent.mkdir(exist_ok=True)
        if not page.exists():
            _write(page, "waiting.html", name=name)
    pages = [_page(run / name, names) for name in done]
    environments = [page["environment"] for page in pages]
    table = build_ledger(run)
    topics = {topic: rows.to_dict("records") for topic, rows in table.groupby("topic", sort=False)}
    JINJA.filters["figure"] = figure
    return _write(
        run / "index.html",
        "report.html",
        run=run.name,
        asked=asked,
        pages=pages,
        waiting=waiting,
        names=done,
        judged=[page for page in pages if page["judged"]],
        findings=[*FINDINGS, "mean"],
        environment=next(filter(None, environments), {}),
        topics=topics,
        counts=count_verdicts(table).to_dict("index"),
        verdicts=VERDICTS,
        claims=len(table),
        tested=sum(~table["verdict"].isin([NOT_COMPARABLE, CHECKED])),
    )


def figure(value: float | None, unit: str) -> str:
    """A figure in words: an AUROC with three digits, a count whole, anything else with four that
    count.
    """
    if value is None or math.isnan(value):
        return ""
    if unit == "AUROC":
        return f"{value:.3f}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.4g}"


def _write(path: Path, template: str, **values) -> Path:
    text = JINJA.get_template(template).render(values)
    if path.suffix == ".md":
        text = inert(text)
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def _page(folder: Path, names: Sequence[str] = ()) -> dict:
    """What the report shows of one notebook, of which the page is written.

    A file that is damaged is told as this notebook's error, and what the others say is shown.
    """
    faults = []

    def read(make: Callable, part, *, name: str, otherwise):
        try:
            return make(part)
        except Exception as error:  # nbformat, nbconvert and Pillow raise nearly anything
            faults.append(f"{name}: {one_line(error)}")
            return otherwise

    def notebook(path):
        return _notebook(path, names)

    page = {"name": folder.name, "title": folder.name, "figure": None}
    page |= read(notebook, folder / "notebook.ipynb", name="notebook.ipynb", otherwise={})
    for part, file in RESULTS.items():
        page[part] = read(read_json, folder / file, name=file, otherwise={})
    page["judged"] = read(_is_judged, page["metrics"], name=RESULTS["metrics"], otherwise=False)
    if page["figure"]:
        file = folder / "figures" / f"{page['figure']}.png"
        page["figure"] = read(_figure, file, name=file.name, otherwise=None)
    page["error"] = " ".join(filter(None, [page.get("error"), *faults]))
    return page


def _notebook(source: Path, names: Sequence[str]) -> dict:
    """What an executed notebook says of itself: title, question, answer, error, seconds, and the
    name of its figure. Its page is written, with links to those before and after it in `names`.
    """
    notebook = nbformat.read(source, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    opening = next((text for text in texts if text.startswith("# ")), "# ?")
    title, _, lead = opening.removeprefix("# ").partition("\n\n")
    question = re.search(r"[^.?]+\?", " ".join(lead.partition("\n\n")[0].split()))
    answer = error = chosen = saved = None
    concluding = False
    for cell in notebook.cells:
        concluding |= "What we found" in cell.source
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                error = error or f"{output.ename}: {output.evalue}"
            said = output.get("data", {}).get("text/markdown", "")
            if concluding and not answer and (point := POINT.search(said)):
                answer = re.sub(r"[*`\u2060]", "", " ".join(point[1].split()))
        for name in SAVED.findall(cell.source):
            if (source.parent / "figures" / f"{name}.png").exists():
                saved = name
                chosen = name if CHOSEN in cell.metadata.get("tags", []) else chosen
    made, written = source.stat().st_mtime_ns, source.with_suffix(".html")
    # A page has the time of its notebook: a clock that went back makes none stale.
    if not written.exists() or written.stat().st_mtime_ns != made:
        write_page(notebook, written, title=title, names=names)
        with contextlib.suppress(OSError):  # then it is written anew each time
            os.utime(written, ns=(made, made))
    return {
        "title": title,
        "question": question and question[0].strip(),
        "answer": answer,
        "error": error,
        "figure": chosen or saved,
        "seconds": notebook.metadata.get("papermill", {}).get("duration"),
    }


def _is_judged(metrics: dict) -> bool:
    """Whether there are AUROCs; DataError if they are not those that the report shows."""
    if "auroc" not in metrics:
        return False
    try:
        for name in (*FINDINGS, "mean"):
            row = metrics["auroc"][name]
            for value in (row["auroc"], row["low"], row["high"], row["positives"]):
                float(value or 0)
        float(metrics.get("ridge") or 0)
        for part in ("train", "validation", "test"):
            int(metrics["split"]["images"][part])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"it has AUROCs of another form ({error!r}).") from error
    return True


def _figure(path: Path) -> dict:
    """A figure for the page, with the caption that `Run.save_figure` has put into its file."""
    with Image.open(path) as image:
        width, height = image.size
        caption = image.info.get("Description", path.stem)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"caption": caption, "width": width, "height": height, "data": data}


# --- a notebook's page


def write_page(notebook, path: Path, *, title: str, names: Sequence[str] = ()) -> None:
    """Write `notebook.html`; pictures are described by the captions of the figures that their cells
    saved.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
    path : where to write; the figures are in `figures` beside it
    title : of the page
    names : of the notebooks that have a page beside it, in their order
    """
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    _prepare(notebook, path.parent / "figures")
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    name = path.parent.name
    beside = {
        "previous": max((other for other in names if other < name), default=None),
        "next": min((other for other in names if other > name), default=None),
    }
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}, **beside})
    soup = BeautifulSoup(page, "html.parser")
    for script in soup.find_all("script"):  # of a library; the page would not run it either
        script.decompose()
    for number, table in enumerate(soup.find_all("table"), 1):
        about = {"tabindex": "0", "role": "region", "aria-label": f"Table {number}"}
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", **about}))
        for header in table.find_all("th"):
            if not header.get_text(strip=True):  # the corner of a data frame
                header.name = "td"
    for wrapper in soup.select(".jp-Cell-inputWrapper[tabindex]"):
        del wrapper["tabindex"]  # nothing in it is operated: only links and tables are stopped at
    # To another notebook: its page, if it is here.
    for link in soup.find_all("a", href=re.compile(r"^\d\w*\.ipynb$")):
        name = link["href"].removesuffix(".ipynb")
        if name in names:
            link["href"] = f"../{name}/notebook.html"
        else:
            link.unwrap()
    with atomic_write(path) as file:
        file.write(str(soup).encode())


def _prepare(notebook, figures: Path) -> None:
    """Drop hidden cells, if nothing failed in them, and TensorFlow's greetings; give pictures the
    text that the template describes them by.
    """
    heading, shown = "the beginning", []
    for cell in notebook.cells:
        failed = any(output.output_type == "error" for output in cell.get("outputs", []))
        if failed or HIDDEN.isdisjoint(cell.metadata.get("tags", [])):
            shown.append(cell)
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
        if cell.cell_type != "code":
            continue
        text, outputs = f"Figure under “{heading}”", []
        for name in SAVED.findall(cell.source)[:1]:
            if (figures / f"{name}.png").exists():
                text = _figure(figures / f"{name}.png")["caption"]
        for output in cell.outputs:
            if output.get("name") == "stderr":
                output["text"] = START.sub("", output["text"])
            if "data" in output:
                output.metadata["alt"] = text
            if output.get("text", "shown"):
                outputs.append(output)
        cell.outputs = outputs
    notebook.cells = shown


# --- a model card


def write_card(run: str | Path) -> Path:
    """Write the model card `MODEL_CARD.md` beside a `model.keras` and the `predictions.parquet` of
    its training, from what these files say.

    Parameters
    ----------
    run : path
        A folder with both, or one with a single such folder in it.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    WeightsError, DataError
        No model, or more than one; predictions that are missing or cannot be judged.
    """
    if not Path(run).exists():
        raise WeightsError(
            f"there is no folder {run}. Name the folder of one training, such as "
            "runs/latest/03_train_baseline."
        )
    weights = find_weights(run).resolve()
    folder, facts = weights.parent, read_card(weights)
    config = config_of(folder, facts)
    # No paths of this machine.
    config["weights"] = Path(config.get("weights") or "random weights").name
    predictions = read_predictions(folder / "predictions.parquet")
    judged = judge(predictions)
    aurocs, few = [], []
    for name, row in judged.iterrows():
        name, text = name.replace("_", " "), in_words(row)
        aurocs.append((name, text, int(row["positives"])))
        if name != "mean" and "to" not in text.split():
            few.append(name)
    told = read_json(folder / "metrics.json").get("data") or facts.get("data")
    data = told or data_name(Path(config.get("data_dir", "unknown")))
    settings = {
        name: value
        for name, value in sorted(config.items())
        if not name.endswith("_dir") and name != "resume"
    }
    parts = ("calibration", "operating_points")
    try:
        return _write(
            folder / "MODEL_CARD.md",
            "MODEL_CARD.md",
            facts=facts,
            config=settings,
            data=data,
            synthetic="synthetic" in data,
            aurocs=aurocs,
            few=few,
            test=predictions[predictions["part"] == "test"],
            environment=read_json(folder / "environment.json"),
            run="/".join(folder.parts[-2:]),
            details={name: _lines(facts[name]) for name in parts if facts.get(name)},
        )
    except jinja2.UndefinedError as error:
        raise WeightsError(
            f"the card in {weights} lacks something ({error}). Name the folder of a training, or "
            "add what is missing with `extend_card`."
        ) from error


def _lines(value, name: str = "") -> list[str]:
    """A plain value as lines "a, b: 0.5", numbers to four digits."""
    if isinstance(value, dict):
        lines = []
        for key, inner in value.items():
            lines += _lines(inner, f"{name}, {key}" if name else str(key))
        return lines
    values = value if isinstance(value, list) else [value]
    if len(values) > 8:
        return [f"{name}: {len(values)} values"]
    numbers = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
    return [f"{name}: {', '.join(numbers)}"]
