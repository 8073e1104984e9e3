"""Cyclic weight transfer: who is asked, and that one site goes on where another came to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedml.errors import ConfigError, Contradiction
from fedml.learning.trainer import Trainer
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Cohort, Evaluation, Plan, draw, eligible
from fedml.rounds.selection import Selection
from fedml.simulation.crowd import Made, Users
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import Cyclic
from tests.rounds.worlds import SITES, status
from tests.rounds.worlds import plan as a_plan
from tests.simulation.worlds import engine, holdings, plan, recipe, start
from tests.strategies.quadratics import Quadratics, descend

ONE = Cohort(quorum=1, deadline=60.0, size=1)
SILENT = Evaluation(at_end=False)
ALL = [status(site) for site in SITES]


def in_turn(cohort: Cohort = ONE) -> Plan:
    return a_plan(strategy=Cyclic(), cohort=cohort)


def asked(plan: Plan, number: int, away: tuple[str, ...] = ()) -> Selection:
    there = [status(one.site, connected=one.site not in away) for one in ALL]
    return draw(plan, number, eligible(plan, there, {}))


def test_each_site_goes_on_where_the_last_one_came_to() -> None:
    federation, w = Quadratics(Cyclic()), np.zeros(3)
    for k in (0, 1, 2, 0, 1):
        w = descend(k, w, 0.1, 4)
        np.testing.assert_allclose(federation.play(1, (k,)), w, atol=1e-8)


def test_sites_take_turns_in_the_order_that_is_listed_else_by_name() -> None:
    by_name = [asked(in_turn(), number).asked for number in range(1, 8)]
    assert by_name == [(site,) for site in (*SITES, *SITES, SITES[0])]
    listed = in_turn(replace(ONE, sites=(SITES[2], SITES[0], SITES[1])))
    turns = [asked(listed, number).asked for number in range(1, 5)]
    assert turns == [(SITES[2],), (SITES[0],), (SITES[1],), (SITES[2],)]


def test_who_is_away_is_passed_over_and_others_hear_whose_turn_it_is() -> None:
    listed = in_turn(replace(ONE, sites=SITES))
    found = asked(listed, 2, away=(SITES[1],))
    assert found.asked == (SITES[2],)
    assert found.left_out == {SITES[0]: f"it is the turn of {SITES[2]}", SITES[1]: "not connected"}
    assert asked(listed, 3, away=(SITES[1],)).asked == (SITES[2],)  # whose own turn it is
    assert asked(listed, 3, away=(SITES[1], SITES[2])).asked == (SITES[0],)
    assert asked(listed, 1, away=SITES).asked == ()


@pytest.mark.parametrize("make", [Inline, Vectorised, Processes])
def test_a_run_is_one_site_training_after_the_other(make: MakeExecutor) -> None:
    turns = replace(plan(quorum=1, rounds=6, evaluation=SILENT), strategy=Cyclic(), cohort=ONE)
    outcome = engine(turns, make(turns, recipe(), holdings(), Memory())).play()
    assert outcome.candidate is not None
    order = [[str(one.site) for one in receipt.counted] for receipt in outcome.receipts]
    assert order == [[f"site-{k}"] for k in (0, 1, 2, 3, 0, 1)]
    model, trainer = start(), Trainer(recipe(), turns.training, Privacy())
    for number, [name] in enumerate(order, 1):
        site = SiteId(name)
        task = Task(TaskId("t"), RunId("r"), number, site, "train", Brief(model))
        seed = turns.task_seed(number, site)
        model = model + trainer.train(task, holdings()[site].train, {}, seed=seed)[0].delta
    assert (outcome.candidate.params - model).norm() < 1e-5


def test_a_plan_that_asks_more_sites_or_hides_one_in_a_sum_is_refused() -> None:
    with pytest.raises(Contradiction, match=r"cohort.size 0: .* set cohort.size=1") as caught:
        replace(in_turn(), cohort=Cohort(quorum=2, deadline=60.0))
    assert len(caught.value.reasons) == 1
    with pytest.raises(Contradiction, match=r"secagg with strategy Cyclic: .* no sum") as caught:
        replace(in_turn(), secagg=Secagg("sa1"))
    assert len(caught.value.reasons) == 1  # and none that says to ask more sites
    shared = Privacy("site_distributed", epsilon=1.0, delta=1e-5, rounds=3, sharers=3)
    with pytest.raises(Contradiction, match=r"each update goes alone; use privacy=record"):
        replace(in_turn(), privacy=shared)


def test_a_crowd_takes_no_turns() -> None:
    with pytest.raises(ConfigError, match=r"strategy Cyclic: a crowd's sites are drawn"):
        Users(Made(4), 100, 5).muster(in_turn(), {})
