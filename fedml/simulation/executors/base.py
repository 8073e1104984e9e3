"""The door that every executor fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId, Training
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
        """Yield one answer per task, in any order; what a site cannot do is a `SiteLost`.

        Plain training and evaluation give the bytes that `Inline` gives. Tasks that are cut short
        (`CutTask`) are trained as `training_of` says.
        """


class MakeExecutor(Protocol):
    """How a configuration names an executor: a class that is given the federation."""

    def __call__(
        self, plan: Plan, recipe: Recipe, holdings: Mapping[SiteId, Holding], memory: Memory
    ) -> Executor:
        """Return an executor for these sites; it reads and keeps what they remember in `memory`."""
