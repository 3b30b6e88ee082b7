"""Imports between the rooms of chexlib point one way, and no room is crowded."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from chexlib.files import ROOT

# Each room imports from those before it.
ROOMS = [
    "chexlib",
    "phantom",
    "data",
    "models",
    "training",
    "evaluation",
    "cluster",
    "studies",
    "scaling",
    "ledger",
]
ROOMS += ["figures", "app"]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "chexlib").rglob("*.py")
}


def room_of(module: str) -> str:
    return FILES[module].parent.name


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chexlib":
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in FILES else node.module for whole in wholes}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found


IMPORTS = {module: imported_by(path) - {module} for module, path in FILES.items()}


def test_a_module_imports_from_its_own_room_and_from_those_before_it():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_no_room_has_more_than_ten_files():
    crowds = Counter(
        room_of(module) for module, path in FILES.items() if path.name != "__init__.py"
    )
    assert {room: files for room, files in crowds.items() if files > 10} == {}


WALKS = ("A radiograph, from PNG to AUROC", "A gradient, from `train_step` to the updated weight")


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_of_the_map_names_files_once_and_enters_no_room_twice(title):
    text = (ROOT / "chexlib" / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)
    assert len(files) >= 5 and len(set(files)) == len(files)
    assert all((ROOT / "chexlib" / file).is_file() for file in files)
    rooms = [file.rpartition("/")[0] for file in files]
    entered = [room for room, before in zip(rooms, [None, *rooms], strict=False) if room != before]
    assert len(set(entered)) == len(entered)
