"""What `make check` runs: tests/touched.py."""

import subprocess

from touched import MOST, ROOT, changed, touched

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_a_clone_of_a_branch_compares_with_the_main_of_its_origin(tmp_path, monkeypatch):
    def git(*words, folder):
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git("init", "-q", "-b", "main", folder=origin)
    (origin / "old.py").touch()
    git("add", ".", folder=origin)
    git("commit", "-qm", "x", folder=origin)
    git("branch", "work", folder=origin)
    git("clone", "-q", "--branch", "work", str(origin), str(clone), folder=tmp_path)
    (clone / "new.py").touch()
    monkeypatch.setattr("touched.ROOT", clone)
    assert changed() == [clone / "new.py"]


def names(*files):
    found, left = touched([ROOT / file for file in files], TESTS)
    return {path.name for path in found}, left


def test_a_changed_test_file_is_its_own_and_no_other():
    assert names("tests/scaling/test_plan.py") == ({"test_plan.py"}, [])


def test_a_changed_module_has_the_tests_that_import_it_or_whose_helpers_do():
    found, left = names("benchmarks/lab/emulated.py")
    assert "test_hosts.py" in found and "test_phantom.py" not in found and not left
    assert names("chexlib/models/convert.py")[0] >= {"test_convert.py"}


def test_what_has_no_test_file_and_what_has_too_many_is_told_apart():
    assert names("README.md") == (set(), [])
    assert names("chexlib/errors.py") == (set(), ["chexlib.errors"])
    assert all(
        len(names(f"chexlib/{file}")[0]) <= MOST
        for file in ("errors.py", "training/fit.py", "models/predict.py")
    )
