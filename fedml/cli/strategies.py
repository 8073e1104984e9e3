"""`fedml strategies`: which algorithms there are, where each is from, and what goes with what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from fedml.errors import ConfigError
from fedml.installed import Table, offers
from fedml.learning.recipe import BUILT_IN
from fedml.releases.registries import REGISTRIES
from fedml.rounds.compatibility import MODES, objections, table
from fedml.simulation.executors.catalogue import EXECUTORS
from fedml.strategies import REDUCERS, RULES, STATISTICS, STRATEGIES, own

_TABLES: tuple[Table[Any], ...] = (
    STRATEGIES, REDUCERS, RULES, STATISTICS, EXECUTORS, REGISTRIES,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A thing that can be named, where it is from, and why it cannot be used, if so."""

    kind: str
    name: str
    origin: str
    problem: str = ""


def listed() -> Iterator[Row]:
    """Yield all that there is; what is not ours is loaded, to see whether it is any good."""
    for each in _TABLES:
        for name in each:
            yield Row(each.kind, name, each.origin(name), _problem(each, name))
    for name in BUILT_IN:
        yield Row("recipe", name, "fedml")
    for offer in offers("recipe"):
        yield Row("recipe", offer.name, offer.package)


def _problem(table: Table[Any], name: str) -> str:
    if not any(offer.name == name for offer in offers(table.kind)):
        return ""  # ours, and not contested
    try:
        table.find(name)
    except ConfigError as error:
        return str(error)
    return ""


def modes() -> str:
    """Return what goes with what in Markdown, of all that is installed."""
    return table(
        {name: kind() for name, kind in STRATEGIES.items()},
        {name: kind() for name, kind in REDUCERS.items()},
    )


def judged(file: str) -> Iterator[str]:
    """Yield a line for each mode: whether a plan takes the strategy in `file.py:Class`."""
    strategy = own(file)
    for mode in MODES:
        reasons = objections(strategy, mode)
        word = "one by one" if mode == "vectorised" else "no"
        yield f"{mode}: " + (f"{word}: {'; '.join(reasons)}" if reasons else "yes")


def tell(file: str, *, show_modes: bool, as_json: bool) -> None:
    """Print what was asked for."""
    from fedml.cli.console import show

    if file:
        for line in judged(file):
            typer.echo(line)
    elif show_modes:
        typer.echo(modes())
    else:
        columns = {
            "kind": lambda row: row.kind,
            "name": lambda row: row.name,
            "from": lambda row: row.origin,
            "problem": lambda row: row.problem,
        }
        show([*listed()], columns, as_json=as_json)
