"""What data are named is text, in every page, report and output of a notebook, and never markup."""

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from lab_driver import RAN, Browser, Lab
from nbclient import NotebookClient
from nbconvert.filters import markdown2html_mistune
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from chexlib.app.report import build_report
from chexlib.app.runs import start
from chexlib.files import ROOT
from chexlib.findings import FINDINGS
from chexlib.markup import Markdown, styled
from chexlib.phantom.write import write_phantom

# Two of these are names of folders and files, so that no slash is in them.
TAG = "<img src=x onerror='globalThis.struck=1'>"
LINK = "[a](javascript:globalThis.struck=2) ![b](x) <javascript:globalThis.struck=3>"
MARKUP = [
    TAG,
    LINK,
    "<script>globalThis.struck=4</script>",
    "$a^$ & `<u>x`",
    "[c]: javascript:",
]
LIVE = "script, iframe, [onerror], a[href^='javascript:'], img[src='x'], u"
CHROMIUM = pytest.mark.skipif(
    not shutil.which("chromium"), reason="there is no chromium on the PATH"
)


def live(html):
    return [str(tag) for tag in BeautifulSoup(html, "html.parser").select(LIVE)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of which every text is markup: folder, images, patients, sexes, views, columns."""
    home = tmp_path_factory.mktemp("data")
    folder = write_phantom(home / f"{TAG} {LINK} $a^$", n_images=60, size=32, workers=1)
    (folder / "phantom.json").unlink()
    tables = [folder / name for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv")]
    names = pd.read_csv(tables[0], dtype=str)["Image Index"]
    for number, name in enumerate(names):
        new = f"{number}{MARKUP[number % 2]}$a^$.png"
        image = folder / "images_001" / "images" / name
        image.rename(image.with_name(new))
        for file in (*tables, folder / "train_val_list.txt", folder / "test_list.txt"):
            file.write_text(
                re.sub(
                    rf"^{re.escape(name)}", new.replace("\\", r"\\"), file.read_text(), flags=re.M
                )
            )
    table = pd.read_csv(tables[0], dtype=str)
    for column in ("Patient Gender", "View Position"):
        table[column] = [MARKUP[number % len(MARKUP)] for number in range(len(table))]
    table["Patient ID"] = TAG + table["Patient ID"] + MARKUP[2]
    table.assign(**{MARKUP[2]: TAG}).to_csv(tables[0], index=False)
    return folder


@pytest.mark.parametrize("text", MARKUP)
def test_a_table_shows_names_as_they_are_in_cells_headings_and_caption(text):
    table = pd.DataFrame({text: [text, "y"], "n": [1.2345, 2]}, index=[text, "z"])
    table = table.rename_axis(index=text, columns=text)
    html = styled(table).format(precision=2).set_caption(text).to_html()
    soup = BeautifulSoup(html, "html.parser")
    assert not live(html) and soup.caption.text == text
    cells = [cell.text for cell in soup.find_all(["th", "td"])]
    assert cells.count(text) == 5 and "1.23" in cells


@pytest.mark.parametrize("text", MARKUP)
def test_a_text_of_a_notebook_has_form_and_names_that_do_nothing(text):
    shown = Markdown(f"- **{text}**: {text}\n- `{text}`\n\n| a |\n|---|\n| {text} |\n\n{text}")
    html = markdown2html_mistune(shown._repr_markdown_())
    soup = BeautifulSoup(html, "html.parser")
    assert not live(html) and not soup.find_all(["a", "img"])
    assert len(soup.find_all("li")) == 2 and soup.table


def test_chexlib_and_notebooks_show_texts_and_tables_by_these_two_alone():
    sources = {path: path.read_text() for path in (ROOT / "chexlib").rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        sources[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    other = (
        r"\.style\.\w+\(|\bStyler\b|escape=False|\bdisplay\.(?:HTML|Markdown)\b"
        r"|IPython.*import .*\b(?:HTML|Markdown|Javascript|Latex|SVG)\b"
    )
    found = {path.name: re.findall(other, text) for path, text in sources.items()}
    assert {name for name, ways in found.items() if ways} == {"markup.py"}


SINKS = """
from chexlib import figures
from chexlib.app.runs import start
from chexlib.data.nih import data_name, load_radiographs, read_image
from chexlib.data.splits import audit, make_split
from chexlib.markup import Markdown, styled
from IPython.display import display
import pandas as pd
run = start("03_x", run_dir=RUN, parameters={"data_dir": DATA})
radiographs = load_radiographs(DATA)
rows, split = radiographs.table, make_split(radiographs, seed=0)
name, root = data_name(radiographs.root), radiographs.root
display(run, radiographs, split, audit(split, radiographs), rows.head(9))
display(pd.crosstab(rows["patient"].head(9), rows["image"].head(9)))
display(styled(rows.head(9)).set_caption(f"{name}, {root}"))
display(Markdown(f"# {name}\\n\\n- **{root}**: `{root}`\\n\\n{rows['patient'][0]}"))
shown = rows.head(4)
figure = figures.radiographs([read_image(path) for path in shown["path"]], list(shown["image"]))
run.save_figure(figure, "names", caption=f"{name}, {rows['patient'][0]}")
display(figure)
print(root, rows["image"][0])
"""


def hostile_notebook(data, run):
    code = f"DATA, RUN = {str(data)!r}, {str(run)!r}\n" + SINKS
    notebook = new_notebook(cells=[new_markdown_cell("# A title"), new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    return notebook


@pytest.fixture(scope="module")
def report(data):
    """The report of a run with such names, whose notebook put out what ours put out."""
    run = data.parent / f"runs {TAG}"
    notebook = hostile_notebook(data, run / "03_x")
    NotebookClient(notebook).execute()
    notebook.cells[0].source = f"# {MARKUP[3]}"
    error = new_output("error", ename=MARKUP[2], evalue=TAG, traceback=[TAG])
    notebook.cells.append(new_code_cell("1", outputs=[error]))
    for name in (LINK, "javascript:globalThis.struck=5"):
        told = {"data_dir": str(data), MARKUP[2]: TAG}
        made = start("03_x", run_dir=str(run / name), parameters=told)
        parts = {"train": 70, "validation": 10, "test": 20}
        split = {"name": TAG, "digest": MARKUP[2], "images": parts}
        row = {"auroc": 0.8, "low": None, "high": None, "positives": 3, "negatives": 4}
        auroc = dict.fromkeys((*FINDINGS, "mean"), row)
        made.finish(data=MARKUP[2], split=split, auroc=auroc, ranks=1)
    for folder in run.iterdir():
        nbformat.write(notebook, folder / "notebook.ipynb")
    return build_report(run)


def test_no_page_of_a_report_has_live_markup_and_none_allows_a_script(report):
    pages = [report, *report.parent.glob("*/notebook.html")]
    assert len(pages) == 4
    for page in pages:
        soup = BeautifulSoup(page.read_text(), "html.parser")
        policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        assert "default-src 'none'" in policy and "script-src" not in policy
        # In the title of the notebook, which is its author's, a formatting is one.
        assert [tag for tag in soup.select(LIVE) if not tag.find_parent("h1")] == []
    shown = BeautifulSoup((report.parent / "03_x" / "notebook.html").read_text(), "html.parser")
    assert TAG in shown.text and any(TAG in image["alt"] for image in shown.find_all("img"))


@CHROMIUM
def test_nothing_happens_when_a_browser_opens_them_and_its_links_are_followed(report):
    with Browser() as browser:
        for page in [report, *report.parent.glob("*/notebook.html")]:
            browser.show(page, width=1280)
            browser.evaluate("document.querySelectorAll('a').forEach(a => a.click()); 0")
            assert browser.evaluate("globalThis.struck === undefined"), page


@CHROMIUM
@pytest.mark.cores
def test_nothing_happens_in_jupyterlab_which_trusts_what_it_runs(data, tmp_path):
    notebook = hostile_notebook(data, tmp_path / TAG)
    # JupyterLab would execute it: what a notebook writes by another way is not held back.
    strike = "from IPython.display import HTML\nHTML(\"<img src=x onerror='globalThis.hit=1'>\")"
    notebook.cells.append(new_code_cell(strike))
    nbformat.write(notebook, tmp_path / "hostile.ipynb")
    with Lab("hostile.ipynb", root_dir=tmp_path) as lab:
        lab.run_all()
        lab.wait_for(f"{RAN} && globalThis.hit", 120)
        outputs = "document.querySelector('.jp-Notebook')"
        found = f"[...{outputs}.querySelectorAll({json.dumps(LIVE)})].map(tag => tag.outerHTML)"
        assert [tag for tag in lab.evaluate(found) if "globalThis.hit" not in tag] == []
        assert lab.evaluate(f"{outputs}.textContent.includes({json.dumps(TAG)})")
        assert lab.evaluate("globalThis.struck === undefined")
