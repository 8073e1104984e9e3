"""docs/faults.md names tests that exist, in every row, or says that the row is not kept yet."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"


def rows(text: str) -> list[str]:
    """Return the last cell of each row of the table."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.rstrip("| ").rpartition("|")[2].strip() for line in table[1:]]


def faults(cells: list[str]) -> list[str]:
    """Return what is wrong with the last cells of a table's rows."""
    wrong = []
    for cell in cells:
        named = re.findall(r"`(tests/[^`]+)::(test_\w+)`", cell)
        if cell.count("`tests/") != len(named):
            wrong.append(f"not path::name: {cell}")
        if not named and cell != "not yet":
            wrong.append(f"neither a test nor 'not yet': {cell!r}")
        wrong += [f"no {path}::{name}" for path, name in named if name not in names_in(path)]
    return wrong


def names_in(path: str) -> set[str]:
    """Return the names of a file's tests; none if there is no such file."""
    place = ROOT / path
    if not place.is_file():
        return set()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(place.read_text()).body if isinstance(node, kinds)}


def test_every_row_of_the_contract_names_tests_that_exist_or_says_not_yet() -> None:
    cells = rows(PAGE.read_text())
    assert len(cells) > 30
    assert not faults(cells)


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "soon",
        "`tests/faults/test_table.py::test_that_nobody_wrote`",
        "`tests/nowhere.py::test_the_table`",
        "`tests/faults/test_table.py`",
    ],
)
def test_a_row_without_a_test_is_found(cell: str) -> None:
    assert faults([cell])
