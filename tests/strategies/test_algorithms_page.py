"""The page of algorithms has every algorithm, and says of each what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml.rounds.compatibility import objections
from fedml.strategies import (
    RULES,
    STATISTICS,
    STRATEGIES,
    Strategy,
    build,
    describe,
    specimen,
)

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"
COLUMNS = 8


def table() -> dict[str, list[str]]:
    text = PAGE.read_text().partition("<!-- fedml strategies")[0]  # the other has a test of its own
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == COLUMNS for row in rows)
    return {row[0].strip("`"): row for row in rows}


TABLE = table()


def names(cell: str) -> set[str]:
    """What a cell has in code marks."""
    return set(cell.split("`")[1::2])


@pytest.fixture(params=sorted(STRATEGIES.ours))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return build({"name": request.param})


def row(strategy: Strategy) -> list[str]:
    return TABLE[str(describe(strategy)["name"])]


def test_every_algorithm_is_on_the_page_and_nothing_else() -> None:
    assert TABLE.keys() == STRATEGIES.ours.keys()
    assert TABLE.keys() <= STRATEGIES.keys()


def test_its_paper_is_the_one_on_top_of_its_file(strategy: Strategy) -> None:
    module = __import__(type(strategy).__module__, fromlist=["__doc__"])
    cited = row(strategy)[1].rsplit(maxsplit=1)[1]
    assert cited in (module.__doc__ or "").splitlines()[0]


def test_its_settings_have_the_defaults_that_it_says(strategy: Strategy) -> None:
    told = {name: value for name, value in describe(strategy).items() if name != "name"}
    told.pop("reducer")
    assert row(strategy)[7] == ", ".join(f"`{name}={value}`" for name, value in told.items())


def test_its_state_is_what_it_says(strategy: Strategy) -> None:
    if hasattr(strategy, "home"):
        strategy = build({**describe(strategy), "home": ["w"]})
    model = specimen(strategy)
    state = strategy.start(model)
    brief = strategy.brief(state)
    at_server, at_site = row(strategy)[4].split(" · ")
    assert names(at_server) == state.slots.keys()
    if brief.rule in STATISTICS:
        assert at_site == "none"
        return
    path = {"lr": 0.1, "momentum": 0.0, "steps": 1.0, "loss": 1.0}
    _, kept = RULES[brief.rule].finish(brief, {}, model, path)
    assert names(at_site) == kept.keys()
    assert f"`{brief.rule}`" in row(strategy)[2]


def test_privacy_takes_it_or_not_as_it_says(strategy: Strategy) -> None:
    assert row(strategy)[5].startswith("no" if objections(strategy, "record") else "yes")


def test_it_needs_only_sums_as_it_says(strategy: Strategy) -> None:
    assert row(strategy)[6].startswith("yes" if strategy.reducer.linear else "no")
