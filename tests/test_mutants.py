"""Mutants are one change each, drawn from a seed, and the tests of a module notice them."""

import ast

import pytest
from mutants import ROOT, changed_by, changes_of, draw

TEXT = """
def f(x):
    \"\"\"Of 1.\"\"\"
    if x < 2 and x:
        x += 3
    log(x)
    return [x * 4, True]
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("comparison", {"if x <= 2 and x:"}),
        ("operator", {"if x < 2 or x:", "return [x / 4, True]"}),
        ("condition", {"if not (x < 2 and x):"}),
        (
            "constant",
            {"if x < 3 and x:", "x += 4", "return [x * 5, True]", "return [x * 4, False]"},
        ),
        ("statement", {"pass"}),
    ],
)
def test_a_mutant_is_the_function_with_one_change(kind, said):
    function = ast.parse(TEXT).body[0]
    before = ast.unparse(function).splitlines()
    made = [
        ast.unparse(changed_by(function, c)).splitlines()
        for c in changes_of(function)
        if c.startswith(kind)
    ]
    assert all(len(after) == len(before) for after in made)
    changed = [
        [new.strip() for new, old in zip(after, before, strict=True) if new != old]
        for after in made
    ]
    assert all(len(lines) == 1 for lines in changed) and {lines[0] for lines in changed} == said
    assert ast.unparse(function).splitlines() == before


def test_a_seed_draws_the_same_from_each_room_again():
    first = draw(10, 0, [ROOT])
    assert first == draw(10, 0, [ROOT]) != draw(10, 1, [ROOT])
    rooms = [file.split("/")[1] for file, _, _ in first]
    assert sorted(rooms.count(room) for room in set(rooms)) == [2, 2, 3, 3]
