"""Notebooks run headless into one folder: a failing one is told and the others go on; the page
needs no network.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import chexlib.app.execute
from chexlib.app.execute import QUICK_SECONDS, execute, find_notebooks
from chexlib.app.report import build_report
from chexlib.app.runs import latest_run
from chexlib.errors import ConfigError, DataError
from chexlib.files import ROOT, write_json
from chexlib.findings import FINDINGS

PARAMETERS = """\
seed: int = 0  # random seed
run_dir: str = ""  # where results go
rate: float = 0.5  # a rate
mirror: bool = True  # flip
name: str = "x"  # a name
"""
CAPTION = 'Loss "falls" <script>alert(1)</script> – 95 %'
GOOD = [
    f"caption, given = {CAPTION!r}, dict(seed=seed, rate=rate, mirror=mirror, name=name)",
    "from chexlib.app import runs\nrun = runs.start('00_good', run_dir=run_dir, parameters=given)",
    "from matplotlib.figure import Figure\nfigure = Figure()\n_ = figure.subplots().plot([1, 2])\n"
    "run.save_figure(figure, 'curve', caption=caption)\nrun.finish(answer=42)\nprint('the last "
    "cell')",
]
LISTEN = f"""import json, sys
sys.path.append({str(Path(__file__).parents[1])!r})
from eavesdropper import mechanism
from ipykernel.connect import get_connection_info
print("others need", mechanism(json.loads(get_connection_info())["iopub_port"]))"""
GIVEN = {"seed": "7", "rate": "1e-3", "mirror": "false", "name": "007"}
REMOTE = re.compile(
    r"""<(?:script|link|iframe|img)\b[^>]*\b(?:src|href)\s*=\s*["']?(?:https?:)?//[^>]*>|import\s*\(\s*["']http"""
)


def notebook(path, cells, title="Good"):
    first = [new_markdown_cell(f"# {title}\n\nAbout $x^2$.")]
    parameters = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    book = new_notebook(cells=[*first, *parameters, *map(new_code_cell, cells)])
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    book.metadata["language_info"] = {"name": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def project(root):
    notebook(root / "notebooks" / "00_good.ipynb", GOOD)
    notebook(
        root / "notebooks" / "01_bad.ipynb",
        ["raise ValueError('the reason <b>')", "print('never')"],
        "Bad",
    )
    notebook(root / "notebooks" / "02_last.ipynb", ["print('reached')", LISTEN], "Last")
    (root / "notebooks" / "profiles").mkdir()
    (root / "notebooks" / "profiles" / "quick.yaml").write_text(
        "seed: 1\nrate: 0.25\nof_no_notebook: 3\n"
    )
    return root


@pytest.fixture
def quiet():
    """The log that `execute` sets, put back."""
    logger = logging.getLogger("chexlib")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Three notebooks, the second of which fails, run with parameters as `-p` gives them."""
    root = project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chexlib.app.execute, "ROOT", root)
        logger = logging.getLogger("chexlib")
        before = logger.handlers[:], logger.level, logger.propagate
        environment = dict(os.environ)
        failed, report = execute(parameters=GIVEN, runs_dir=str(root / "runs"), reference=True)
        assert (
            dict(os.environ) == environment
        )  # else what runs later in this process would be headless too
        logger.handlers[:], logger.level, logger.propagate = before
    return SimpleNamespace(
        root=root, failed=failed, report=report, run=report.parent, page=report.read_text()
    )


def outputs(path):
    return "".join(
        o.get("text", "") for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])
    )


def test_a_reference_keeps_what_was_found_and_how_and_only_of_what_ended_well(executed):
    (file,) = (executed.root / "data" / "reference").iterdir()
    kept = json.loads(file.read_text())
    assert file.name == "00_good.json" and kept["profile"] == "quick"
    assert kept["metrics"]["answer"] == 42 and kept["params"]["rate"] == 1e-3
    assert "commit" in kept["environment"] and str(executed.root) not in file.read_text()


def test_a_failing_notebook_is_told_and_the_others_are_executed(executed):
    assert executed.failed == ["01_bad"]
    assert "the last cell" in outputs(executed.run / "00_good" / "notebook.ipynb")
    assert "reached" in outputs(executed.run / "02_last" / "notebook.ipynb")
    assert "never" not in outputs(executed.run / "01_bad" / "notebook.ipynb")


def test_what_cells_print_cannot_be_heard_by_others_of_the_machine(executed):
    assert "others need CURVE" in outputs(executed.run / "02_last" / "notebook.ipynb")


def test_progress_tells_how_many_are_done_how_long_it_took_and_how_long_it_will(
    tmp_path, monkeypatch, quiet, capsys
):
    """From what the newest run of the same profile took, at this run's pace."""
    root = project(tmp_path)
    monkeypatch.setattr(chexlib.app.execute, "ROOT", root)
    monkeypatch.setattr(chexlib.app.execute, "TOGETHER", ())
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(chexlib.app.execute.time, "monotonic", lambda: clock.now)
    seen = []

    def take_20_seconds(path, output, **_):
        clock.now += 20
        report = Path(output).parents[1] / "index.html"
        seen.append(report.read_text() if report.exists() else "")
        shutil.copy(path, output)
        write_json(Path(output).parent / "metrics.json", {"seconds": 10.0})
        write_json(Path(output).parent / "params.json", {})

    monkeypatch.setattr("papermill.execute_notebook", take_20_seconds)
    for _ in range(2):
        execute(runs_dir=str(root / "runs"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" ...")]
    assert told[3:] == [
        "00_good (1 of 3; 0 s so far, about 30 s to go) ...",
        "01_bad (2 of 3; 20 s so far, about 20 s to go) ...",
        "02_last (3 of 3; 40 s so far, about 20 s to go) ...",
    ]
    assert [text.count("of 3 notebooks were done") for text in seen] == [0, 1, 1] * 2
    assert "2 of 3 notebooks were done" in seen[-1] and "Still to come: 02_last." in seen[-1]


def test_notebooks_that_measure_no_speed_run_two_at_a_time_with_half_of_the_cores_each(
    rehearsed, monkeypatch
):
    for name in ("03_alone", "05_one", "06_two"):
        notebook(rehearsed.root / "notebooks" / f"{name}.ipynb", [])
    monkeypatch.setattr(chexlib.app.execute, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    both, seen = threading.Barrier(2, timeout=20), {}

    def take(path, output, **_):
        seen[path.stem] = (
            threading.current_thread() is threading.main_thread(),
            os.environ.get("OMP_NUM_THREADS"),
        )
        if path.stem[:2] in ("05", "06"):
            both.wait()
        output.write_text(path.read_text())

    monkeypatch.setattr("papermill.execute_notebook", take)
    assert execute(["03", "05", "06"], runs_dir=rehearsed.runs)[0] == []
    assert seen == {"03_alone": (True, None), "05_one": (False, "3"), "06_two": (False, "3")}
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own choice
    execute(["05", "06"], runs_dir=rehearsed.runs)
    assert seen["05_one"] == seen["06_two"] == (False, "1")


def test_every_notebook_has_its_folder_in_the_newest_run(executed):
    assert latest_run(executed.root / "runs") is None  # a notebook of it failed
    made = {path.name for path in executed.run.iterdir()}
    assert made == {"00_good", "01_bad", "02_last", "index.html", "run.json", "kernel.log"}
    good = {path.name for path in (executed.run / "00_good").iterdir()}
    needed = {
        "notebook.ipynb",
        "notebook.html",
        "params.json",
        "metrics.json",
        "environment.json",
        "figures",
    }
    assert needed <= good
    assert json.loads((executed.run / "00_good" / "metrics.json").read_text())["answer"] == 42


def test_the_page_links_every_notebook_and_says_how_it_ended(executed):
    rows = {
        name: executed.page.split(f'href="{name}/notebook.html"')[1].split("</tr>")[0]
        for name in ("00_good", "01_bad", "02_last")
    }
    assert "failed" in rows["01_bad"]
    assert "ValueError: the reason &lt;b&gt;" in rows["01_bad"]
    assert "done" in rows["00_good"]
    assert "done" in rows["02_last"]
    assert "failed" not in rows["00_good"] + rows["02_last"]
    assert "the reason" in (executed.run / "01_bad" / "notebook.html").read_text()
    assert "Not for clinical use" in executed.page


def test_links_of_the_page_lead_to_files(executed):
    for link in re.findall(r'href="([^"#]+)"', executed.page):
        assert (executed.run / link).exists(), link


def test_figures_are_in_the_page_with_caption_and_alternative_text(executed):
    (figure,) = re.findall(r"<figure>.*?</figure>", executed.page, re.S)
    escaped = "Loss &#34;falls&#34; &lt;script&gt;alert(1)&lt;/script&gt; – 95 %"
    assert f'alt="{escaped}"' in figure
    assert f"<figcaption>{escaped}</figcaption>" in figure
    assert 'src="data:image/png;base64,iVBOR' in figure
    assert re.search(r'width="\d{3,}" height="\d{3,}"', figure)
    assert "alert(1)</script>" not in executed.page


def test_pages_load_nothing_from_the_network(executed):
    for path in (executed.report, *executed.run.glob("*/notebook.html")):
        text = path.read_text()
        assert REMOTE.findall(text) == [], path
        # Also not from code: no address of a script or stylesheet anywhere.
        assert re.findall(r"https?://[^\s\"'<>)]+\.(?:m?js|css)\b", text) == [], path


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("rate", 0.001), ("mirror", False), ("name", "007")]
)
def test_parameters_of_the_command_line_get_the_type_of_the_notebook(executed, name, value):
    found = json.loads((executed.run / "00_good" / "params.json").read_text())[name]
    assert found == value
    assert type(found) is type(value)


# --- without kernels


@pytest.fixture
def rehearsed(tmp_path, monkeypatch, quiet):
    """A project in which notebooks are not executed: what papermill was asked is noted."""
    root, asked = project(tmp_path), {}
    monkeypatch.setattr(chexlib.app.execute, "ROOT", root)

    def note(path, output, parameters, **settings):
        asked[path.stem] = parameters
        output.write_text(path.read_text())

    monkeypatch.setattr("papermill.execute_notebook", note)
    return SimpleNamespace(root=root, asked=asked, runs=str(root / "runs"))


def test_latest_moves_to_a_run_without_a_failed_notebook_only(rehearsed, monkeypatch, capsys):
    execute(["00"], runs_dir=rehearsed.runs)
    good = latest_run(rehearsed.runs)
    assert good is not None
    monkeypatch.setattr(chexlib.app.execute, "_execute_one", lambda *_: False)
    assert execute(["00"], runs_dir=rehearsed.runs)[0] == ["00_good"]
    assert latest_run(rehearsed.runs) == good
    told = capsys.readouterr().out
    assert "not point to this run" in told and "--resume" in told


def test_a_notebook_gets_this_environments_kernel_and_needs_no_home(
    rehearsed, tmp_path, monkeypatch
):
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.paths import jupyter_runtime_dir

    site = tmp_path / "site" / "kernels" / "python3"
    site.mkdir(parents=True)
    kernel = {"argv": ["/site/python"], "display_name": "Site", "language": "python"}
    (site / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "site"))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    seen = {}

    def note(path, output, **_):
        seen["kernel"] = KernelSpecManager().get_kernel_spec("python3").argv[0]
        seen["writable"] = [
            os.access(folder, os.W_OK)
            for folder in (jupyter_runtime_dir(), os.environ["IPYTHONDIR"])
        ]
        seen["home"] = os.environ["IPYTHONDIR"]
        output.write_text(path.read_text())

    monkeypatch.setattr("papermill.execute_notebook", note)
    execute(["00"], runs_dir=rehearsed.runs)
    assert seen["kernel"] != "/site/python" and seen["writable"] == [True, True]
    assert not os.path.exists(seen["home"])  # nothing is left
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "site")


def test_references_that_cannot_be_kept_are_told_before_anything_is_made(rehearsed):
    (rehearsed.root / "data").write_text("a file")
    with pytest.raises(DataError, match=r"reference cannot be written .* without --reference"):
        execute(["00"], runs_dir=rehearsed.runs, reference=True)
    assert not os.path.exists(rehearsed.runs)


def test_the_profile_sets_what_a_notebook_has_and_the_command_line_overrides_it(rehearsed):
    execute(["00"], parameters={"rate": "2"}, runs_dir=rehearsed.runs)
    folder = rehearsed.asked["00_good"].pop("run_dir")
    assert folder.endswith("/00_good")
    assert rehearsed.asked == {"00_good": {"seed": 1, "rate": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3.0), ("0.5", 0.5), ("1e-3", 0.001), ("1E5", 1e5), ("2.5e-4", 0.00025), (".5", 0.5)],
)
def test_numbers_in_any_notation_are_numbers(rehearsed, text, value):
    execute(["00"], parameters={"rate": text}, runs_dir=rehearsed.runs)
    assert rehearsed.asked["00_good"]["rate"] == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)]
)
def test_truth_values_are_truth_values(rehearsed, text, value):
    execute(["00"], parameters={"mirror": text}, runs_dir=rehearsed.runs)
    assert rehearsed.asked["00_good"]["mirror"] is value


@pytest.mark.parametrize("text", ["", "3", "true", "null", "a: b", "[x", "01"])
def test_text_stays_as_it_was_typed(rehearsed, text):
    execute(["00"], parameters={"name": text}, runs_dir=rehearsed.runs)
    assert rehearsed.asked["00_good"]["name"] == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "two"),
        ("seed", "1.5"),
        ("seed", ""),
        ("rate", "fast"),
        ("rate", "[1"),
        ("mirror", "maybe"),
        ("mirror", "2"),
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("rate", "nan"),
        ("seed", None),
        ("seed", 50.0),
        ("seed", True),
        ("mirror", 0),
        ("rate", [0.5]),
        ("name", 7),
    ],
)
def test_a_value_of_another_type_is_refused_before_anything_is_made(rehearsed, name, text):
    told = rf"^{name}='?{re.escape(str(text))}'? is not accepted. Use "
    with pytest.raises(ConfigError, match=told):
        execute(["00"], parameters={name: text}, runs_dir=rehearsed.runs)
    (rehearsed.root / "notebooks" / "profiles" / "own.yaml").write_text(yaml.dump({name: text}))
    with pytest.raises(ConfigError, match=told):
        execute(["00"], profile="own", runs_dir=rehearsed.runs)
    assert not (rehearsed.root / "runs").exists()


@pytest.mark.parametrize(
    ("value", "right"), [("false", str), (None, None), (50.0, float), ([50], None)]
)
def test_a_notebook_refuses_what_papermill_gives_it_of_another_type(value, right):
    for path in find_notebooks():
        parameters, *cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        setup = next(c.source for c in cells if "check_parameters" in c.source)
        own, call = {}, "runs.check_parameters(globals())\n"
        # It comes before any use of the parameters, which stand in the cell above it.
        assert re.match(rf"(\w+ = .*\n|\n)*figures.set_theme\(\)\n{re.escape(call)}", setup), path
        exec(f"{parameters.source}\nfrom chexlib.app import runs\n{call}", own)
        for name, kind in own["__annotations__"].items():
            if kind is not right:
                with pytest.raises(ConfigError, match=rf"^{name}=.* is not accepted. Use .+\.$"):
                    exec(call, {**own, name: value})


def test_a_dead_kernel_fails_its_notebook_alone(rehearsed, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    def die(path, output, parameters, **settings):
        output.write_text(path.read_text())
        if path.stem == "00_good":
            raise DeadKernelError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", die)
    failed, report = execute(["00", "02"], runs_dir=rehearsed.runs)
    assert failed == ["00_good"]
    page = report.read_text()
    assert "02_last/notebook.html" in page
    assert "Kernel died" in page


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), ["00_good", "01_bad", "02_last"]),
        (("02",), ["02_last"]),
        (("00_good", "notebooks/02_last.ipynb"), ["00_good", "02_last"]),
        (("00", "00_good"), ["00_good"]),
    ],
)
def test_notebooks_are_found_by_number_name_and_file_each_once(rehearsed, names, found):
    assert [path.stem for path in find_notebooks(names)] == found


def test_the_report_comes_last_and_the_time_of_every_notebook_is_known():
    numbers = [path.stem[:2] for path in find_notebooks()]
    assert numbers[-1] == "10" and {int(n) for n in numbers} == set(QUICK_SECONDS)


def test_an_unknown_parameter_is_refused_before_anything_is_made(rehearsed):
    with pytest.raises(ConfigError, match=r"'sead'.*'seed'"):
        execute(parameters={"sead": "3"}, runs_dir=rehearsed.runs)
    assert not (rehearsed.root / "runs").exists()


# --- the report of a judged run


def executed_notebook(folder, *, metrics=None, widgets=False, title="Baseline"):
    folder.mkdir(parents=True)
    book = new_notebook(cells=[new_markdown_cell(f"# {title}"), new_code_cell("1", outputs=[])])
    if widgets:
        state = {"state": {}, "version_major": 2, "version_minor": 0}
        book.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
        view = {
            "application/vnd.jupyter.widget-view+json": {"model_id": "a"},
            "text/plain": "a bar",
        }
        book.cells[1].outputs.append(new_output("display_data", view))
    nbformat.write(book, folder / "notebook.ipynb")
    if metrics:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "params.json", {"seed": 5})


def test_the_page_shows_auroc_with_interval_and_positives_and_undefined_findings(tmp_path):
    row = {"auroc": 0.8125, "low": 0.75, "high": 0.9, "positives": 37, "negatives": 100}
    table = {name: dict(row) for name in (*FINDINGS, "mean")}
    table["Hernia"] = {
        "auroc": float("nan"),
        "low": float("nan"),
        "high": float("nan"),
        "positives": 0,
        "negatives": 137,
    }
    images = {"train": 70, "validation": 10, "test": 20}
    split = {"name": "patient", "digest": "abc123", "images": images}
    metrics = {"auroc": table, "split": split, "data": "nih-64", "ranks": 2}
    executed_notebook(tmp_path / "run" / "03_train_baseline", metrics=metrics)
    text = build_report(tmp_path / "run").read_text()
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text, re.S)
    assert [name for name, _ in rows] == [*(f.replace("_", " ") for f in FINDINGS), "mean"]
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", rest, re.S) for name, rest in rows}
    assert cells["Mass"] == ["0.812 (0.750 to 0.900)", "37"]
    assert cells["Hernia"] == ["undefined", "0"]
    for word in ("nih-64", "patient", "abc123", "70 / 10 / 20", "seed 5", "2 ranks"):
        assert word in text


def test_a_notebook_with_widgets_loads_nothing_from_the_network(tmp_path):
    executed_notebook(tmp_path / "run" / "04_train", widgets=True)
    build_report(tmp_path / "run")
    text = (tmp_path / "run" / "04_train" / "notebook.html").read_text()
    assert REMOTE.findall(text) == []
    assert "unpkg.com" not in text


# --- the profiles of the project


def parameters_of_project():
    import papermill

    return {
        path.stem: papermill.inspect_notebook(path)
        for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    }


@pytest.fixture(scope="module")
def accepted():
    return parameters_of_project()


def profile(name):
    return yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{name}.yaml").read_text())


def test_the_three_profiles_are_there():
    assert {path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml")} == {
        "quick",
        "standard",
        "cluster",
    }


@pytest.mark.parametrize("name", ["quick", "standard", "cluster"])
def test_every_setting_of_a_profile_is_a_parameter_of_its_type(accepted, name):
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}
    for key, value in profile(name).items():
        own = [parameters[key] for parameters in accepted.values() if key in parameters]
        assert own, f"{key} of {name} is in no notebook"
        for parameter in own:
            assert isinstance(value, kinds[parameter["inferred_type_name"]]), f"{key}: {value!r}"


@pytest.mark.parametrize("name", ["quick", "standard", "cluster"])
def test_a_profile_names_every_parameter_but_those_of_the_reader(accepted, name):
    """Which data and which folder are the reader's to say, by DATA and by where the run goes."""
    every = {parameter for parameters in accepted.values() for parameter in parameters}
    assert every - {"data_dir", "run_dir"} == set(profile(name))


def test_the_defaults_are_the_quick_profile(accepted):
    quick = profile("quick")
    for stem, parameters in accepted.items():
        for name, parameter in parameters.items():
            if name in quick:
                assert yaml.safe_load(parameter["default"]) == quick[name], f"{stem}: {name}"


def test_every_notebook_has_seed_data_and_run_folder_and_a_help_on_each_parameter(accepted):
    for stem, parameters in accepted.items():
        assert {"seed", "data_dir", "run_dir"} <= set(parameters), stem
        for name, parameter in parameters.items():
            assert parameter["inferred_type_name"] in ("int", "float", "str", "bool"), (
                f"{stem}: {name}"
            )
            assert parameter["help"], f"{stem}: {name}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_run_ends_when_told_by_force_if_need_be_and_then_says_where_it_was(number, stubborn):
    script = (
        "import subprocess, sys, time\n"
        "from chexlib.app import execute\n"
        "execute.PATIENCE = 1\n"
        "execute.end_when_told()\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "def wait_for_ever():\n"
        "    while True:\n"
        "        time.sleep(0.1)\n"
        "try:\n"
        "    print(child.pid, flush=True)\n"
        "    wait_for_ever()\n"
        "except KeyboardInterrupt:\n"
        "    if sys.argv[1] == 'True':\n"
        "        wait_for_ever()\n"
        "    child.kill()\n"
        "    sys.exit(7)\n"
    )
    command = [sys.executable, "-c", script, str(stubborn)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == (130 if stubborn else 7)
        assert ("wait_for_ever" in process.stderr.read()) == stubborn
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
