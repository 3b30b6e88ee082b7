"""The report is a site that a person enjoys: told without the network, on a phone, to a screen
reader, by keyboard.

Run by hand with `PYTHONPATH=tests python tests/app/test_report.py RUN FOLDER`, it leaves
screenshots of a run's pages in FOLDER.
"""

import base64
import itertools
import json
import os
import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from damage import DAMAGE
from lab_driver import Browser
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from chexlib.app.reference import compare_run
from chexlib.app.report import HIDDEN, _page, build_report
from chexlib.app.runs import start
from chexlib.errors import ConfigError, DataError
from chexlib.files import write_json
from chexlib.findings import FINDINGS

WIDTHS = (1280, 390)  # CSS pixels: a desk and a phone
WIDE = "<table><thead><tr><th></th>" + "<th>a long heading</th>" * 20 + "</tr></thead><tbody><tr>"
WIDE += "<th>row</th>" + "<td>0.12345</td>" * 20 + "</tr></tbody></table>"
LONG = "0123456789" * 40
BEYOND = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth
    && !e.closest('.scroll') && !e.closest('.skip')).map(e => e.outerHTML.slice(0, 120))"""
AXE = """axe.run(document, {resultTypes: ['violations']}).then(found => found.violations
    .filter(v => ['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.nodes[0].html.slice(0, 200)]))"""
OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true }); 0"
PAGES = ("03_train", "05_other")
FOUND = "\n- **AUROC**:\n  0.81.\n- More."
CAPTION = "Test AUROC of each finding."


def make_run(folder):
    """A run of two notebooks with what pages stumble over: wide tables, long lines, pictures,
    links, code, an error.
    """
    from io import BytesIO

    run = start(
        "03_train",
        run_dir=str(folder / "03_train"),
        parameters={"seed": 1, "size": 64, "epochs": 2},
    )
    figure = Figure(figsize=(14, 3))
    figure.subplots().plot([1, 2])
    run.save_figure(figure, "auroc", caption=CAPTION)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    picture = new_output(
        "display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    )
    row = {"auroc": 0.81, "low": 0.75, "high": 0.9, "positives": 37, "negatives": 100}
    split = {
        "name": "patient",
        "digest": "abc123",
        "images": {"train": 70, "validation": 10, "test": 20},
    }
    auroc = dict.fromkeys((*FINDINGS, "mean"), row)
    facts = dict(data="phantom (synthetic)", ranks=2, images_per_second=9.5, ridge=0.79)
    run.finish(auroc=auroc, split=split, **facts)
    code = (
        "# why\nfor name in sorted(found):  # each\n    print(f'{name}', 1.5, None, " + LONG + ")"
    )
    table = new_output("display_data", {"text/html": WIDE, "text/plain": "a table"})
    cells = [
        new_markdown_cell(
            "# Train\n\nHow good is it? Text with a [link](05_other.ipynb) and [another](08_missing.ipynb).\n\n## "
            "Part"
        ),
        new_code_cell(code, outputs=[new_output("stream", name="stdout", text=LONG), table]),
        new_code_cell('run.save_figure(figure, "auroc", caption=caption)', outputs=[picture]),
        new_code_cell("figure", outputs=[picture]),
        new_markdown_cell("## What we found"),
        new_code_cell("found", outputs=[new_output("display_data", {"text/markdown": FOUND})]),
        *(new_code_cell(f"hidden_{tag}()", metadata={"tags": [tag]}) for tag in HIDDEN),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "03_train" / "notebook.ipynb")
    (folder / "05_other").mkdir()
    error = new_output("error", ename="ValueError", evalue=LONG, traceback=[f"ValueError: {LONG}"])
    tags = {"tags": ["plumbing"]}  # a failure is shown wherever it is
    failed = [new_markdown_cell("# Other"), new_code_cell("f()", outputs=[error], metadata=tags)]
    nbformat.write(new_notebook(cells=failed), folder / "05_other" / "notebook.ipynb")
    return build_report(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def soups(report):
    return {
        path: BeautifulSoup(path.read_text(), "html.parser")
        for path in (report, *report.parent.glob("*/*.html"))
    }


def test_every_page_names_its_language_and_title_and_its_pictures_have_a_text(report):
    for path, soup in soups(report).items():
        assert soup.html["lang"] == "en" and soup.title.text.strip() not in ("", "Notebook"), path
        assert len(soup.find_all("h1")) == 1, path
        for picture in soup.find_all("img"):
            assert len(picture["alt"]) > 5 and "No description" not in picture["alt"], path


def test_a_picture_is_told_by_the_caption_of_the_figure_that_its_cell_saved(report):
    soup = soups(report)[report.parent / "03_train" / "notebook.html"]
    assert [picture["alt"] for picture in soup.find_all("img")] == [CAPTION, "Figure under “Part”"]


def test_headings_follow_each_other_without_a_gap(report):
    soup = soups(report)[report]
    levels = [int(heading.name[1]) for heading in soup.find_all(re.compile(r"^h\d$"))]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_tables_scroll_in_a_region_that_the_keyboard_reaches_and_that_has_a_name(report):
    for path, soup in soups(report).items():
        names = []
        for table in soup.find_all("table"):
            region = table.find_parent(class_="scroll")
            assert region["tabindex"] == "0" and region["role"] == "region", path
            names.append(region["aria-label"])
        assert len(names) == len(set(names)), path


def test_the_first_link_skips_to_the_results_and_each_part_can_be_gone_to(report):
    soup = soups(report)[report]
    assert soup.find("a")["href"] == "#main"
    for link in soup.find_all("a", href=re.compile("^#")):
        assert soup.find(id=link["href"][1:]), link


def test_links_between_notebooks_lead_to_pages_of_this_run_or_are_text(report):
    page = report.parent / "03_train" / "notebook.html"
    links = {
        link["href"]: link.text
        for link in soups(report)[page].find_all("a")
        if not link["href"].startswith("#")
    }
    assert {"../index.html", "../05_other/notebook.html"} == set(links)
    assert all((page.parent / link).exists() for link in links)
    assert "and another." in soups(report)[page].text


def test_the_first_screen_says_what_was_trained_on_what_how_well_and_beside_what(report):
    soup = soups(report)[report]
    first, second = soup.find_all("h2")[:2]
    assert (first.text, second.text) == ("How good is the network?", "Questions and answers")
    told = " ".join(first.find_parent("section").get_text(" ", strip=True).split())
    assert "70 images of 64 px, 2 passes: phantom (synthetic)" in told and "abc123" in told
    assert "0.810 mean test AUROC, 95 % interval 0.750 to 0.900" in told
    assert "0.790 a ridge regression" in told and "0.500 chance" in told and "One seed." in told
    assert "from chance" not in told and "beat" not in told
    assert [picture["alt"] for picture in soup.find_all("img")] == [CAPTION]
    train, other = soup.select("[aria-label='Notebooks of this run'] tbody tr")
    assert [cell.text for cell in train.find_all("td")][1:3] == ["How good is it?", "AUROC: 0.81."]
    assert "ValueError" in other.text


@pytest.mark.parametrize(
    "low, ridge, told",
    [(0.49, 0.6, "not distinguishable from chance"), (0.7, 0.82, "not beat the ridge")],
)
def test_a_result_that_says_nothing_has_a_banner(report, tmp_path, low, ridge, told):
    run = shutil.copytree(report.parent, tmp_path / "run")
    file = run / "03_train" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["auroc"]["mean"] |= {"low": low}
    write_json(file, metrics | {"ridge": ridge})
    assert told in soups(build_report(run))[run / "index.html"].select_one(".main .note").text


def test_halfway_the_report_says_so_and_every_link_leads_somewhere(report, tmp_path):
    run = shutil.copytree(report.parent, tmp_path / "run")
    (run / "03_train" / "notebook.html").unlink()
    write_json(run / "run.json", {"notebooks": ["03_train", "05_other", "08_missing"]})
    pages = soups(build_report(run, {"03_train"}))
    assert "1 of 3 notebooks were done" in pages[run / "index.html"].select_one(".note").text
    assert "not done yet" in pages[run / "08_missing" / "notebook.html"].main.text
    assert "Next: 05 other" in pages[run / "03_train" / "notebook.html"].nav.text
    for path, soup in pages.items():
        for link in soup.find_all("a", href=re.compile("^[^#]")):
            assert (path.parent / link["href"]).exists(), link


def test_the_figure_of_a_notebook_is_the_last_one_that_it_saved_or_the_chosen_one(tmp_path):
    run = start("03_x", run_dir=str(tmp_path / "03_x"))
    cells = [new_markdown_cell("# X")]
    for name in ("first", "second"):
        run.save_figure(Figure(), name, caption=name)
        cells.append(new_code_cell(f'run.save_figure(ax.figure, "{name}", caption="{name}")'))
    book = new_notebook(cells=cells)
    for chosen in ("second", "first"):
        nbformat.write(book, run.path / "notebook.ipynb")
        assert _page(run.path)["figure"]["caption"] == chosen
        cells[1].metadata["tags"] = ["chosen"]


def test_the_ledger_shows_every_figure_with_ours_and_begins_with_what_can_be_tested(report):
    from chexlib.ledger.answers import build_ledger, count_verdicts

    soup, table = soups(report)[report], build_ledger(report.parent)
    assert len(soup.select(".ledger tbody tr")) == len(table)
    tally = {
        li.text.strip().split(" ", 1)[1]: int(li.strong.text)
        for li in soup.select("#ledger ~ .tally li")
    }
    counts = count_verdicts(table).loc["all"]
    assert tally == {name: counts[name] for name in tally} and sum(tally.values()) == len(table)
    tested = len(table) - counts["not comparable"] - counts["checked"]
    assert soup.select_one("#ledger ~ p").text.startswith(f"{tested} of {len(table)} published")
    row = next(
        tr for tr in soup.select(".ledger tbody tr") if tr.th.text.startswith("CheXNet, Mass")
    )
    cells = [td.get_text(" ", strip=True) for td in row.find_all("td")]
    assert cells[:2] == ["0.8676 AUROC", "0.810 AUROC 0.750 to 0.900"]
    assert (
        cells[2] == "not comparable our images are synthetic"
        and row.a["href"] == "03_train/notebook.html"
    )


def test_pages_leave_out_what_only_a_machine_needs_and_the_solutions(report):
    page, failed = ((report.parent / n / "notebook.html").read_text() for n in PAGES)
    assert "hidden_" not in page and "save_figure" in page
    assert "ValueError" in failed


def look(report, each):
    """Open every page at every width, with all that can be unfolded open, and hand the browser to
    `each`.
    """
    script = (files("axe_core_python") / "axe.min.js").read_text()
    with Browser() as browser:
        for path in (report, *sorted(report.parent.glob("*/*.html"))):
            for width in WIDTHS:
                browser.show(path, width=width)
                browser.evaluate(OPEN)
                browser.evaluate(f"{script}; 0")
                each(browser, path, width)


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on the PATH")
def test_pages_fit_a_desk_and_a_phone_and_nobody_stumbles(report):
    seen = []

    def check(browser, path, width):
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
        assert browser.evaluate(BEYOND) == [], (path, width)
        assert browser.evaluate(AXE) == [], (path, width)
        seen.append((path.parent.name, width))

    look(report, check)
    assert len(seen) == 2 * 3


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)

    def shoot(browser, path, width):
        height = min(browser.evaluate("document.documentElement.scrollHeight"), 6000)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)[
            "data"
        ]
        (target / f"{path.parent.name}-{width}.png").write_bytes(base64.b64decode(picture))
        print(
            path.parent.name, width, json.dumps([browser.evaluate(BEYOND), browser.evaluate(AXE)])
        )

    look(Path(sys.argv[1]).resolve() / "index.html", shoot)


# --- damaged files of a run: each is told where it belongs, and all else is shown


@pytest.mark.parametrize("damage", ["cut", "a list", "deep"])
def test_a_damaged_file_is_told_at_its_notebook_and_the_report_has_all_others(
    report, tmp_path, damage
):
    for name in ("metrics.json", "environment.json", "notebook.ipynb", "figures/auroc.png"):
        run = tmp_path / name.replace("/", "-")
        shutil.copytree(report.parent, run)
        file = run / "03_train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(DAMAGE[damage])
        row, other = BeautifulSoup(build_report(run).read_text(), "html.parser").select(
            "[aria-label='Notebooks of this run'] tbody tr"
        )
        assert "failed" in row.text and file.stem in row.text, name
        assert "ValueError" in other.text


@pytest.mark.parametrize(
    "metrics", [{"auroc": "x"}, {"auroc": {}}, {"auroc": {"mean": 0.5}}, {"auroc": None}]
)
def test_aurocs_of_another_form_are_told_and_not_shown(report, tmp_path, metrics):
    run = tmp_path / "run"
    shutil.copytree(report.parent, run)
    write_json(run / "03_train" / "metrics.json", metrics)
    text = build_report(run).read_text()
    assert "AUROCs of another form" in text and "AUROC per finding, test part" not in text


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_refused_by_compare_in_one_line_that_names_the_file(tmp_path, damage):
    notebook = "03_train_baseline"
    for name in ("metrics.json", "params.json"):
        folder = tmp_path / name / notebook
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {})
        (folder / name).write_bytes(DAMAGE[damage])
        with pytest.raises(DataError) as told:
            compare_run(folder.parent)
        assert str(folder / name) in str(told.value) and "\n" not in str(told.value)


def test_figures_of_another_kind_are_refused_by_compare(tmp_path):
    folder = tmp_path / "run" / "03_train_baseline"
    folder.mkdir(parents=True)
    row = {"auroc": 0.5, "low": "a", "high": "b"}
    write_json(folder / "metrics.json", {"auroc": {"mean": row}})
    with pytest.raises(DataError, match="cannot be compared"):
        compare_run(folder.parent)


def test_a_run_that_is_not_there_is_refused_by_compare(tmp_path):
    (tmp_path / "latest").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"no run folder .*latest"):
        compare_run(tmp_path / "latest")


def test_a_page_is_written_anew_for_a_notebook_of_a_clock_that_went_back(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "chexlib.app.report.write_page",
        lambda notebook, path, title, names: written.append(title) or path.touch(),
    )
    folder = tmp_path / "03_x"
    folder.mkdir()
    for title, at in (("first", 2e9), ("first", 2e9), ("second", 1e9)):
        book = new_notebook(cells=[new_markdown_cell(f"# {title}")])
        nbformat.write(book, folder / "notebook.ipynb")
        os.utime(folder / "notebook.ipynb", (at, at))
        _page(folder)
    assert written == ["first", "second"]
