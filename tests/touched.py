"""Prints the test files of what has changed since main: `python tests/touched.py`, for `make
check`.

A changed test file is its own; a changed module of chexlib, benchmarks or examples has the test
files that name it, or whose helpers in tests/ do. Modules that more than `MOST` test files name,
such as chexlib.errors, are left to `make test`.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 12
PACKAGES = ("chexlib", "benchmarks", "examples")


def changed(base: str = "main") -> list[Path]:
    """Files that differ from where this branch left `base`, also those not in git yet."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"Error: git {words[0]} failed: {done.stderr.strip()}. Use `make test`."
            )
        return done.stdout.splitlines()

    if not git("branch", "--list", base) and git("branch", "--remotes", "--list", f"origin/{base}"):
        base = f"origin/{base}"  # a clone of another branch
    (start,) = git("merge-base", base, "HEAD")
    names = [*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")]
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).exists()]


def imports_of(file: Path) -> set[str]:
    """Modules of `PACKAGES` that a file names, and those that the helpers of the tests which it
    imports name.
    """
    text, packages = file.read_text(), "|".join(PACKAGES)
    named = set(re.findall(rf"\b(?:{packages})(?:\.\w+)+", text))
    for package, modules in re.findall(rf"from ((?:{packages})[\w.]*) import (.+)", text):
        named |= {f"{package}.{module.strip()}" for module in modules.split(",")}
    for helper in re.findall(r"(?m)^(?:from|import) (\w+)", text):
        for folder in (file.parent, file.parent.parent):  # tests stand in folders of rooms
            script = folder / f"{helper}.py"
            if script.exists() and not helper.startswith("test_"):
                named |= imports_of(script)
    return named


def touched(files: list[Path], tests: list[Path]) -> tuple[list[Path], list[str]]:
    """Test files for the changed `files`; and the modules that too many of them name."""
    uses = {test: imports_of(test) for test in tests}
    chosen, left = {file for file in files if file in uses}, []
    for file in files:
        if file.suffix != ".py" or file.relative_to(ROOT).parts[0] not in PACKAGES:
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        users = {
            test
            for test, named in uses.items()
            if any(f"{name}.".startswith(f"{module}.") for name in named)
        }
        if len(users) > MOST:
            left.append(module)
        else:
            chosen |= users
    return sorted(chosen), left


if __name__ == "__main__":
    found, too_many = touched(changed(*sys.argv[1:]), sorted((ROOT / "tests").rglob("test_*.py")))
    for module in too_many:
        print(
            f"{module} is named by more than {MOST} test files: run `make test` for it.",
            file=sys.stderr,
        )
    if not found:
        print("No test file names what has changed.", file=sys.stderr)
    print(*(path.relative_to(ROOT) for path in found))
