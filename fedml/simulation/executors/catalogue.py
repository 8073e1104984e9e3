"""Executors by name: ours, loaded when one is chosen, and those of installed packages."""

from __future__ import annotations

from typing import cast

from fedml.errors import ConfigError
from fedml.installed import Table
from fedml.simulation.executors.base import MakeExecutor


def _take(thing: object) -> MakeExecutor:
    if not (isinstance(thing, type) and callable(getattr(thing, "run", None))):
        raise ConfigError("is no Executor: it must be a class with run(tasks)")
    return cast(MakeExecutor, thing)


EXECUTORS: Table[MakeExecutor] = Table(
    "executor",
    {
        name: f"{__package__}.{name}:{name.capitalize()}"
        for name in ("auto", "cluster", "inline", "processes", "vectorised")
    },
    _take,
)
