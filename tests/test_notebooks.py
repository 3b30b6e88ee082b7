"""The notebooks: their form, their manuals, and one whole headless run of all of them."""

import ast
import json
import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from click.testing import CliRunner
from nbclient import NotebookClient
from papermill.cli import papermill as papermill_command
from papermill.parameterize import parameterize_notebook
from PIL import Image

from chexlib.app.course import write_course
from chexlib.app.execute import execute, find_notebooks
from chexlib.data.cache import cache_folder
from chexlib.errors import ConfigError
from chexlib.evaluation.calibration import Calibration
from chexlib.evaluation.operating import OperatingPoints
from chexlib.files import ROOT
from chexlib.ledger.published import claims
from chexlib.machine import hardware
from chexlib.phantom.write import write_phantom
from chexlib.scaling import tune
from chexlib.training.config import TrainConfig

NOTEBOOKS = find_notebooks()
RESUMED = (1, 3) if os.environ.get("CHEXLIB_LONG") else (1,)  # ranks that go on with 04's training
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_notebook_has_the_form_that_its_readers_know(path):
    cells = nbformat.read(path, as_version=4).cells
    headings = [
        line
        for c in cells
        if c.cell_type == "markdown"
        for line in c.source.splitlines()
        if line.startswith("# ")
    ]
    assert len(headings) == 1 and cells[0].source.startswith("# ")
    assert "**You will**" in cells[0].source and "**You need**" in cells[0].source
    assert "?" in cells[0].source.split("\n\n")[1]  # the report and the map show the question
    assert "parameters" in cells[1].metadata.get("tags", [])
    text = "\n".join(c.source for c in cells)
    for part in ("What we found", "**Limits", "**Next", "Exercise", "watermark()"):
        assert part in text, part
    assert "solution" in {tag for c in cells for tag in c.metadata.get("tags", [])}


def code_of(cell) -> ast.Module:
    """A cell's code as Python reads it, without the magics of IPython."""
    lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
    return ast.parse("\n".join(lines))


@each_notebook
def test_cells_that_teach_use_only_the_names_of_chexlib_that_the_first_cell_lists(path):
    cells = nbformat.read(path, as_version=4).cells
    (row,) = re.findall(r"^\| from chexlib \| (.*) \|$", cells[0].source, re.M)
    listed = set(re.findall(r"`(\w+)`", row))
    code = {c.id: code_of(c) for c in cells if c.cell_type == "code"}
    ours = {
        alias.asname or alias.name
        for tree in code.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "chexlib"
        for alias in node.names
    }
    used = {
        node.id
        for cell in cells
        if cell.cell_type == "code" and "plumbing" not in cell.metadata.get("tags", [])
        for node in ast.walk(code[cell.id])
        if isinstance(node, ast.Name)
    }
    assert used & ours == listed and len(listed) <= 10


@each_notebook
def test_outputs_are_not_in_git(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_no_interval_is_written_by_hand_which_would_say_nan(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not re.search(r"low'?\]?:[^}]*\} to \{", cell.source), cell.source[:60]


@each_notebook
def test_links_between_notebooks_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", cell.source):
                assert (path.parent / target).exists(), target


@each_notebook
def test_help_lists_every_parameter_with_type_and_help(path):
    answer = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert answer.exit_code == 0, answer.output
    parameters = papermill.inspect_notebook(path)
    assert {"seed", "data_dir", "run_dir"} <= set(parameters)
    for name, about in parameters.items():
        assert about["inferred_type_name"] not in ("None", "") and len(about["help"]) > 10, name
        assert re.search(rf"^\s*{name}: {about['inferred_type_name']}", answer.stdout, re.M), name


def run_here(path: Path, folder: Path, **parameters) -> str:
    """The texts that a notebook displays, its cells executed in this process; and what a cell said
    that may fail.
    """
    first, *cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    said, plain = [], {"run_dir": str(folder), **parameters}
    names = {"display": lambda *shown: said.extend(getattr(s, "data", "") for s in shown)}
    exec(first.source, names)
    names.update(plain)
    for cell in cells:
        # The last expression of a cell is displayed too.
        tree = ast.parse(cell.source)
        if isinstance(tree.body[-1], ast.Expr):
            tree.body[-1].value = ast.Call(
                ast.Name("display", ast.Load()), [tree.body[-1].value], []
            )
        try:
            exec(compile(ast.fix_missing_locations(tree), path.stem, "exec"), names)
        except AssertionError as error:
            if "raises-exception" not in cell.metadata.get("tags", []):
                raise
            said.append(str(error))
    return "\n".join(text for text in said if isinstance(text, str))


def test_small_and_odd_data_are_explored_and_prepared(tiny_nih, tmp_path):
    """Thirteen images, of which an odd number trains, without a view or an age."""
    root = tiny_nih(edition="2017")
    csv = root / "Data_Entry_2017.csv"
    csv.write_text(re.sub(r",\d{3}Y,([MF]),(PA|AP),", r",,\1,,", csv.read_text()))
    parameters = {"data_dir": str(root), "max_images": 13}
    first, second = find_notebooks(["01", "02"])
    told = run_here(first, tmp_path / "01", **parameters)
    assert "Fewer than two views are named here" in told and "None of the ages is known" in told
    assert " nan" not in told
    told = run_here(second, tmp_path / "02", **parameters)
    assert "Seen exactly once in the epoch: **5 of 5** images" in told


# --- the course


def test_a_students_copy_runs_to_its_end_and_each_check_says_what_is_missing(tiny_nih, tmp_path):
    (student,) = (write_course(tmp_path / "course") / "student").glob("02_*.ipynb")
    told = run_here(student, tmp_path / "02", data_dir=str(tiny_nih(edition="2017")))
    assert "Set `again`: the audit of the parts with one image moved." in told
    assert (tmp_path / "02" / "metrics.json").exists()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    return write_course(tmp_path_factory.mktemp("course"))


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@each_notebook
def test_a_students_copy_keeps_what_is_asked_and_not_the_solution(course, path):
    source, student, solved = (
        nbformat.read(file, as_version=4)
        for file in (path, course / "student" / path.name, course / "solved" / path.name)
    )
    assert solved == source and len(student.cells) == len(source.cells)
    blanks, solutions = tagged(student, "solution"), tagged(source, "solution")
    for asked, solution in zip(blanks, solutions, strict=True):
        *comments, blank = asked.source.splitlines()
        assert blank == "..." and solution.source.startswith("\n".join(comments))
        assert all(line.startswith("# ") for line in comments)
    for check in tagged(student, "check"):
        assert "raises-exception" in check.metadata.tags


@each_notebook
def test_what_a_check_asks_for_is_made_by_the_solutions_alone(path):
    """Else a check would not see that it is missing."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    made = {"solution": set(), "other": set()}
    for cell in cells:
        kind = "solution" if "solution" in cell.metadata.get("tags", []) else "other"
        for node in ast.walk(code_of(cell)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made[kind].add(node.id)
            elif isinstance(node, ast.FunctionDef):
                made[kind].add(node.name)
        if "check" in cell.metadata.get("tags", []):
            asked = set(re.findall(r'"(\w+)" in globals\(\)', cell.source))
            assert asked and asked <= made["solution"] - made["other"], cell.source


def test_a_course_is_not_written_over_answers(course):
    with pytest.raises(ConfigError, match="not empty, and may hold answers"):
        write_course(course)


def remember_layouts():
    """As if 08 had been here before, and been ended in its last layout of ranks and threads: what
    was measured once is not measured again, and each would be a start of TensorFlow.
    """
    *before, _ = tune.layouts()
    point = {"topology": "vgg16", "size": 32, "precision": "float32", "batch_per_rank": 4}
    measured = {"steps": 5, "images_per_second": 1.0, "gflop_per_image": 1.9, "seconds": [4.0] * 5}
    rows = [{**point, **hardware(), **measured, "ranks": r, "threads": t} for r, t in before]
    sweep = cache_folder(32).with_name("grids") / "08_layouts.json"
    sweep.parent.mkdir(parents=True, exist_ok=True)
    sweep.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Every notebook once, on a phantom small enough for a test, engines and all."""
    remember_layouts()
    data = write_phantom(
        tmp_path_factory.mktemp("data") / "phantom",
        n_images=80,
        size=48,
        min_prevalence=0.1,
        workers=1,
    )
    parameters = {"data_dir": str(data), "topology": "vgg16", "size": 32, "epochs": 2, "engines": 2}
    parameters["resume_ranks"] = ",".join(map(str, RESUMED))
    parameters["plan_noise_scale"] = 500.0
    parameters |= {
        "norm_topology": "resnet50",
        "norm_batches": "16,32",
        "norm_passes": 2,
        "recipe_topology": "vgg16",
        "recipe_batch": 16,
        "recipe_passes": 2,
    }
    parameters |= {
        "leak_images": 60,
        "leak_epochs": 2,
        "boxed_images": 12,
        "phantom_images": 80,
        "transfer_topology": "vgg16",
        "pretrain_images": 80,
        "pretrain_passes": 2,
        "transfer_passes": 1,
    }
    return execute(parameters=parameters, runs_dir=str(tmp_path_factory.mktemp("runs")))


@pytest.mark.long
@pytest.mark.cores
@pytest.mark.parametrize("kind", ["student", "solved"])
def test_both_copies_of_every_notebook_run_to_their_end(course, kind, whole_run, tmp_path):
    settings = json.loads((whole_run[1].parent / "run.json").read_text())["settings"]
    for path in sorted((course / kind).glob("*.ipynb")):
        given = {
            name: settings[name] for name in papermill.inspect_notebook(path) if name in settings
        }
        given["run_dir"] = str(tmp_path / path.stem)
        notebook = parameterize_notebook(nbformat.read(path, as_version=4), given)
        NotebookClient(notebook, kernel_name="python3").execute()
        checks = tagged(notebook, "check")
        told = [o.evalue for c in checks for o in c.outputs if o.output_type == "error"]
        assert len(told) == (len(checks) if kind == "student" else 0) and all(told), path


@pytest.mark.cores
def test_every_notebook_runs_headless(whole_run):
    failed, report = whole_run
    assert failed == []
    for path in NOTEBOOKS:
        folder = report.parent / path.stem
        for name in (
            "notebook.ipynb",
            "notebook.html",
            "params.json",
            "metrics.json",
            "environment.json",
        ):
            assert (folder / name).exists(), f"{path.stem}/{name}"


@pytest.mark.cores
def test_the_training_notebooks_leave_what_the_contract_names(whole_run):
    folder = whole_run[1].parent
    for name, ranks in (("03_train_baseline", 1), ("04_train_distributed", 2)):
        for file in ("model.keras", "history.parquet", "predictions.parquet", "figures/auroc.png"):
            assert (folder / name / file).exists(), f"{name}/{file}"
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert metrics["ranks"] == ranks and len(metrics["auroc"]) == 15
    assert set(metrics["resumed"]) == {f"last epoch on {n} rank{'s'[: n > 1]}" for n in RESUMED}
    assert metrics["weights_equal"] is True and metrics["each_image_once"] is True


@pytest.mark.cores
def test_the_allreduce_that_the_reader_writes_is_that_of_the_training(whole_run):
    """The sum of two ranks has one order, so both give the same bits."""
    notebook = whole_run[1].parent / "04_train_distributed"
    metrics = json.loads((notebook / "metrics.json").read_text())
    assert metrics["ring_differs"] == 0 and len(metrics["speeds"]) == 2
    cells = nbformat.read(notebook / "notebook.ipynb", as_version=4).cells
    on_engines = [cell for cell in cells if cell.source.startswith("%%px")]
    assert len(on_engines) >= 6 and all(cell.outputs for cell in on_engines[:-1])


@pytest.mark.cores
def test_the_launch_script_finds_its_settings_from_the_projects_folder(whole_run):
    folder = whole_run[1].parent / "08_scale_out"
    (config,) = re.findall(r"--config (\S+)", (folder / "train.sbatch").read_text())
    assert (ROOT / config).samefile(folder / "train.json")
    assert TrainConfig(**json.loads((ROOT / config).read_text())).topology == "densenet121"


@pytest.mark.cores
def test_a_plan_has_no_more_nodes_than_the_noise_scale_lets_be_of_use(whole_run):
    """Two ranks per node take 32 images each: 7 nodes have 448 images, 8 have 512."""
    script = (whole_run[1].parent / "08_scale_out" / "train.sbatch").read_text()
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", script, re.M)
    assert 1 <= int(nodes) <= 7


@pytest.mark.cores
def test_the_layout_that_is_called_best_is_the_one_measured_here_and_not_the_plans(whole_run):
    folder = whole_run[1].parent / "08_scale_out"
    layouts = json.loads((folder / "metrics.json").read_text())["layouts"]
    ranks, threads = ast.literal_eval(max(layouts, key=layouts.get))
    assert f"{ranks} ranks x {threads} threads are best" in (folder / "notebook.ipynb").read_text()


@pytest.mark.cores
def test_every_auroc_that_is_printed_has_the_name_and_hash_of_its_split(whole_run):
    """Figures say it in their caption, and texts and tables with an AUROC in themselves."""
    for path in whole_run[1].parent.glob("*/notebook.ipynb"):
        for figure in (path.parent / "figures").glob("*.png"):
            with Image.open(figure) as image:
                caption = image.info["Description"]
            assert "AUROC" not in caption or re.search(r"split [0-9a-f]{12}", caption), (
                f"{figure}: {caption}"
            )
        for cell in nbformat.read(path, as_version=4).cells:
            said = [
                o.get("text", "") or o.get("data", {}).get("text/markdown", "")
                for o in cell.get("outputs", [])
            ]
            text = "\n".join(
                said
            )  # a training's first line names the split, those of its epochs come one by one
            if re.search(r"AUROC[^.\n]*\d\.\d{3}", text):
                assert re.search(r"split [0-9a-f]{12}", text), f"{path.parent.name}: {text}"


@pytest.mark.cores
def test_the_judgement_is_carried_as_plain_values(whole_run):
    found = json.loads(
        (whole_run[1].parent / "09_evaluate_and_explain" / "metrics.json").read_text()
    )
    assert found["models"] == ["03_train_baseline", "04_train_distributed"]
    assert len(found["difference"]) == 15
    trainings = found["leakage"]["trainings"]
    assert {row["data"] for row in trainings} == {"this data", "control, 0.9 repeat"}
    assert all(len(row["split"]) == 12 for row in trainings)
    assert Calibration.from_dict(found["calibration"]["temperature"]).method == "temperature"
    assert OperatingPoints.from_dict(found["operating_points"]).sensitivity == 0.9
    assert set(found["pointing"]) == {"LayerCAM", "Grad-CAM", "LayerCAM, never trained"}


@pytest.mark.cores
def test_what_the_reader_of_09_writes_is_what_the_library_does(whole_run):
    """A bootstrap with Student's t, Holm's correction and Grad-CAM, held against it in the cells."""
    notebook = whole_run[1].parent / "09_evaluate_and_explain" / "notebook.ipynb"
    outputs = [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", [])]
    said = [line for o in outputs for line in o.get("text", "").splitlines()]
    assert said.count("as the library's: True") == 2 and "as the library's: False" not in said


@pytest.mark.cores
def test_what_pretraining_is_worth_stands_beside_ridge_and_chance(whole_run):
    folder = whole_run[1].parent / "07_transfer_learning"
    found = json.loads((folder / "metrics.json").read_text())
    assert set(found["results"]) == {"pre-trained", "random weights", "ridge regression", "chance"}
    assert list(found["pretraining"]) == ["1", "2"] and found["stages"]["tune"]["of"] == 2
    assert set(found["answers"]) <= {"earlier", "rate", "warm-up"}


@pytest.mark.cores
def test_the_ledger_reads_what_the_notebooks_of_a_run_saved(whole_run):
    folder = whole_run[1].parent
    rows = json.loads((folder / "10_report" / "metrics.json").read_text())["ledger"]
    measured = [
        row for row in rows.values() if row["ours"] is not None and row["origin"] == "this run"
    ]
    assert len(rows) == len(claims()) and len(measured) >= 25
    assert not [row["why"] for row in rows.values() if "lacks" in row["why"]]
    assert rows["scale/caffe-256/speed"]["origin"] == "this run"  # 11 comes before the report
    assert rows["batch norm/densenet121"]["verdict"] == "checked"


@pytest.mark.cores
def test_the_report_shows_every_notebook_and_needs_no_network(whole_run):
    page = whole_run[1].read_text()
    for path in NOTEBOOKS:
        assert f'href="{path.stem}/notebook.html"' in page
    assert "Not for clinical use" in page and "Pleural Thickening" in page
    for html in whole_run[1].parent.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", html.read_text()), (
            html.name
        )
    assert Path(whole_run[1]).name == "index.html"
