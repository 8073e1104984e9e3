"""Real rows at unlike sites, for algorithms that look at no label; in float64."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedml.learning.recipe import Recipe, Rows, identify
from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Update
from fedml.recipes.breast_cancer import FEATURES, BreastCancer
from fedml.recipes.breast_cancer_clusters import BreastCancerClusters
from fedml.rounds import Cohort, Evaluation, Plan, Run
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.population import ShippedData
from fedml.strategies import STATISTICS, Sample, ServerState, Strategy


class Clusters(BreastCancerClusters):
    """The recipe in float64."""

    def build(self) -> nn.Module:
        return super().build().double()

    def read(self, path: Path) -> Rows:
        return doubled(super().read(path))


class Components(BreastCancer):
    """Two components of breast cancer's measures, scaled, in float64."""

    labels = ("first", "second")

    def build(self) -> nn.Module:
        scale = next(super().build().children())
        return nn.Sequential(scale, nn.Linear(len(FEATURES), len(self.labels))).double()

    def read(self, path: Path) -> Rows:
        return doubled(super().read(path))


def doubled(rows: Rows) -> Rows:
    return Rows(rows.x.double(), rows.y)


@functools.cache
def holdings() -> Mapping[SiteId, Holding]:
    """Four sites of unlike sizes, dealt by the first measure: small tumours here, large there."""
    rows = ShippedData("breast_cancer").rows(Clusters())
    rows = rows.take(rows.x[:, 0].argsort())
    parts, start = {}, 0
    for number, size in enumerate((300, 150, 100, 19)):
        part = rows.take(list(range(start, start + size)))
        parts[SiteId(f"s{number}")] = Holding(part, part.take([0, 1]))
        start += size
    return parts


def scaled() -> Tensor:
    """All rows in one heap, as the models' first layer brings them to -1 to 1."""
    x = torch.cat([one.train.x for one in holdings().values()])
    found: Tensor = next(Clusters().build().children())(x)
    return found


def fitted(strategy: Strategy, recipe: Recipe, rounds: int) -> Params:
    """Return the model of a production run over these sites."""
    plan = Plan(
        model="trial",
        recipe=identify("breast_cancer"),
        dataset="trial",
        strategy=strategy,
        training=Training(lr=0.1, steps=1),
        cohort=Cohort(quorum=4, deadline=60.0),
        rounds=rounds,
        evaluation=Evaluation(at_end=False),
    )
    torch.manual_seed(0)
    run = Run.begin(RunId("r"), plan, Params(recipe.build().state_dict()))
    work = Inline(plan, recipe, holdings(), Memory())
    outcome = Engine(run, work, statuses(plan, holdings())).play()
    assert outcome.candidate is not None, outcome.end.detail
    return outcome.candidate.params


def moved(
    strategy: Strategy, state: ServerState, module: nn.Module, sites: Mapping[str, Tensor]
) -> ServerState:
    """Return the state after a round over sites with these rows."""
    brief, reduction = strategy.brief(state), strategy.reducer.start()
    for site, x in sites.items():

        def outputs(params: Params, x: Tensor = x) -> Tensor:
            found: Tensor = torch.func.functional_call(module, dict(params), (x,))
            return found

        def criterion(output: Tensor, target: Tensor) -> Tensor:
            return Clusters().loss(output, target)

        sample = Sample(x, x[:, 0], outputs, criterion)
        delta, slots = STATISTICS[brief.rule].measure(brief, sample)
        who = (TaskId(f"t-{site}"), state.step + 1, SiteId(site))
        reduction.add(Update(*who, delta, float(len(x)), slots))
    return strategy.advance(state, reduction.result())
