"""Draws faults to plant in chexlib, and counts how many of them the tests notice.

python tests/mutants.py --count 30 --seed 0 python tests/mutants.py --count 30 --seed 0 --other TREE
# in functions that TREE, an older clone, has too

A mutant is one function with one change: a comparison turned, an operator or a constant replaced, a
condition negated, a statement left out. For each, the test files that name its module are run until
one fails; with --all, what survives meets all others. Works in copies, and prints a JSON line per
mutant. A tree's own .venv runs its tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import touched

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("training", "models", "data", "evaluation")
TURNED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
LINES_AT_MOST = 5  # of a statement that is left out
LEFT = (".venv", "runs", ".git", "phantom", ".torch")  # out of a copy
SECONDS = 900  # that one test file may take: a mutant that hangs is noticed


def functions_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a module by qualified name, without those inside functions."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}": inner
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return found


def changes_of(function: ast.FunctionDef) -> list[str]:
    """Each change that can be made, as `kind position`; positions count the nodes of `ast.walk`."""
    found = []
    for place, node in enumerate(ast.walk(function)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
            found.append(f"comparison {place}")
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in TURNED:
            found.append(f"operator {place}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            found.append(f"constant {place}")
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            found.append(f"condition {place}")
        elif isinstance(node, ast.AugAssign | ast.Expr):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not docstring and node.end_lineno - node.lineno < LINES_AT_MOST:
                found.append(f"statement {place}")
    return found


def changed_by(function: ast.FunctionDef, change: str) -> ast.FunctionDef:
    """A copy of the function with the change made."""
    kind, place = change.split()
    function = copy.deepcopy(function)
    node = list(ast.walk(function))[int(place)]
    if kind == "comparison":
        node.ops[0] = TURNED[type(node.ops[0])]()
    elif kind == "operator":
        node.op = TURNED[type(node.op)]()
    elif kind == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif kind == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        for parent in ast.walk(function):
            for _, inside in ast.iter_fields(parent):
                if isinstance(inside, list) and any(other is node for other in inside):
                    inside[[other is node for other in inside].index(True)] = ast.Pass()
    return ast.fix_missing_locations(function)


def draw(count: int, seed: int, trees: list[Path]) -> list[tuple[str, str, str]]:
    """So many (module file, function, change), the same chance for each change in a room, from what
    all trees have.
    """
    parsed = [
        {
            str(file.relative_to(tree)): functions_of(ast.parse(file.read_text()))
            for room in ROOMS
            for file in sorted((tree / "chexlib" / room).rglob("*.py"))
        }
        for tree in trees
    ]
    first, *others = parsed
    by_room = {room: [] for room in ROOMS}
    for file, functions in first.items():
        for name, function in functions.items():
            same = [other.get(file, {}).get(name) for other in others]
            if all(twin is not None and ast.dump(twin) == ast.dump(function) for twin in same):
                by_room[file.split("/")[1]] += [
                    (file, name, change) for change in changes_of(function)
                ]
    rng = random.Random(seed)
    shares = [count // len(ROOMS) + (i < count % len(ROOMS)) for i in range(len(ROOMS))]
    return [
        mutant
        for room, n in zip(ROOMS, shares, strict=True)
        for mutant in rng.sample(by_room[room], n)
    ]


def planted(file: Path, name: str, change: str) -> str:
    """The module's text with the change; what it was and became is a line of the diff."""
    text = file.read_text()
    function = functions_of(ast.parse(text))[name]
    lines = text.splitlines(keepends=True)
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    indent = " " * function.col_offset
    new = "".join(
        f"{indent}{line}\n" for line in ast.unparse(changed_by(function, change)).splitlines()
    )
    return "".join([*lines[:first], new, *lines[function.end_lineno :]])


def what_changes(function: ast.FunctionDef, change: str) -> str:
    """The lines that differ, before and after."""
    before, after = (ast.unparse(f).splitlines() for f in (function, changed_by(function, change)))
    gone, come = (
        [line.strip() for line in a if line not in b] for a, b in ((before, after), (after, before))
    )
    return f"{' '.join(gone)} -> {' '.join(come)}"


def noticed_by(tree: Path, python: Path, file: str, *, others: bool) -> str | None:
    """The first test file that fails, those that name the module first, then with `others` all;
    None if all pass.
    """
    tests = sorted((tree / "tests").rglob("test_*.py"))
    uses = {test: touched.imports_of(test) for test in tests}
    module = ".".join(Path(file).with_suffix("").parts)
    stem = Path(file).stem
    named = [
        t for t in tests if module in uses[t] or any(n.startswith(f"{module}.") for n in uses[t])
    ]
    named.sort(key=lambda test: stem not in test.name)  # test_pipeline.py for pipeline.py
    for test in [*named, *(t for t in tests if others and t not in named)]:
        command = [
            str(python),
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-cov",
            str(test),
        ]
        env = {**environment_of(python), "PYTHONPATH": str(tree)}
        try:
            done = subprocess.run(command, cwd=tree, env=env, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{test.name} (does not end)"
        if done.returncode not in (0, 5):
            return test.name
    return None


def environment_of(python: Path) -> dict:
    """This environment, with the programs of `python` first."""
    return {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "TF_NUM_INTRAOP_THREADS": "1",
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--count", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--other", type=Path, help="an older clone with a .venv of its own")
    options.add_argument("--only", type=int, nargs="*", help="these numbers alone")
    options.add_argument(
        "--all", action="store_true", help="all tests for what survives those that name its module"
    )
    options.add_argument("--list", action="store_true", help="only show what is drawn")
    asked = options.parse_args()
    trees = [ROOT] + ([asked.other.resolve()] if asked.other else [])
    mutants = draw(asked.count, asked.seed, trees)
    for number, (file, name, change) in enumerate(mutants):
        if asked.only and number not in asked.only:
            continue
        line = {"number": number, "file": file, "function": name, "change": change}
        line["what"] = what_changes(
            functions_of(ast.parse((ROOT / file).read_text()))[name], change
        )
        for tree in [] if asked.list else reversed(trees):
            with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
                place = Path(folder) / "tree"
                shutil.copytree(
                    tree,
                    place,
                    ignore=shutil.ignore_patterns(".venv", "runs", ".git", "phantom", ".torch"),
                )
                (place / file).write_text(planted(place / file, name, change))
                python = tree / ".venv" / "bin" / "python"
                found = noticed_by(place, python, file, others=asked.all)
                line["ours" if tree == ROOT else "other"] = found
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
