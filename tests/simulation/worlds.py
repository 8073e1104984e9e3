"""A small federation for tests of the simulation: breast cancer at four sites."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedml.learning.recipe import Recipe, identify, load
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, Training
from fedml.protocol.tasks import Report, Stack, Task, Update
from fedml.recipes.breast_cancer import FEATURES, BreastCancer
from fedml.rounds import Cohort, Commit, Evaluation, Plan, Run, SiteLost
from fedml.simulation.checkpoint import Checkpoints
from fedml.simulation.chronicle import Chronicle
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import Executor, Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.population import IID, ShippedData
from fedml.simulation.witness import Witness
from fedml.simulation.world import Fate
from fedml.strategies import (
    PCA,
    STRATEGIES,
    FedAvg,
    Strategy,
    XGBoost,
    buffering_of,
    contrasts,
    in_turn,
)


def plan(
    *,
    rounds: int = 3,
    privacy: Privacy | None = None,
    quorum: int = 2,
    attempts: int = 1,
    strategy: Strategy | None = None,
    evaluation: Evaluation | None = None,
    every: int = 0,
) -> Plan:
    return Plan(
        model="breast_cancer",
        recipe=identify(recipe_for(strategy or FedAvg())),
        dataset="breast_cancer",
        strategy=strategy or FedAvg(),
        training=Training(lr=2.0, steps=3, batch_size=32),
        cohort=cohort(strategy or FedAvg(), quorum),
        rounds=rounds,
        privacy=privacy or Privacy(),
        evaluation=evaluation or Evaluation(every=every),
        attempts=attempts,
    )


def recipe_for(strategy: Strategy) -> str:
    """The recipe whose model it takes, over the same rows."""
    particular = {"XGBoost": "breast_cancer_trees", "KMeans": "breast_cancer_clusters"}
    return particular.get(type(strategy).__name__, "breast_cancer")


def made(name: str) -> Strategy:
    """A strategy of that name, such that its first rounds are of all its kinds."""
    particular: dict[str, Strategy] = {"xgboost": XGBoost(sketch=1), "pca": PCA(columns=0)}
    return particular.get(name) or STRATEGIES[name]()


def cohort(strategy: Strategy, quorum: int) -> Cohort:
    """A cohort that it takes: of `quorum` sites, if it may be."""
    if in_turn(strategy):
        return Cohort(quorum=1, deadline=60.0, size=1)
    buffering = buffering_of(strategy)
    most = buffering.size if buffering else 0
    return Cohort(quorum=min(quorum, most or quorum), deadline=60.0)


def taught(strategy: Strategy) -> Recipe:
    """The recipe of its trial: one with a hidden layer where a strategy looks at it."""
    return Deep() if contrasts(strategy) else recipe(recipe_for(strategy))


def recipe(name: str = "breast_cancer") -> Recipe:
    return load(identify(name))


class Deep(BreastCancer):
    """The same rows, for strategies that need a hidden layer to look at."""

    def build(self) -> nn.Module:
        scaling = next(super().build().children())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner, outer = nn.Linear(len(FEATURES), 4), nn.Linear(4, len(self.labels))
        return nn.Sequential(scaling, inner, nn.Tanh(), outer)


@functools.cache
def holdings() -> Mapping[SiteId, Holding]:
    return IID(4).deal(recipe(), ShippedData("breast_cancer"))


def start(name: str = "breast_cancer") -> Params:
    return Params(recipe(name).build().state_dict())


Single = Update | Report | SiteLost


def singles(executor: Executor, tasks: Sequence[Task]) -> list[Single]:
    """Every site's own answer, also where it came in a stack."""
    found: list[Single] = []
    for answer in executor.run(tasks):
        if isinstance(answer, Stack):
            found += [answer.update(row) for row in range(len(answer))]
        else:
            found.append(answer)
    return found


def engine(a_plan: Plan, executor: Executor | None = None, known: Recipe | None = None) -> Engine:
    known = known or recipe(a_plan.recipe.name)
    run = Run.begin(RunId("simulation"), a_plan, Params(known.build().state_dict()))
    work = executor or Inline(a_plan, known, holdings())
    return Engine(run, work, statuses(a_plan, holdings()))


def chronicle(
    a_plan: Plan,
    folder: Path | None = None,
    make: MakeExecutor = Inline,
    least: float = 0.0,
    rows: Mapping[SiteId, Holding] | None = None,
    known: Recipe | None = None,
) -> tuple[Engine, Chronicle]:
    """Return a simulation, begun or going on in `folder`, that is noted as it plays."""
    known = known or recipe(a_plan.recipe.name)
    rows = holdings() if rows is None else rows
    place = folder or Path(tempfile.mkdtemp())
    told = Chronicle(Checkpoints(place, least))
    run = told.begin(a_plan, Params(known.build().state_dict()))
    witness = Witness(make(a_plan, known, rows, told.memory))
    told.follow(run, witness)
    sites = statuses(a_plan, rows)
    engine = Engine(run, witness, sites, watch=told.note, now=told.now, flight=told.flight)
    return engine, told


def kill_at(engine: Engine, number: int) -> None:
    """Have a simulation die once its commit of that number is noted; 0: never."""
    note, commits = engine.watch, itertools.count(1)

    def watch(commit: Commit) -> None:
        note(commit)
        if next(commits) == number:
            raise InterruptedError

    engine.watch = watch


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
