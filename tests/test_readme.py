"""The README's figures are those of the reference runs, its links exist, and it stays short."""

import ast
import builtins
import importlib
import json
import re
from pathlib import Path

import pytest

from chexlib.findings import FINDINGS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "TROUBLESHOOTING.md", "CONTRIBUTING.md", "DATA_CARD.md"]
PAGES += [f"{folder}/README.md" for folder in ("chexlib", "data", "data/reference")]
PAGES += ["benchmarks/README.md", "notebooks/README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "data" / "reference" / "03_train_baseline.json"


def test_the_results_table_is_that_of_the_reference_run():
    page = (ROOT / "data" / "reference" / "README.md").read_text(encoding="utf-8")
    found = json.loads(REFERENCE.read_text())["metrics"]["auroc"]
    for finding in [*FINDINGS, "mean"]:
        row = found[finding]
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        assert (
            f"| {finding.replace('_', ' ')} | {row['auroc']:.3f} | {interval} | {row['positives']} |"
            in page
        )
    row = found["mean"]
    mean = f"{row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    assert mean in README


def test_the_reference_says_how_it_came_about_and_names_no_machine_path():
    kept = json.loads(REFERENCE.read_text())
    assert (
        kept["profile"] == "standard"
        and kept["environment"]["commit"]
        and kept["params"]["seed"] == 0
    )
    assert not re.search(r'"/(root|home|work|tmp)', REFERENCE.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)[)#]", text):
        # What the page itself is served from knows, and a clone does not.
        assert target.startswith("../../") or ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 1300


SNIPPETS = [
    code
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_what_a_snippet_of_a_page_uses_it_imports_from_where_it_is(code):
    tree = ast.parse(code, type_comments=False)
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in named if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
    assert {node.id for node in named} <= known


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert "<!--" not in README
