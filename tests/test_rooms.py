"""Imports between the rooms of chexlib point one way, and no room is crowded."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

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
