"""The README's figures are those of the reference runs, and its commands and links exist."""

import json
import re
from pathlib import Path

import pytest

from chexlib.findings import FINDINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = ROOT / "data" / "reference" / "03_train_baseline.json"


def test_the_results_table_is_that_of_the_reference_run():
    found = json.loads(REFERENCE.read_text())["metrics"]["auroc"]
    for finding in [*FINDINGS, "mean"]:
        row = found[finding]
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        assert (
            f"| {finding.replace('_', ' ')} | {row['auroc']:.3f} | {interval} | {row['positives']} |"
            in README
        )


def test_the_reference_says_how_it_came_about_and_names_no_machine_path():
    kept = json.loads(REFERENCE.read_text())
    assert (
        kept["profile"] == "standard"
        and kept["environment"]["commit"]
        and kept["params"]["seed"] == 0
    )
    assert not re.search(r'"/(root|home|work|tmp)', REFERENCE.read_text())


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)[)#]", README))
def test_links_of_the_readme_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert "<!--" not in README
