"""Site-level privacy by a trusted coordinator: one draw of noise for one sum, before it is seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedml.errors import Contradiction, MalformedUpdate
from fedml.params import Params
from fedml.privacy import accounting
from fedml.protocol.messages import Privacy, SiteId, TaskId
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Stack, Task, Update
from fedml.rounds import Cohort, Committed, Evaluation, Event, Run, UpdateArrived, Wire
from fedml.rounds.round import SendTask
from fedml.stacked import Stacked
from fedml.strategies import FedAvg, NoisyMean, Scaffold, WeightedMean, add_stack
from fedml.strategies.robust import Median
from tests.rounds.worlds import ALL, MODEL, RUN, Host, host, plan

CENTRAL = Privacy("site_central", 3.0, 1e-5, clip=0.5, rounds=3)


def update(delta: Params, site: str = "bern", **changes: object) -> Update:
    base = Update(TaskId(site), 1, SiteId(site), delta, 1.0)
    return replace(base, **changes)  # type: ignore[arg-type]


def pair(first: float, second: float) -> Params:
    return Params({"w": torch.tensor([first, second])})


def small(task: Task) -> Event:
    delta = Params({"w": torch.tensor([0.3, 0.4])})
    answer = update(delta, task.site, task=task.id, round=task.round, metrics={"loss": 0.7})
    return UpdateArrived(answer, delta.digest())


def central(**changes: object) -> Host:
    return host(plan(privacy=CENTRAL, strategy=FedAvg(), **changes))


# --- the sum ------------------------------------------------------------------------------------


def test_the_noise_on_the_sum_is_sigma_times_the_clip() -> None:
    size = 100_000
    reduction = NoisyMean(clip=0.5, noise=4.0).start()
    for site in ("bern", "kyoto", "oslo", "quito"):
        reduction.add(update(Params({"w": torch.zeros(size)}), site))
    noise = reduction.result().delta["w"] * 4  # the sum's
    assert abs(float(noise.std()) / (4.0 * 0.5) - 1) < 5 / math.sqrt(2 * size)
    assert abs(float(noise.mean())) < 5 * 2.0 / math.sqrt(size)


def test_the_mean_is_the_mean() -> None:
    reduction = NoisyMean(clip=0.5, noise=1e-9).start()
    reduction.add(update(Params({"w": torch.tensor([0.1, 0.2])})))
    reduction.add(update(Params({"w": torch.tensor([0.3, 0.2])}), "kyoto"))
    assert torch.allclose(reduction.result().delta["w"], torch.tensor([0.2, 0.2]))
    assert reduction.result().count == 2


def test_a_sum_is_made_noisy_once_and_each_sum_by_itself() -> None:
    def made() -> Params:
        reduction = NoisyMean(clip=0.5, noise=1.0).start()
        reduction.add(update(MODEL))
        first = reduction.result().delta
        assert reduction.result().delta == first
        return first

    assert made() != made()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 2.0}, "a delta of weight 1"),
        ({"slots": {"control": MODEL}}, "a delta of weight 1"),
        ({"delta": pair(0.6, 0.0)}, r"above privacy\.clip 0\.5$"),
        ({"delta": pair(math.nan, 0.0)}, r"above privacy\.clip 0\.5$"),
    ],
)
def test_one_site_that_would_count_for_more(changes: dict[str, object], message: str) -> None:
    """Its norm, which is exact, is told to nobody."""
    reduction = NoisyMean(clip=0.5, noise=1.0).start()
    with pytest.raises(MalformedUpdate, match=message):
        reduction.add(replace(update(MODEL), **changes))  # type: ignore[arg-type]


def test_a_stack_is_added_row_by_row() -> None:
    reduction = NoisyMean(clip=0.5, noise=1e-9).start()
    rows = [Params({"w": torch.tensor([0.1, 0.0])}), Params({"w": torch.tensor([9.0, 0.0])})]
    sites = (SiteId("bern"), SiteId("kyoto"))
    stack = Stack(
        1, sites, (TaskId("a"), TaskId("b")), Stacked(rows), (1.0, 1.0), {}, {"loss": [1.0, 2.0]}
    )
    assert list(add_stack(reduction, stack)) == [1]
    assert (reduction.result().count, reduction.result().metrics) == (1, {})


# --- the run ------------------------------------------------------------------------------------


def test_nothing_of_a_noisy_sum_leaves_before_it_is_on_the_disk() -> None:
    """A crash before the commit draws anew, and a crash after it does not."""
    a_host = central()
    a_host.commits_at_once = False
    a_host.feed(ALL)
    before, opened = len(a_host.log), a_host.opened
    answers = [small(task) for task in a_host.open_tasks()]
    a_host.feed(*answers)
    assert not any(isinstance(command, SendTask) for command in a_host.log[before:])
    first = a_host.state
    assert first is not None
    again = Host(Run.resume(RUN, a_host.run.plan, a_host.run.state, [], opened)).start()
    again.commits_at_once = False
    again.feed(ALL, *answers)
    assert again.state is not None
    assert again.state.params != first.params  # two draws, of which only one is committed
    again.feed(Committed())
    [brief] = {task.brief.params.digest() for task in again.open_tasks()}
    assert brief == again.state.params.digest()
    assert first.params.digest() not in {t.brief.params.digest() for t in again.tasks.values()}
    resumed = Run.resume(RUN, again.run.plan, again.state, again.receipts, again.opened)
    tasks = Host(resumed).start()
    tasks.feed(ALL)
    assert {t.brief.params.digest() for t in tasks.tasks.values()} == {brief}


def test_receipts_tell_nothing_exact() -> None:
    a_host = central()
    a_host.feed(ALL)
    a_host.feed(*(small(task) for task in a_host.open_tasks()))
    [receipt] = a_host.receipts
    assert len(receipt.counted) == 3
    assert {(one.digest, one.weight) for one in receipt.counted} == {("", 1.0)}
    assert receipt.metrics == {}


def test_the_run_s_noise_keeps_its_epsilon_without_amplification() -> None:
    reducer = plan(privacy=CENTRAL, strategy=FedAvg()).reducer
    assert isinstance(reducer, NoisyMean)
    event = accounting.training_event(plan().training, CENTRAL, 100)
    assert (event.sampling, event.steps, event.noise) == (1.0, 1, reducer.noise)
    assert 2.98 < accounting.epsilon([event] * 3, 1e-5) <= 3.0
    assert isinstance(plan().reducer, WeightedMean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": FedAvg(reducer=Median())}, "not bounded by a clip; use strategy.reducer="),
        ({"strategy": Scaffold()}, "report slots, which the clip does not bound"),
        ({"evaluation": Evaluation()}, "scores would leave without noise; set evaluation.at_end"),
        ({"rounds": 4}, "noise is set for exactly the rounds that run"),
        ({"wire": Wire(up="bf16")}, "moves an update after its norm was bounded, or shares of"),
        ({"secagg": Secagg("sa1")}, "site_central with secagg: its noise is not made for masked"),
    ],
)
def test_what_a_site_s_clip_cannot_bound_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(Contradiction, match=message):
        plan(**{"privacy": CENTRAL, "strategy": FedAvg(), **changes})
    if "secagg" not in changes:
        shared = replace(CENTRAL, mode="site_distributed", sharers=2)
        with pytest.raises(Contradiction, match=message):
            plan(**{"privacy": shared, "strategy": FedAvg(), **changes})


def test_sites_that_share_noise_for_themselves_as_units_are_served_under_masks_alone() -> None:
    shared = replace(CENTRAL, mode="site_distributed", sharers=3)
    fields = {"privacy": shared, "strategy": FedAvg(), "cohort": Cohort(quorum=3, deadline=60.0)}
    with pytest.raises(Contradiction, match="without secure aggregation a coordinator sees it"):
        plan(**fields).check_served()
    masked = plan(**fields, secagg=Secagg("sa1"))
    masked.check_served()
    assert isinstance(masked.reducer, WeightedMean) and not isinstance(masked.reducer, NoisyMean)
    with pytest.raises(Contradiction, match=r"sharers 4 is above cohort\.quorum 3"):
        plan(**{**fields, "privacy": replace(shared, sharers=4)})
