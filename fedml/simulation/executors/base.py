"""The door that every executor fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.learning.rowstack import RowStack
from fedml.privacy.accounting import Event, epsilon
from fedml.protocol.messages import SiteId, Training
from fedml.protocol.tasks import Report, Slots, Stack, Task, Update
from fedml.rounds import Plan, SiteLost

Answer = Update | Stack | Report | SiteLost


@dataclass(frozen=True)
class Holding:
    """A simulated site's rows: those it trains on, and those it keeps to score models with."""

    train: Rows
    held_out: Rows


@runtime_checkable
class StackedHoldings(Protocol):
    """Holdings that can hand out the rows of many sites at once."""

    def counts(self, sites: Sequence[SiteId]) -> Sequence[int]:
        """Return the number of training rows of each of `sites`."""

    def stack(self, sites: Sequence[SiteId]) -> RowStack:
        """Return the training rows of `sites`, in that order."""


def count_rows(holdings: Mapping[SiteId, Holding], sites: Sequence[SiteId]) -> Sequence[int]:
    """Return the number of training rows of each of `sites`."""
    if isinstance(holdings, StackedHoldings):
        return holdings.counts(sites)
    return [len(holdings[site].train) for site in sites]


def stack_rows(holdings: Mapping[SiteId, Holding], sites: Sequence[SiteId]) -> RowStack:
    """Return the training rows of `sites` from any holdings."""
    if isinstance(holdings, StackedHoldings):
        return holdings.stack(sites)
    return RowStack.of([holdings[site].train for site in sites])


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

    def spend(self, task: Task, event: Event, delta: float) -> float:
        """Charge one more `event` to the task's site; return its epsilon so far."""
        place = (task.site, task.kind)
        self.releases[place] = self.releases.get(place, 0) + 1
        return epsilon([event] * self.releases[place], delta)


@dataclass(frozen=True)
class CutTask(Task):
    """A training task whose site has time for the first `work` (a share) of its steps alone.

    The engine makes one of a `Task` when the simulation's world says so; every executor trains
    any task as `training_of` says.
    """

    work: float = 1.0


def steps_of(training: Training, rows: int) -> int:
    """Return how many steps `training` takes over `rows` rows."""
    batches = math.ceil(rows / (training.batch_size or max(rows, 1)))
    return training.steps or training.epochs * batches


def training_of(task: Task, training: Training, rows: int) -> Training:
    """Return how `task` is trained over `rows` rows: as the plan's `training`, or the start of it.

    The steps of a `CutTask` are the first of those that the whole task would take, one at least.
    """
    if not isinstance(task, CutTask):
        return training
    return replace(training, epochs=0, steps=max(1, round(task.work * steps_of(training, rows))))


class Executor(Protocol):
    """Does the work of simulated sites somewhere: inline, vectorised, in processes, on Ray."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Answer each task once, in any order; what a site cannot do is a `SiteLost`.

        A `Stack` answers many. Plain training and evaluation give what `Inline` gives, to the
        byte where the arithmetic is the same, else within rounding. Tasks that are cut short
        (`CutTask`) are trained as `training_of` says.
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
