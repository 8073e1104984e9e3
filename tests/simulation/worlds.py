"""A small federation for tests of the simulation: breast cancer at four sites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedml.learning.recipe import Recipe, identify, load
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, Training
from fedml.protocol.tasks import Task
from fedml.rounds import Cohort, Evaluation, Plan, Run
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import Executor, Holding
from fedml.simulation.executors.inline import Inline
from fedml.simulation.population import IID, ShippedData
from fedml.simulation.world import Fate
from fedml.strategies import FedAvg


def plan(
    *, rounds: int = 3, privacy: Privacy | None = None, quorum: int = 2, attempts: int = 1
) -> Plan:
    return Plan(
        model="breast_cancer",
        recipe=identify("breast_cancer"),
        dataset="breast_cancer",
        strategy=FedAvg(),
        training=Training(lr=2.0, steps=3, batch_size=32),
        cohort=Cohort(quorum=quorum, deadline=60.0),
        rounds=rounds,
        privacy=privacy or Privacy(),
        evaluation=Evaluation(),
        attempts=attempts,
    )


def recipe() -> Recipe:
    return load(identify("breast_cancer"))


@functools.cache
def holdings() -> Mapping[SiteId, Holding]:
    return IID(4).deal(recipe(), ShippedData("breast_cancer"))


def start() -> Params:
    return Params(recipe().build().state_dict())


def engine(a_plan: Plan, executor: Executor | None = None) -> Engine:
    run = Run.begin(RunId("simulation"), a_plan, start())
    work = executor or Inline(a_plan, recipe(), holdings())
    return Engine(run, work, statuses(a_plan, holdings()))


def play(a_plan: Plan) -> Outcome:
    return engine(a_plan).play()


@dataclass
class Late:
    """A world where answers take `delay` seconds and all sites are there."""

    delay: Callable[[Task], float]

    def fates(self, tasks: Sequence[Task], now: float) -> Sequence[Fate]:
        return [Fate(self.delay(task)) for task in tasks]

    def away(self, sites: Iterable[SiteId], now: float) -> Mapping[SiteId, float]:
        return {}
