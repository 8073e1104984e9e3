"""A run that takes updates as they come: who counts where, for how much, and after a crash."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fedml.errors import Contradiction
from fedml.params import Params
from fedml.protocol.messages import Privacy, SiteId, Training
from fedml.protocol.operations import Receipt
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Brief, Stack, Task
from fedml.rounds import (
    CancelTask,
    Cohort,
    Committed,
    End,
    Evaluation,
    ForgetTask,
    Opened,
    Plan,
    Run,
    SendTask,
    SiteLost,
    SitesChanged,
    StackArrived,
    StopAsked,
    Tick,
    UpdateArrived,
    WakeAt,
)
from fedml.rounds.selection import Roll
from fedml.simulation.veil import Veil
from fedml.stacked import Stacked
from fedml.strategies import FedAsync, FedAvg, FedBuff, Strategy
from tests.rounds import worlds
from tests.rounds.worlds import ALL, MODEL, RUN, Host, answer

BERN, KYOTO, QUITO = worlds.SITES
SA1 = Secagg("sa1")
SAME = FedBuff(max_staleness=0)  # no update is of an older model
SHARED = Privacy("record_distributed", epsilon=1.0, delta=1e-5, rounds=4, sharers=2)


def plan(strategy: Strategy | None = None, **changes: object) -> Plan:
    kept = {"cohort": Cohort(quorum=2, deadline=60.0), "rounds": 4, **changes}
    return worlds.plan(strategy=strategy or FedBuff(), **kept)


def begun(a_plan: Plan) -> Host:
    host = worlds.host(a_plan)
    host.feed(ALL)
    return host


def task(host: Host, number: int, site: SiteId) -> Task:
    return host.tasks[f"{RUN}.{number}.1.{site}"]  # type: ignore[index]


def moved(host: Host) -> list[float]:
    assert host.state is not None
    return host.state.params["w"].tolist()


def sent(host: Host) -> list[str]:
    return [c.task.id.removeprefix(f"{RUN}.") for c in host.log if isinstance(c, SendTask)]


def delta(a_task: Task) -> torch.Tensor:
    event = answer(a_task)
    assert isinstance(event, UpdateArrived)
    return event.update.delta["w"]


def test_a_full_buffer_ends_the_round_and_the_slow_site_works_on() -> None:
    host = begun(plan())
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    assert [receipt.round for receipt in host.receipts] == [1]
    first = host.receipts[0]
    assert first.carried == {QUITO: f"{RUN}.1.1.{QUITO}"}
    assert first.asked == (BERN, KYOTO, QUITO)
    assert not first.missing
    assert not [c for c in host.log if isinstance(c, CancelTask)]
    assert {c.site for c in host.log if isinstance(c, ForgetTask)} == {BERN, KYOTO}
    assert sent(host) == [f"1.1.{s}" for s in worlds.SITES] + [f"2.1.{BERN}", f"2.1.{KYOTO}"]


def test_a_stale_update_counts_once_for_less_and_the_receipt_says_so() -> None:
    host = begun(plan(FedBuff(staleness=0.5)))
    late = task(host, 1, QUITO)
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    before = torch.tensor(moved(host))
    fresh = task(host, 2, BERN)
    host.feed(answer(late), answer(late), answer(fresh))
    second = host.receipts[1]
    assert [one.site for one in second.counted] == [BERN, QUITO]
    assert second.stale == {QUITO: late.id}
    assert [second.staleness(s) for s in (BERN, QUITO)] == [0, 1]
    mean = (1 * delta(fresh) + 3 * 2**-0.5 * delta(late)) / (1 + 3)  # weights 1 and 3
    assert torch.allclose(torch.tensor(moved(host)), before + mean)
    assert task(host, 3, QUITO)  # asked anew


def test_fedasync_mixes_the_site_s_model_into_today_s() -> None:
    strategy = FedAsync(alpha=0.5, staleness=1.0)
    host = begun(plan(strategy, cohort=Cohort(quorum=1, deadline=60.0)))
    first, late = task(host, 1, BERN), task(host, 1, KYOTO)
    host.feed(answer(first))
    today = MODEL["w"] + 0.5 * delta(first)
    assert torch.allclose(torch.tensor(moved(host)), today)
    host.feed(answer(late))
    site_s = MODEL["w"] + delta(late)
    mixed = today + 0.5 / 2 * (site_s - today)
    assert torch.allclose(torch.tensor(moved(host)), mixed)


def test_with_a_buffer_of_the_cohort_it_is_fedavg_to_the_bit() -> None:
    cohort = Cohort(quorum=3, deadline=60.0)
    hosts = [begun(plan(kind, cohort=cohort)) for kind in (FedBuff(), FedAvg())]
    for host in hosts:
        for _ in range(4):
            host.play_round()
    one, other = ([r.model for r in host.receipts] for host in hosts)
    assert one == other
    assert len(one) == 4
    assert all(one)


def test_no_order_of_arrival_changes_a_bit_of_a_buffer() -> None:
    found = set()
    for order in itertools.permutations((BERN, KYOTO)):
        host = begun(plan(FedBuff(buffer=3), cohort=Cohort(quorum=2, deadline=60.0)))
        late = task(host, 1, QUITO)
        host.feed(*(answer(task(host, 1, site)) for site in order), Tick("1.1"))
        assert host.receipts[0].carried == {QUITO: late.id}
        events = [answer(late), *(answer(task(host, 2, site)) for site in order)]
        for one in itertools.permutations(events):
            again = begun(plan(FedBuff(buffer=3), cohort=Cohort(quorum=2, deadline=60.0)))
            again.feed(*(answer(task(again, 1, site)) for site in order), Tick("1.1"))
            again.feed(*one)
            found.add(again.receipts[1].model)
    assert len(found) == 1


def test_who_would_come_too_late_is_not_waited_for_and_asked_anew() -> None:
    host = begun(plan(FedBuff(max_staleness=1)))
    for number in (1, 2):
        host.feed(answer(task(host, number, BERN)), answer(task(host, number, KYOTO)))
    second = host.receipts[1]
    assert second.missing == {QUITO: "it works on round 1, and would be more than 1 rounds late"}
    assert not second.carried
    assert CancelTask(f"{RUN}.1.1.{QUITO}", QUITO, second.missing[QUITO]) in host.log  # type: ignore[arg-type]
    assert ForgetTask(f"{RUN}.1.1.{QUITO}", QUITO) in host.log  # type: ignore[arg-type]
    assert task(host, 3, QUITO)
    host.feed(answer(task(host, 1, QUITO)))  # which is over
    assert host.run.status[1].endswith("0 of 3 sites answered")


def test_what_comes_while_a_round_commits_or_is_scored_counts_in_the_next() -> None:
    host = begun(plan(evaluation=Evaluation(every=1), cohort=Cohort(quorum=2, deadline=60.0)))
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    assert host.opened is not None
    assert host.opened.opening.kind == "evaluate"
    assert host.opened.opening.asked == (BERN, KYOTO)  # the other trains
    assert host.opened.left_out[QUITO] == "it still works on round 1"
    host.feed(answer(task(host, 1, QUITO)))
    host.play_round()
    host.feed(answer(task(host, 2, BERN)))
    assert [c.site for c in host.receipts[2].counted] == [BERN, QUITO]


def test_of_many_at_once_the_buffer_takes_the_first_and_the_next_one_the_rest() -> None:
    host = begun(plan())
    tasks = [task(host, 1, site) for site in worlds.SITES]
    rows = [answer(one) for one in tasks]
    updates = [row.update for row in rows if isinstance(row, UpdateArrived)]
    stack = Stack(
        1, worlds.SITES, tuple(t.id for t in tasks), Stacked([u.delta for u in updates]),
        tuple(u.weight for u in updates),
    )  # fmt: skip
    host.feed(StackArrived(stack, ("a", "b", "c")))
    assert [(c.site, c.digest) for c in host.receipts[0].counted] == [(BERN, "a"), (KYOTO, "b")]
    host.feed(answer(task(host, 2, BERN)))
    assert [(c.site, c.digest) for c in host.receipts[1].counted][1] == (QUITO, "c")
    single = begun(plan())
    single.feed(*rows)
    single.feed(answer(task(single, 2, BERN)))
    assert [r.model for r in single.receipts] == [r.model for r in host.receipts]


def test_a_quorum_is_enough_at_the_deadline_and_less_fails_the_round() -> None:
    host = begun(plan(FedBuff(buffer=3)))
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    assert not host.receipts
    host.feed(Tick("1.1"))
    assert host.receipts[0].model
    host.feed(answer(task(host, 2, BERN)), Tick("2.1"))
    failed = host.receipts[1]
    assert not failed.model
    assert not failed.carried
    assert {c.task for c in host.log if isinstance(c, CancelTask)} == {
        f"{RUN}.1.1.{QUITO}", f"{RUN}.2.1.{KYOTO}",
    }  # fmt: skip
    assert sent(host)[-3:] == [f"2.2.{site}" for site in worlds.SITES]


def test_a_site_lost_in_flight_is_missing_in_the_round_that_hears_of_it() -> None:
    host = begun(plan())
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    host.feed(SiteLost(QUITO, "away"), answer(task(host, 2, BERN)), answer(task(host, 2, KYOTO)))
    assert host.receipts[1].missing == {QUITO: "away"}
    assert task(host, 3, QUITO)


def test_the_last_round_leaves_nobody_at_work() -> None:
    host = begun(plan(rounds=2))
    for number in (1, 2):
        host.feed(answer(task(host, number, BERN)), answer(task(host, number, KYOTO)))
    last = host.receipts[-1]
    assert last.missing == {QUITO: "not waited for: the run's last buffer is full"}
    assert CancelTask(f"{RUN}.1.1.{QUITO}", QUITO, last.missing[QUITO]) in host.log  # type: ignore[arg-type]
    assert host.ends[0].state == "done"


def test_who_stops_a_run_between_rounds_calls_back_who_is_at_work() -> None:
    host = begun(plan())
    host.commits_at_once = False
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)), StopAsked("enough"))
    host.feed(Committed())
    assert [type(c) for c in host.log[-3:]] == [CancelTask, ForgetTask, End]
    assert host.log[-2] == ForgetTask(f"{RUN}.1.1.{QUITO}", QUITO)  # type: ignore[arg-type]


def resumed(host: Host, a_plan: Plan, receipts: list[Receipt], opened: Opened | None) -> Host:
    """What a restart makes of a journal that ends here."""
    assert host.state is not None
    run = Run.resume(RUN, a_plan, host.state, receipts, opened)
    run.flight.briefs.update({1: Brief(MODEL)})
    return Host(run, tasks={one.id: one for one in run.flight.orders()})


@pytest.mark.parametrize("kind", [FedBuff(), FedAsync()])
def test_a_restart_goes_on_with_the_same_tasks_to_the_same_bits(kind: Strategy) -> None:
    quorum = kind.buffering.size or 2  # type: ignore[attr-defined]
    a_plan = plan(kind, cohort=Cohort(quorum=quorum, deadline=60.0))
    host = begun(a_plan)
    host.feed(*(answer(task(host, 1, site)) for site in worlds.SITES[:quorum]))
    for opened in (host.opened, None):  # with the next opening in the journal, or without
        again = resumed(host, a_plan, list(host.receipts), opened).start()
        again.feed(ALL)
        assert again.opened is not None
        assert host.opened is not None
        assert again.opened.opening == host.opened.opening
        late = task(again, 1, QUITO)
        assert late == task(host, 1, QUITO)
        again.feed(answer(late), answer(late), answer(task(again, 2, BERN)))
        whole = begun(a_plan)
        whole.feed(*(answer(task(whole, 1, site)) for site in worlds.SITES[:quorum]))
        whole.feed(answer(late), answer(late), answer(task(whole, 2, BERN)))
        assert again.receipts[0].model == whole.receipts[1].model
        assert again.receipts[0].stale == whole.receipts[1].stale == {QUITO: late.id}


def test_a_run_that_was_stopped_and_resumed_waits_for_nobody_s_old_task() -> None:
    host = begun(plan())
    host.feed(answer(task(host, 1, BERN)), answer(task(host, 1, KYOTO)))
    again = resumed(host, plan(), list(host.receipts), None)
    again.run.forgive(1, "")
    again.start().feed(ALL)
    assert again.opened is not None
    assert not again.opened.opening.carried
    assert task(again, 2, QUITO)


def test_no_round_opens_for_those_in_flight_alone_before_anybody_was_heard_of() -> None:
    host = begun(plan(cohort=Cohort(quorum=1, deadline=60.0)))
    host.feed(answer(task(host, 1, BERN)))
    again = resumed(host, plan(cohort=Cohort(quorum=1, deadline=60.0)), list(host.receipts), None)
    again.start().feed(SitesChanged(Roll(awaits_turn=True)))
    assert again.opened is None
    assert any(isinstance(command, WakeAt) for command in again.log)
    again.feed(ALL)
    assert again.opened is not None


def test_a_cohort_of_so_many_counts_those_at_work() -> None:
    host = begun(plan(cohort=Cohort(quorum=1, deadline=60.0, size=2)))
    asked = [SiteId(name.rpartition(".")[2]) for name in sent(host)]
    host.feed(answer(task(host, 1, asked[0])))
    assert host.opened is not None
    opening = host.opened.opening
    assert len(opening.asked) == 2
    assert opening.carried == (f"{RUN}.1.1.{asked[1]}",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": FedBuff(buffer=1)}, "is above the 1 updates that make a step"),
        ({"strategy": FedAsync()}, "is above the 1 updates that make a step"),
        (
            {"strategy": FedBuff(buffer=4), "cohort": Cohort(quorum=2, deadline=9.0, size=3)},
            "strategy.buffer 4 is above the 3 sites asked at a time",
        ),
        (
            {"secagg": SA1, "cohort": Cohort(quorum=3, deadline=9.0)},
            "strategy.max_staleness 20 with secagg: a masked sum is of one model",
        ),
        (
            {"secagg": SA1, "strategy": FedAsync(max_staleness=0)},
            "secagg with strategy FedAsync: a round is one site's update",
        ),
        (
            {"secagg": SA1, "strategy": SAME, "cohort": Cohort(quorum=5, deadline=9.0, size=10)},
            "a buffer of 5 with secagg: only sums of 10 sites with 6 or more in them are opened",
        ),
        (
            {"secagg": replace(SA1, colluders=6), "strategy": FedBuff(buffer=3, max_staleness=0)},
            "a buffer of 3 with secagg: only sums of these sites with 4 or more in them",
        ),
        (
            {"secagg": SA1, "strategy": FedBuff(buffer=2, max_staleness=0)},
            "a buffer of 2 with secagg",
        ),
        (
            {
                "secagg": SA1,
                "strategy": FedBuff(buffer=5, max_staleness=0),
                "cohort": Cohort(quorum=3, deadline=9.0, size=4),
            },
            "strategy.buffer 5 is above the 4 sites asked at a time",
        ),
        ({"privacy": SHARED}, "strategy.max_staleness 20 with record_distributed privacy"),
        (
            {"privacy": replace(SHARED, mode="site_distributed"), "strategy": SAME},
            "without a site another would be in its place",
        ),
        (
            {"privacy": Privacy("site_central", epsilon=1.0, delta=1e-5, rounds=4)},
            "without a site another would be in its place",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Contradiction) as caught:
        plan(**changes)  # type: ignore[arg-type]
    assert any(words in reason for reason in caught.value.reasons), caught.value.reasons


def test_all_that_masks_have_against_a_buffer_is_told_at_once() -> None:
    ten = Cohort(quorum=4, deadline=9.0, size=10)
    with pytest.raises(Contradiction) as caught:
        plan(FedBuff(buffer=11), secagg=SA1, cohort=ten)
    assert [reason.partition(":")[0] for reason in caught.value.reasons] == [
        "strategy.buffer 11 is above the 10 sites asked at a time",
        "strategy.max_staleness 20 with secagg",
    ]
    with pytest.raises(Contradiction) as caught:
        plan(FedBuff(buffer=4), secagg=SA1, cohort=ten)
    stale, few = caught.value.reasons
    assert "set it to 0" in stale
    assert few.endswith("raise strategy.buffer to 6, or ask fewer")
    plan(FedBuff(buffer=6, max_staleness=0), secagg=SA1, cohort=ten)


def test_without_staleness_sites_may_share_the_noise_of_a_buffer() -> None:
    one_step = Training(lr=0.1, steps=1)
    assert plan(SAME, privacy=SHARED, training=one_step).buffer == 2


def test_an_update_in_the_clear_waits_for_no_masked_round() -> None:
    run = Run.begin(RUN, plan(SAME, secagg=SA1, cohort=Cohort(quorum=3, deadline=9.0)), MODEL)
    run.enrol(Veil(SA1, worlds.SITES).roster)
    host = Host(run).start()
    host.feed(SitesChanged(tuple(replace(one, can_mask=True) for one in ALL.statuses)))  # type: ignore[union-attr]
    host.feed(answer(task(host, 1, BERN)))
    assert host.receipts[0].missing[BERN] == "its answer came unmasked, and was dropped"
    assert not host.run.flight.early


def test_no_region_stands_between() -> None:
    leaves = tuple(replace(one, region="south") for one in ALL.statuses)  # type: ignore[union-attr]
    host = worlds.host(plan())
    host.feed(SitesChanged(leaves))
    assert host.opened is None
    assert "FedBuff takes each as it comes" in host.run.status[1]


def test_a_delta_catches_up_alike_by_itself_and_in_a_stack() -> None:
    from fedml.rounds.answers import Lag

    torch.manual_seed(1)
    rows = [Params({"w": torch.randn(7), "n": torch.tensor(k)}) for k in range(3)]
    lag = Lag(3**-0.5, Params({"w": torch.randn(7), "n": torch.tensor(9)}))
    stack = lag.catch_up_all(Stacked(rows))
    assert [stack.row(k) for k in range(3)] == [lag.catch_up(row) for row in rows]
    assert [int(stack.row(k)["n"]) for k in range(3)] == [0, 1, 2]
