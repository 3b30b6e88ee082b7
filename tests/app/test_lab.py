"""Notebook 04 in a real JupyterLab: the plot moves while the cell runs, and Stop stops.

Needs Chromium.

Run by hand with `PYTHONPATH=tests python tests/app/test_lab.py FOLDER`, it leaves its screenshots in FOLDER.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from lab_driver import RAN, Lab
from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

from chexlib.files import ROOT
from chexlib.phantom.write import write_phantom
from chexlib.training.state import newest_checkpoint

pytestmark = pytest.mark.cores
PLOT = "document.querySelector('.jupyter-widgets.widget-image')?.src"
STOP = "[...document.querySelectorAll('button.jupyter-button')].find(b => b.textContent.includes('Stop'))"
SAYS = "document.querySelector('.jupyter-widgets.widget-label')?.textContent"


def press_stop_in_lab(folder: Path) -> tuple[set, list, Path]:
    """Run notebook 04 in JupyterLab and press Stop; gives the plots seen, what the line said, and
    the run's folder.
    """
    data = write_phantom(folder / "phantom", n_images=90, size=32, min_prevalence=0.1, workers=1)
    settings = dict(
        data_dir=str(data),
        run_dir=str(folder / "run"),
        topology="vgg16",
        size=32,
        epochs=500,
        batch_size=8,
    )
    notebook = load_notebook_node(str(ROOT / "notebooks" / "04_train_distributed.ipynb"))
    write_ipynb(parameterize_notebook(notebook, settings), str(folder / "train.ipynb"))
    with Lab("train.ipynb", root_dir=folder) as lab:
        lab.run_all()
        lab.wait_for(f"{RAN} || ({PLOT} && {SAYS}?.startsWith('epoch'))", 400)
        plots, said = set(), []
        for number in range(3):
            plots.add(lab.evaluate(PLOT))
            said.append(lab.evaluate(SAYS))
            lab.scroll_to("button.jupyter-button", "Stop")
            lab.screenshot(folder / f"moving-{number}.png")
            lab.wait_for(
                f"{PLOT} !== {json.dumps(lab.evaluate(PLOT))} && {SAYS} !== {json.dumps(said[-1])}",
                200,
            )
        lab.click("button.jupyter-button", "Stop")
        lab.wait_for(f"{STOP}.disabled", 60)
        lab.screenshot(folder / "stopping.png")
        lab.wait_for(RAN, 400)
        said.append(lab.evaluate(SAYS))
        lab.scroll_to("button.jupyter-button", "Stop")
        lab.screenshot(folder / "stopped.png")
    return plots, said, folder / "run"


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on the PATH")
def test_the_live_plot_moves_and_stop_ends_the_training_with_a_checkpoint(tmp_path):
    plots, said, run = press_stop_in_lab(tmp_path)
    assert len(plots) == 3 and len(set(said[:3])) == 3
    assert said[3].startswith("ended.")
    metrics = json.loads((run / "metrics.json").read_text())
    assert (
        metrics["stopped"] is True
        and 0 < len(metrics["history"]) < 500
        and metrics["weights_equal"] is True
    )
    _, _, facts = newest_checkpoint(run / "checkpoints")
    rows = facts["history"]
    assert facts["position"]["epoch"] in (len(rows), len(rows) - 1) and facts["ranks"] == 2


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    target.mkdir(parents=True, exist_ok=True)
    print(*press_stop_in_lab(target)[1], target, sep="\n")
