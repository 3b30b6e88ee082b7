"""An executed notebook as an HTML page: it needs no network, fits a phone, and can be read by a
screen reader.
"""

from __future__ import annotations

import re
from pathlib import Path

# What TensorFlow 2.21 says at its start, before it reads TF_CPP_MIN_LOG_LEVEL.
START = re.compile(
    r"WARNING: All log messages before absl::InitializeLog.*\n?|I\d{4} \d\d:.*oneDNN custom "
    r"operations.*\n?"
)

STYLE = """
body.jp-Notebook { padding: 0 1rem 4rem; max-width: 68rem; margin: 0 auto; overflow-wrap: anywhere; }
.jp-Notebook .jp-InputPrompt, .jp-Notebook .jp-OutputPrompt, .jp-Notebook .jp-Collapser { display: none; }
.jp-Notebook pre, .jp-Notebook .highlight pre { white-space: pre-wrap; overflow: visible; }
.jp-Notebook img { max-width: 100%; height: auto; }
.jp-Notebook :is(.jp-Cell, .jp-OutputArea, .jp-OutputArea-output) { overflow: visible; min-width: 0; }
.jp-Notebook table { overflow-wrap: normal; }
.scroll { overflow-x: auto; max-width: 100%; }
a:focus-visible, .scroll:focus-visible { outline: 3px solid #b35900; }
nav { font-family: system-ui, sans-serif; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
.jp-Notebook a { color: #0b5394 !important; text-decoration: underline !important; }
.highlight span { color: #1c2430; }
.highlight .c1, .highlight .sd { color: #3d6a52; font-style: italic; }
.highlight .k, .highlight .kn, .highlight .kc, .highlight .ow { color: #00602b; font-weight: 600; }
.highlight .s1, .highlight .s2, .highlight .sa, .highlight .si { color: #8f1d1d; }
.highlight .mi, .highlight .mf { color: #0b5394; }
"""


def write_page(notebook, path: Path, *, title: str) -> None:
    """Write `notebook.html`; pictures are described by the captions of the figures that their cells
    saved.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
    path : where to write; the figures are in `figures` beside it
    title : of the page
    """
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    # The exporter would otherwise load scripts from other people's servers; our notebooks need
    # none.
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
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                output["text"] = START.sub("", output["text"])
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "shown")]
    page = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]
    soup = BeautifulSoup(re.sub(r'<script src=""[^>]*></script>', "", page), "html.parser")
    _describe_pictures(soup, notebook, path.parent / "figures")
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
        other = link["href"].removesuffix(".ipynb")
        if (path.parent.parent / other).exists():
            link["href"] = f"../{other}/notebook.html"
        else:
            link.unwrap()
    soup.head.append(soup.new_tag("style", string=STYLE))
    back = BeautifulSoup(
        '<nav aria-label="Run"><p><a href="../index.html">Report of this run</a></p></nav>',
        "html.parser",
    )
    soup.body.insert(0, back)
    path.write_text(str(soup))


def _describe_pictures(soup, notebook, figures: Path) -> None:
    heading = "the beginning"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
        place = soup.find(id=f"cell-id={cell.get('id', '')}")
        saved = re.findall(r'save_figure\(\s*figure,\s*"(\w+)"', cell.source)
        captions = [
            caption(figures / f"{name}.png") for name in saved if (figures / f"{name}.png").exists()
        ]
        for picture in place.find_all("img") if place else []:
            if picture.get("alt", "").startswith("No description"):
                picture["alt"] = captions[0] if captions else f"Figure under “{heading}”"
    # Of a notebook whose cells have no id.
    for picture in soup.find_all("img", alt=re.compile("^No description")):
        picture["alt"] = "Figure of this notebook"


def caption(path: Path) -> str:
    """The caption that `Run.save_figure` has put into a figure."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description", path.stem)
