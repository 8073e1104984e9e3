"""The door that every executor fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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

    def of(self, task: Task) -> Memory:
        """Return what matters to `task` alone, for a worker elsewhere."""
        place = (task.site, task.kind)
        slots = {task.site: self.slots[task.site]} if task.site in self.slots else {}
        return Memory(slots, {place: self.releases[place]} if place in self.releases else {})

    def learn(self, other: Memory) -> None:
        """Take over what a worker's memory has come to."""
        self.slots.update(other.slots)
        self.releases.update(other.releases)


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
