"""The door that every executor fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Report, Slots, Task, Update
from fedml.rounds import Plan, SiteLost

Answer = Update | Report | SiteLost


@dataclass(frozen=True)
class Holding:
    """A simulated site's rows: those it trains on, and those it keeps to score models with."""

    train: Rows
    held_out: Rows


@dataclass
class Memory:
    """What simulated sites remember between tasks; with it a simulation goes on where it was.

    `slots` is what a site's rule keeps. `releases` counts, by site and kind of task, what a
    site's ledger would have charged.
    """

    slots: dict[SiteId, Slots] = field(default_factory=dict)
    releases: dict[tuple[SiteId, str], int] = field(default_factory=dict)


class Executor(Protocol):
    """Does the work of simulated sites somewhere: inline, vectorised, in processes, on Ray."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield one answer per task, in any order; what a site cannot do is a `SiteLost`.

        Plain training and evaluation give the bytes that `Inline` gives.
        """


class MakeExecutor(Protocol):
    """How a configuration names an executor: a class that is given the federation."""

    def __call__(
        self, plan: Plan, recipe: Recipe, holdings: Mapping[SiteId, Holding], memory: Memory
    ) -> Executor:
        """Return an executor for these sites; it reads and keeps what they remember in `memory`."""


def check_device(name: str) -> None:
    """Raise `ConfigError` unless torch can compute on the device `name`, such as "cuda:1"."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        raise ConfigError(
            f"device {name!r} is not here; there is {', '.join(['cpu', *found])}"
        ) from error
