"""The files around the code: git's settings, the release, and recipes of one environment."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
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
