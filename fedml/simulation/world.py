"""The world that simulated sites live in: how fast they are, when they are there, who fails.

Everything is a pure function of a seed, of names (site, round, attempt) and of virtual time: the
same plan in the same world gives the same receipts, whatever executor does the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedml.errors import ConfigError
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Task
from fedml.rounds import Plan
from fedml.simulation.conditions import Availability, Dropout, Pace, Stragglers
from fedml.simulation.executors.base import Holding, steps_of

LOST = "lost contact during the task"
IN_TIME = 0.99  # of a deadline: when a site that would miss it hands in what it has


@dataclass(frozen=True)
class Fate:
    """What becomes of a task: answered after `seconds`, or lost then if `lost` gives a reason.

    `work` is the share of the local steps that is done, above 0 and up to 1.
    """

    seconds: float = 0.0
    work: float = 1.0
    lost: str = ""


class World(Protocol):
    """Virtual time's laws. Pure: the same arguments, the same answers."""

    def fates(self, tasks: Sequence[Task], now: float) -> Sequence[Fate]:
        """Return what becomes of each of `tasks`, handed out together at `now`."""

    def away(self, sites: Iterable[SiteId], now: float) -> Mapping[SiteId, float]:
        """Return those of `sites` that are not connected, each with the moment it is back."""


class MakeWorld(Protocol):
    """How a configuration names a world: a class that is given the federation."""

    def __call__(self, plan: Plan, holdings: Mapping[SiteId, Holding]) -> World:
        """Return the world of these sites; raises `ConfigError` if `plan` cannot live in it."""


@dataclass(frozen=True)
class Instant:
    """A world where all sites are there and answer at once."""

    plan: Plan | None = None
    holdings: Mapping[SiteId, Holding] = field(default_factory=dict)

    def fates(self, tasks: Sequence[Task], now: float) -> Sequence[Fate]:
        """Return no delay for any of `tasks`."""
        return [Fate()] * len(tasks)

    def away(self, sites: Iterable[SiteId], now: float) -> Mapping[SiteId, float]:
        """Return nobody."""
        return {}


@dataclass(frozen=True)
class Heterogeneous:
    """A world of unlike sites: slow and fast, present and absent, some of them lost.

    Each part may be left out. A site that would miss the round's deadline misses it, as under
    FedAvg; with `partial` it hands in what it has just before, as under FedProx. Of a task that
    is not answered in time nothing is computed, charged or remembered: it is cancelled. An answer
    that is ready while its site is away comes when it is back.
    """

    plan: Plan
    holdings: Mapping[SiteId, Holding]
    seed: int = 0
    pace: Pace | None = None
    stragglers: Stragglers | None = None
    availability: Availability | None = None
    dropout: Dropout | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.partial and self.plan.privacy.mode != "none":
            raise ConfigError(
                "world.partial with record privacy: noise is set for all steps of a task, so a "
                "part of one cannot be released; set world.partial=false"
            )

    def fates(self, tasks: Sequence[Task], now: float) -> Sequence[Fate]:
        """Return each task's fate: paced, then cut short, held back, or lost."""
        training = [task for task in tasks if task.kind == "train"]
        slow = self.stragglers.choose(training, self.seed) if self.stragglers else frozenset()
        return [self._fate(task, now, straggles=task.site in slow) for task in tasks]

    def away(self, sites: Iterable[SiteId], now: float) -> Mapping[SiteId, float]:
        """Return the sites whose `availability` says so."""
        if self.availability is None:
            return {}
        moments = ((site, self.availability.back(site, now, self.seed)) for site in sites)
        return {site: back for site, back in moments if back > now}

    def _fate(self, task: Task, now: float, *, straggles: bool) -> Fate:
        fate = self._straggling(task) if straggles else self._paced(task)
        if self.availability is not None:
            ready = now + fate.seconds
            wait = self.availability.back(task.site, ready, self.seed) - ready
            fate = replace(fate, seconds=fate.seconds + wait)
        moment = self.dropout.moment(task, self.seed) if self.dropout else None
        return fate if moment is None else Fate(fate.seconds * moment, lost=LOST)

    def _straggling(self, task: Task) -> Fate:
        rows, deadline = len(self.holdings[task.site].train), self.plan.cohort.deadline
        assert self.stragglers is not None, "a straggler without stragglers"
        part = self.stragglers.part(task, self.plan, rows, self.seed) if self.partial else 0.0
        return Fate(IN_TIME * deadline, part) if part else Fate(2 * deadline)

    def _paced(self, task: Task) -> Fate:
        if self.pace is None:
            return Fate()
        holding, training = self.holdings[task.site], self.plan.training
        rows, steps = len(holding.held_out), 1
        if task.kind == "train":
            steps = steps_of(training, len(holding.train))
            rows = steps * min(training.batch_size or len(holding.train), len(holding.train))
        computing = self.pace.computing(task.site, rows, self.seed)
        carrying = self.pace.carrying(task.site, task.brief.params.layout.bytes, self.seed)
        deadline = self.plan.cohort.deadline
        if computing + carrying < deadline or not self.partial or task.kind != "train":
            return Fate(computing + carrying)
        done = math.floor((IN_TIME * deadline - carrying) / computing * steps)
        return Fate(IN_TIME * deadline, done / steps) if done > 0 else Fate(computing + carrying)
