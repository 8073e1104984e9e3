"""Simulations of privacy by patient: by `Inline`, and by the others through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedml.learning.recipe import Rows
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Report, Task, Update
from fedml.rounds import SiteLost
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from tests.simulation.worlds import holdings, plan, recipe, singles, start

ASKED = Privacy("patient", epsilon=5.0, delta=1e-5, rounds=3, evaluation_epsilon=1e5)


def grouped(apart: bool = True) -> Mapping[SiteId, Holding]:
    """Every two rows are a patient's."""
    found = {}
    for site, holding in holdings().items():
        parts = []
        for part, first in ((holding.train, 0), (holding.held_out, 1000 if apart else 0)):
            parts.append(Rows(part.x, part.y, first + torch.arange(len(part)) // 2))
        found[site] = Holding(*parts)
    return found


def task(kind: str, site: SiteId) -> Task:
    return Task(TaskId(f"r.{site}"), RunId("r"), 1, site, kind, Brief(start()))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_updates_weigh_patients_and_cost_what_the_plan_says(make: MakeExecutor) -> None:
    asked = replace(plan(privacy=ASKED))
    executor = make(asked, recipe(), grouped())  # type: ignore[call-arg]
    for answer in singles(executor, [task("train", site) for site in holdings()]):
        assert isinstance(answer, Update)
        assert answer.weight == (len(holdings()[answer.site].train) + 1) // 2
        assert 0 < answer.epsilon <= 5.0


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_scores_count_patients(make: MakeExecutor) -> None:
    executor = make(plan(privacy=ASKED), recipe(), grouped())  # type: ignore[call-arg]
    for answer in singles(executor, [task("evaluate", site) for site in holdings()]):
        assert isinstance(answer, Report)
        patients = (len(holdings()[answer.site].held_out) + 1) // 2
        assert answer.count == pytest.approx(patients, abs=0.5)


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_rows_without_patients_or_of_a_patient_on_both_sides_are_refused(
    make: MakeExecutor,
) -> None:
    [site, *_] = holdings()
    for held, line in ((holdings(), "do not say whose they are"), (grouped(False), "held out")):
        executor = make(plan(privacy=ASKED), recipe(), held)  # type: ignore[call-arg]
        [lost] = singles(executor, [task("train", site)])
        assert isinstance(lost, SiteLost) and lost.final and line in lost.reason
