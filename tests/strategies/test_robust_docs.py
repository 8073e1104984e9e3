"""docs/robust.md has a line for each reducer, with its settings and what it needs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedml.strategies import REDUCERS, Reducer

PAGE = (Path(__file__).parents[2] / "docs" / "robust.md").read_text()
LINES = {
    cells[0].strip("` ").replace("_", "-"): [cell.strip() for cell in cells]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    and "=`" not in line
    and len(cells := line.strip("| ").split(" |")) >= 5
}


def test_every_reducer_has_a_line_and_no_other() -> None:
    assert set(LINES) == set(REDUCERS)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_line_tells_settings_with_their_defaults(name: str) -> None:
    told = dict(
        re.findall(r"`(\w+)` (\[\]|[^,|]+)", LINES[name][5] if len(LINES[name]) > 5 else "")
    )
    fields = dataclasses.fields(REDUCERS[name])  # type: ignore[arg-type]
    kind = REDUCERS[name]()
    assert told == {
        field.name: str(value if value != () else [])
        for field in fields
        for value in [getattr(kind, field.name)]
    }


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_a_line_tells_the_fewest_updates(name: str, f: int) -> None:
    reducer: Reducer = REDUCERS[name](**({"f": f} if hasattr(REDUCERS[name](), "f") else {}))
    told = re.fullmatch(r"(?:(\d)f \+ )?(\d)", LINES[name][3])
    assert told, LINES[name][3]
    assert reducer.least == int(told[1] or 0) * f + int(told[2])
