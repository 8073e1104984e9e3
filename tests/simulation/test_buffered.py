"""Updates as they come, in virtual time: the quick are not held up, a crash costs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedml.protocol.messages import Privacy, SiteId
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Task
from fedml.rounds import Cohort, Evaluation, Plan, SiteLost
from fedml.simulation.engine import Outcome
from fedml.simulation.executors.base import Answer, Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from fedml.simulation.population import IID, ShippedData
from fedml.simulation.world import Fate
from fedml.strategies import FedAsync, FedAvg, FedBuff, Strategy
from tests.simulation import worlds
from tests.simulation.worlds import Late

SLOW = SiteId("site-3")


def number(task: Task) -> int:
    return int(task.site.rpartition("-")[2])


def pace(task: Task) -> float:
    """Ten seconds and a little; the last of four sites takes ten times as long."""
    return pace_of(task.site)


def pace_of(site: SiteId) -> float:
    return (10.0 + int(site.rpartition("-")[2])) * (10 if site == SLOW else 1)


def plan(strategy: Strategy, **changes: object) -> Plan:
    base = worlds.plan(rounds=25, quorum=1, evaluation=Evaluation(at_end=False))
    kept = {"strategy": strategy, "cohort": Cohort(quorum=3, deadline=3600.0), **changes}
    return replace(base, **kept)  # type: ignore[arg-type]


def play(
    a_plan: Plan,
    folder: Path | None = None,
    *,
    make: MakeExecutor = Inline,
    world: object = None,
    kill: int = 0,
) -> Outcome:
    engine, told = worlds.chronicle(a_plan, folder, make)
    engine.world = world or Late(pace)  # type: ignore[assignment]
    worlds.kill_at(engine, kill)
    try:
        return engine.play()
    finally:
        told.checkpoints.close()


def killed(a_plan: Plan, folder: Path, kill: int, **how: object) -> Outcome:
    """Play, be killed at a commit, and go on from what lies in the folder."""
    with pytest.raises(InterruptedError):
        play(a_plan, folder, kill=kill, **how)  # type: ignore[arg-type]
    return play(a_plan, folder, **how)  # type: ignore[arg-type]


def settled(outcome: Outcome) -> tuple[object, ...]:
    assert outcome.candidate is not None, outcome.end
    return outcome.candidate.params.digest(), outcome.receipts, outcome.end, outcome.seconds


def test_with_a_buffer_of_the_cohort_and_no_staleness_it_is_fedavg_to_the_bit() -> None:
    cohort = Cohort(quorum=4, deadline=3600.0)
    one, other = (play(plan(kind, cohort=cohort)) for kind in (FedBuff(), FedAvg()))
    assert settled(one)[:2] == settled(other)[:2]
    assert one.seconds == other.seconds


def test_quick_sites_are_not_held_up_and_the_slow_one_counts_all_the_same() -> None:
    outcome = play(plan(FedBuff()))
    assert outcome.seconds == 25 * 12.0 - 4  # as the last of the quick, or less with the slow one
    late = [r for r in outcome.receipts if SLOW in {one.site for one in r.counted}]
    assert [r.staleness(SLOW) for r in late] == [10, 10]
    assert all(r.carried == {SLOW: f"simulation.1.1.{SLOW}"} for r in outcome.receipts[:10])


def test_an_update_later_than_the_deadline_counts_in_a_later_round() -> None:
    outcome = play(plan(FedBuff(), cohort=Cohort(quorum=3, deadline=60.0)))
    assert [r.round for r in outcome.receipts if SLOW in r.stale] == [11, 22]


def test_the_slow_site_may_be_left_behind() -> None:
    outcome = play(plan(FedBuff(max_staleness=3)))
    late = {r.round: r.missing[SLOW] for r in outcome.receipts[:-1] if r.missing}
    assert late[4] == "it works on round 1, and would be more than 3 rounds late"
    assert [*late] == [4, 8, 12, 16, 20, 24]


@dataclass
class Noted:
    """An executor that notes whose tasks it was given."""

    inner: Inline
    sites: list[SiteId]

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        self.sites += [task.site for task in tasks]
        return self.inner.run(tasks)


def test_what_is_called_back_in_time_is_never_computed() -> None:
    a_plan, sites = plan(FedBuff(max_staleness=3)), list[SiteId]()

    def make(*parts: object) -> Noted:
        return Noted(Inline(*parts), sites)  # type: ignore[arg-type]

    play(a_plan, make=make)  # type: ignore[arg-type]
    assert SLOW not in sites
    assert len(sites) == 75


@pytest.mark.parametrize(
    ("strategy", "quorum"), [(FedBuff(), 3), (FedBuff(buffer=3), 2), (FedAsync(), 1)]
)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    strategy: Strategy, quorum: int, tmp_path: Path
) -> None:
    a_plan = plan(
        strategy,
        cohort=Cohort(quorum=quorum, deadline=3600.0),
        evaluation=Evaluation(every=4),
        rounds=13,
    )
    whole = settled(play(a_plan, tmp_path / "whole"))
    for kill in (1, 4, 5, 11, 13):
        assert settled(killed(a_plan, tmp_path / str(kill), kill)) == whole, kill


def test_of_all_at_once_a_killed_run_counts_the_same(tmp_path: Path) -> None:
    a_plan = plan(FedBuff(buffer=2), cohort=Cohort(quorum=2, deadline=60.0), rounds=7)
    world = Late(lambda task: 0.0)
    whole = settled(play(a_plan, tmp_path / "whole", world=world))
    for kill in range(1, 7):
        assert settled(killed(a_plan, tmp_path / str(kill), kill, world=world)) == whole, kill


@dataclass
class Losing:
    """Every third task of a site is lost on the way, or so, and each answer takes a while."""

    every: int = 3

    def fates(self, tasks: Sequence[Task], now: float) -> Sequence[Fate]:
        lost = [(task.round + number(task)) % self.every == 0 for task in tasks]
        return [
            Fate(pace(task), lost="gone" if gone else "")
            for task, gone in zip(tasks, lost, strict=True)
        ]

    def away(self, sites: object, now: float) -> Mapping[SiteId, float]:
        return {}


def test_tasks_that_are_lost_in_flight_are_told_so_once(tmp_path: Path) -> None:
    a_plan = plan(FedBuff(), cohort=Cohort(quorum=2, deadline=3600.0), attempts=3, rounds=12)
    outcome = play(a_plan, tmp_path / "whole", world=Losing())
    lost = [
        (r.round, r.attempt, site)
        for r in outcome.receipts
        for site, why in r.missing.items()
        if why == "gone"
    ]
    assert lost
    assert len(lost) == len(set(lost))
    again = killed(a_plan, tmp_path / "killed", 4, world=Losing())
    assert settled(again) == settled(outcome)


@pytest.mark.parametrize("make", [Vectorised, Processes])
def test_every_executor_fills_the_same_buffers(make: MakeExecutor) -> None:
    a_plan = plan(FedBuff(buffer=2), cohort=Cohort(quorum=2, deadline=3600.0), rounds=8)
    for world in (Late(lambda task: 0.0), Late(pace)):
        one, other = (play(a_plan, make=kind, world=world) for kind in (Inline, make))
        assert [[c.site for c in r.counted] for r in one.receipts] == [
            [c.site for c in r.counted] for r in other.receipts
        ]
        assert [r.stale for r in one.receipts] == [r.stale for r in other.receipts]
        assert one.candidate is not None
        assert other.candidate is not None
        assert (one.candidate.params - other.candidate.params).norm() < 1e-4


def test_what_a_site_s_rows_spend_is_charged_once_a_task_that_was_done() -> None:
    privacy = Privacy("record", epsilon=4.0, delta=1e-5, rounds=25)
    outcome = play(plan(FedBuff(), privacy=privacy))
    spent: dict[SiteId, list[float]] = {}
    for receipt in outcome.receipts:
        for one in receipt.counted:
            spent.setdefault(one.site, []).append(one.epsilon)
    assert {site: len(values) for site, values in spent.items()} == {
        SiteId("site-0"): 25, SiteId("site-1"): 25, SiteId("site-2"): 23, SLOW: 2,
    }  # fmt: skip
    assert max(spent[SLOW]) == spent[SiteId("site-0")][1]
    assert max(values[-1] for values in spent.values()) <= 4.0


# --- under secure aggregation, where nothing is carried over -------------------------------------

SAME = FedBuff(max_staleness=0)
SA1 = Secagg("sa1", clip=4.0, weight_cap=500.0, scores=("accuracy",))


def both(strategy: Strategy = SAME, **changes: object) -> tuple[Plan, Plan]:
    clear = plan(strategy, rounds=8, **changes)
    return clear, replace(clear, secagg=SA1)


def counted(outcome: Outcome) -> list[list[SiteId]]:
    return [[one.site for one in receipt.counted] for receipt in outcome.receipts]


def apart(one: Outcome, other: Outcome) -> float:
    assert one.candidate is not None, one.end
    assert other.candidate is not None, other.end
    return (one.candidate.params - other.candidate.params).norm()


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_masked_buffers_have_the_sites_the_time_and_the_model_of_plain_ones(
    make: MakeExecutor,
) -> None:
    for world in (Late(lambda task: 0.0), Late(pace)):
        one, other = (play(each, make=make, world=world) for each in both())
        assert counted(one) == counted(other)
        assert one.seconds == other.seconds
        assert apart(one, other) < 1e-5
        assert not any(receipt.carried or receipt.stale for receipt in other.receipts)


def test_masks_wait_for_nobody_who_is_slow() -> None:
    _, masked = both()
    outcome = play(masked)
    assert outcome.seconds == 8 * 12.0  # the slowest of the quick
    why = "not waited for: enough masked vectors came"
    assert [receipt.missing for receipt in outcome.receipts] == [{SLOW: why}] * 8
    waiting = replace(masked, strategy=FedAvg())
    assert play(waiting).seconds == 8 * pace_of(SLOW)


def test_what_masks_call_back_in_time_is_never_computed() -> None:
    _, masked = both()
    sites = list[SiteId]()

    def make(*parts: object) -> Noted:
        return Noted(Inline(*parts), sites)  # type: ignore[arg-type]

    play(masked, make=make)  # type: ignore[arg-type]
    assert SLOW not in sites
    assert len(sites) == 24


def test_a_masked_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    _, masked = both(evaluation=Evaluation(every=3))
    whole = settled(play(masked, tmp_path / "whole"))
    for kill in (1, 3, 4, 8):
        assert settled(killed(masked, tmp_path / str(kill), kill)) == whole, kill


def test_scores_under_masks_are_of_all_sites() -> None:
    _, masked = both(evaluation=Evaluation(every=4))
    scored = [r for r in play(masked).receipts if r.kind == "evaluate"]
    assert [len(receipt.counted) for receipt in scored] == [4, 4]


def test_where_a_site_is_lost_a_masked_buffer_is_of_the_others() -> None:
    """In turn each of the four; the slow one is waited for where a quick one is lost."""
    one, other = (play(each, world=Losing(every=4)) for each in both())
    assert counted(one) == counted(other)
    assert [SLOW in sites for sites in counted(other)] == [False, True, True, True] * 2
    assert one.seconds == other.seconds
    assert apart(one, other) < 1e-5


def test_a_stack_that_others_come_between_is_parted_in_order() -> None:
    """Sites of two sizes are two stacks, and the places of their tasks take turns."""
    from fedml.simulation.flight import Due, Flight

    rows = dict(IID(4).deal(worlds.recipe(), ShippedData("breast_cancer")))
    short = SiteId("site-1")
    cut = replace(rows[short].train, x=rows[short].train.x[:20], y=rows[short].train.y[:20])
    rows[short] = Holding(cut, rows[short].held_out)
    engine, told = worlds.chronicle(plan(FedBuff()), rows=rows)
    engine._act(engine.run.open(0.0))
    engine._look()
    dues = [*engine.flight.dues.values()]
    order = [dues[2], dues[1], Due(dues[3].task, 0.0, "gone"), dues[0]]
    flight = Flight({due.task.id: due for due in order})
    found: list[str] = []
    for answer in flight.land(order, Vectorised(engine.run.plan, worlds.recipe(), rows)):
        found += [answer.site] if isinstance(answer, SiteLost) else [*answer.sites]  # type: ignore[union-attr]
    assert found == [due.task.site for due in order]
    told.checkpoints.close()
