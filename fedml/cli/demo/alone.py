"""What each hospital could do alone: the same recipe and the same privacy, a federation of one.

This is the demonstration's referee at work: it reads every hospital's folder, which no program
of a real federation can. What it learns is not charged to any ledger, and is for comparison only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedml.cli.demo.hospitals import Case
from fedml.errors import TaskFailed
from fedml.learning.recipe import Recipe, Rows
from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId
from fedml.rounds import Evaluation, Plan, Run
from fedml.rounds.plan import Cohort
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Holding
from fedml.simulation.executors.inline import Inline


def train_alone(plan: Plan, recipe: Recipe, site: SiteId, rows: Holding) -> Params:
    """Return the model that one site trains by the plan with nobody else."""
    alone = replace(
        plan,
        cohort=Cohort(quorum=1, deadline=plan.cohort.deadline, sites=(site,)),
        evaluation=Evaluation(every=0, at_end=False),
        gates=(),
    )
    first = Params(recipe.build().state_dict())
    run = Run.begin(RunId("alone"), alone, first)
    executor = Inline(alone, recipe, {site: rows})
    outcome = Engine(run, executor, statuses(alone, [site])).play()
    if outcome.candidate is None:
        raise TaskFailed(f"{site} alone: {outcome.end.detail}")
    return outcome.candidate.params


def read_all(case: Case, recipe: Recipe, sites: Path) -> Mapping[SiteId, Holding]:
    """Return every hospital's rows, as the referee sees them."""
    return {
        SiteId(hospital.name): Holding(
            recipe.read(hospital.file(sites / hospital.name, "train")),
            recipe.read(hospital.file(sites / hospital.name, "held_out")),
        )
        for hospital in case.hospitals
    }


def count_right(recipe: Recipe, params: Params, rows: Rows) -> int:
    """Return how many rows a model gets right."""
    model = recipe.build()
    model.load_state_dict(dict(params))
    model.eval()
    with torch.no_grad():
        return int((model(rows.x).argmax(1) == rows.y).sum())
