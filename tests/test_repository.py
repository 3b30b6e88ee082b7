"""The files around the code: git's settings, the release, and recipes of one environment."""

import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FLAGS = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def git(*words, folder):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("name", [".venv", "runs", "benchmarks/.torch", "dist"])
@pytest.mark.parametrize("link", [False, True])
def test_made_folders_are_ignored_and_links_to_them_too(tmp_path, name, link):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / name).parent.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "made").touch()
    if link:
        (project / name).symlink_to(elsewhere)
    else:
        elsewhere.rename(project / name)
    git("init", "-q", folder=project)
    (project / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    assert git("status", "--porcelain", "-uall", folder=project).stdout == "?? .gitignore\n"


def test_a_clone_without_nbstripout_can_add_a_notebook(tmp_path):
    git("init", "-q", folder=tmp_path)
    for name in (".gitattributes", "notebooks/00_start_here.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    added = git("add", ".", folder=tmp_path)
    assert (added.returncode, added.stderr) == (0, "")
    shown = git("show", ":notebooks/00_start_here.ipynb", folder=tmp_path).stdout
    assert shown == (ROOT / "notebooks" / "00_start_here.ipynb").read_text()


def reads_or_writes_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of whatever locale there is."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute) and len(call.args) < (name == "write_text") + 1
    if isinstance(given.get("text"), ast.Constant) or "universal_newlines" in given:
        return True
    if name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
        other = getattr(call.func, "value", None)  # Image.open, tarfile.open, os.open
        if name == "open" and isinstance(other, ast.Name) and other.id != "path":
            return False
        modes = [node.value for node in (*call.args, *given.values()) if is_mode(node)]
        return not any("b" in mode for mode in modes) and (bool(modes) or "Temp" not in name)
    return False


def is_mode(node) -> bool:
    return isinstance(node, ast.Constant) and bool(re.fullmatch("[rwxa][bt+]*", str(node.value)))


@pytest.mark.parametrize("room", ["chexlib", "examples", "benchmarks", "notebooks"])
def test_every_text_that_is_read_or_written_names_its_encoding(room):
    found = []
    for path in [*(ROOT / room).rglob("*.py"), *(ROOT / room).glob("*.ipynb")]:
        texts = [path.read_text("utf-8")]
        if path.suffix == ".ipynb":
            cells = json.loads(texts[0])["cells"]
            texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            texts = [re.sub(r"(?m)^\s*[%!].*$", "pass", text) for text in texts]
        for text in texts:
            for node in ast.walk(compile(text, str(path), "exec", FLAGS)):
                if isinstance(node, ast.Call) and reads_or_writes_text(node):
                    found.append(f"{path.name}: {ast.unparse(node)[:80]}")
    assert found == []


def make(folder, *words, **environment):
    """Run make on our Makefile in a folder whose environment is there, with a Python that echoes."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "uv.lock"):
        (folder / name).touch()
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '<%s>' \"$@\"; echo\n")
    python.chmod(0o755)
    (folder / ".venv" / ".made").touch()
    own = {**os.environ, **environment}
    return subprocess.run(
        ["make", "-s", *words], cwd=folder, env=own, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "target, name, word",
    [("run", "DATA", "--data"), ("real-model", "DATA", "--data"), ("course", "OUT", "course")],
)
@pytest.mark.parametrize("given", ["as a word", "by the environment"])
@pytest.mark.parametrize(
    "data",
    ["O'Brien's films", "a $HOME b", "x'$(touch made)'y", '"`touch made`"', "$(CURDIR)", "é"],
)
def test_make_hands_the_name_of_a_folder_on_as_it_is(tmp_path, target, name, word, given, data):
    words, environment = ([f"{name}={data}"], {}) if given == "as a word" else ([], {name: data})
    answer = make(tmp_path, target, *words, **environment)
    assert f"<{word}><{data}>" in answer.stdout, answer.stderr
    assert not (tmp_path / "made").exists()


def test_make_real_model_without_data_is_refused_before_the_environment_is_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    answer = subprocess.run(["make", "real-model"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode and "Error: name the radiographs" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_one_version_is_released():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert str(citation["version"]) == newest == version


RECIPES = ("Dockerfile", "apptainer.def", ".devcontainer/devcontainer.json", ".ci/run")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_the_environment_by_make_env_and_installs_nothing_else(name):
    text = re.sub(r"^\s*(#|//).*$", "", (ROOT / name).read_text(), flags=re.M)
    assert len(re.findall(r"make env", text)) == 1
    assert not re.search(r"\b(pip|uv|conda)\b", text)


def test_the_container_publishes_nothing_by_itself_and_its_user_is_not_root():
    text = (ROOT / "Dockerfile").read_text()
    assert text.rindex("USER 1000") > text.rindex("FROM ")
    assert "-p 127.0.0.1:8888:8888" in text


def test_the_dev_container_is_json_with_comments():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    assert "image" in json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_files_that_exist_and_may_write_nothing(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 240
        for step in job["steps"]:
            for file in re.findall(r"(?:tests|\.ci)/[\w.]+", step.get("run", "")):
                assert (ROOT / file).exists()


def test_the_newcomers_script_is_clean_shell_and_installs_what_the_readme_names():
    script = ROOT / "tests" / "newcomer.sh"
    assert subprocess.run(["shellcheck", "--severity=style", str(script)]).returncode == 0
    pattern = re.search(r"grep -om1 '([^']+)'", script.read_text())[1]
    named = re.search(pattern, (ROOT / "README.md").read_text())[0].split()[2:]
    assert {"make", "git", "g++", "python3-venv"} <= set(named)


@pytest.mark.parametrize("path", re.findall(r"`((?!\S*NN_)(?:[\w.]+/)+[\w.]*)`", CONTRIBUTING))
def test_files_that_contributors_are_sent_to_exist(path):
    assert (ROOT / path).exists()


def test_names_that_contributors_are_sent_to_exist():
    files = [*(ROOT / "chexlib").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    names = re.findall(r"`([A-Z]{5,}|_[a-z_]+|[A-Z][a-z]+[A-Z]\w+|[a-z]+_\w+)`", CONTRIBUTING)
    assert len(names) > 10
    assert not set(names) - words
