"""A run goes from a plan to a candidate through lost sites, stops and crashes, by replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.protocol.operations import Receipt
from fedml.protocol.tasks import Brief
from fedml.rounds import (
    CancelTask,
    Cohort,
    Committed,
    End,
    Evaluation,
    Event,
    ForgetTask,
    Gate,
    Run,
    SendTask,
    SiteLost,
    SitesChanged,
    StopAsked,
    Tick,
    UpdateArrived,
    WakeAt,
)
from fedml.strategies import FedAvg, ServerState
from tests.rounds.worlds import ALL, MODEL, RUN, SITES, Host, answer, host, plan, status

BERN, KYOTO, QUITO = SITES
AT_END = Evaluation()


def lose(name: SiteId, reason: str = "over budget", *, final: bool = True) -> SiteLost:
    return SiteLost(name, reason, final)


def deadline(a_host: Host) -> Tick:
    assert a_host.opened is not None
    return Tick(a_host.opened.opening.token)


# --- the straight way --------------------------------------------------------------------------


def test_a_run_goes_from_plan_to_candidate() -> None:
    a_host = host(plan(evaluation=AT_END))
    a_host.feed(ALL)
    for _ in range(4):
        a_host.play_round()
    [candidate] = a_host.candidates
    assert a_host.ends == [End("done", "candidate after 3 rounds")]
    assert a_host.state is not None
    assert candidate.params == a_host.state.params
    assert candidate.scores == {"accuracy": 0.8}
    assert [(r.kind, r.round) for r in candidate.receipts] == [
        ("train", 1), ("train", 2), ("train", 3), ("evaluate", 3),
    ]  # fmt: skip


def test_receipts_tell_who_counted_and_what_came_of_it() -> None:
    a_host = host(plan())
    a_host.feed(SitesChanged((status("bern"), status("kyoto"), status("quito", connected=False))))
    a_host.play_round()
    [receipt] = a_host.receipts
    assert a_host.state is not None
    assert receipt.asked == (BERN, KYOTO)
    assert [one.site for one in receipt.counted] == [BERN, KYOTO]
    assert all(len(one.digest) == 64 for one in receipt.counted)
    assert receipt.left_out == {"quito": "not connected"}
    assert receipt.model == a_host.state.params.digest()
    assert (receipt.opened, receipt.closed) == (200.0, 200.0)


def test_nothing_goes_on_before_the_round_is_durable() -> None:
    a_host = host(plan())
    a_host.commits_at_once = False
    a_host.feed(ALL)
    a_host.play_round()
    assert a_host.run.status == ("running", "committing a round")
    assert not any(isinstance(c, ForgetTask) for c in a_host.log)
    a_host.feed(ALL, deadline(a_host), Tick("1.1"))
    assert a_host.run.done == 0
    a_host.feed(Committed())
    assert a_host.run.done == 1
    forgotten = [c.task for c in a_host.log if isinstance(c, ForgetTask)]
    assert forgotten == ["run-1.1.1.bern", "run-1.1.1.kyoto", "run-1.1.1.quito"]


def test_evaluation_between_rounds_scores_the_committed_model() -> None:
    a_host = host(plan(evaluation=Evaluation(every=2, at_end=False)))
    a_host.feed(ALL)
    while not a_host.ends:
        a_host.play_round()
    kinds = [(r.kind, r.round) for r in a_host.receipts]
    assert kinds == [("train", 1), ("train", 2), ("evaluate", 2), ("train", 3)]
    assert a_host.receipts[2].model == a_host.receipts[1].model
    assert a_host.receipts[2].scores == {"accuracy": 0.8}


# --- waiting -----------------------------------------------------------------------------------


def test_a_run_waits_for_a_quorum_and_says_for_whom() -> None:
    a_host = host(plan())
    assert a_host.log == [WakeAt(600.0, "patience.1")]
    a_host.feed(SitesChanged((status("bern"), status("kyoto", connected=False))))
    state, detail = a_host.run.status
    assert (state, detail) == ("waiting", "2 sites are needed, 1 are ready (kyoto: not connected)")
    a_host.feed(SitesChanged((status("bern"), status("kyoto"))))
    assert a_host.run.status[0] == "running"
    a_host.feed(Tick("patience.1"))  # outdated: it does no harm
    assert not a_host.ends


def test_patience_ends() -> None:
    a_host = host(plan())
    a_host.feed(SitesChanged((status("bern"),)), Tick("patience.1"))
    assert a_host.ends == [End("failed", "waited 600 s: 2 sites are needed, 1 are ready")]


def test_a_later_wait_has_a_patience_of_its_own() -> None:
    a_host = host(plan())
    a_host.feed(ALL)
    a_host.feed(SitesChanged(()))
    a_host.play_round()
    assert a_host.log[-1] == WakeAt(600.0, "patience.2")
    a_host.feed(Tick("patience.1"))
    assert not a_host.ends


# --- lost sites --------------------------------------------------------------------------------


def test_a_failed_round_is_tried_again_with_new_task_ids() -> None:
    a_host = host(plan(attempts=2))
    a_host.feed(ALL, lose(BERN, "crashed", final=False), lose(KYOTO, "crashed", final=False))
    assert a_host.receipts[0].model == ""
    assert a_host.receipts[0].missing["bern"] == "crashed"
    assert a_host.open_tasks()[0].id == "run-1.1.2.bern"
    while not a_host.ends:
        a_host.play_round()
    assert a_host.ends[0].state == "done"


def test_an_answer_to_the_first_attempt_does_not_count_in_the_second() -> None:
    a_host = host(plan())
    a_host.feed(ALL)
    old = a_host.open_tasks()
    a_host.feed(deadline(a_host))
    before = list(a_host.log)
    a_host.feed(*(answer(task) for task in old))
    assert a_host.log == before


def test_attempts_run_out() -> None:
    a_host = host(plan(attempts=2))
    a_host.feed(ALL)
    a_host.feed(deadline(a_host))
    a_host.feed(deadline(a_host))
    [end] = a_host.ends
    assert end.state == "failed"
    assert end.detail.startswith("round 1 failed 2 times, the last time without bern: no answer")


def test_a_run_stops_when_too_many_refuse_for_good_and_spells_out_why() -> None:
    a_host = host(plan())
    a_host.feed(ALL, lose(BERN, "over budget"), lose(QUITO, "policy: nights only"))
    [end] = a_host.ends
    assert end.state == "stopped"
    assert "bern: over budget; quito: policy: nights only" in end.detail
    assert a_host.candidates == []
    assert len(a_host.receipts) == 1


def test_one_final_refusal_leaves_the_others_to_go_on_without() -> None:
    a_host = host(plan())
    a_host.feed(ALL, lose(BERN))
    while not a_host.ends:
        a_host.play_round()
    assert a_host.ends[0].state == "done"
    assert a_host.receipts[-1].asked == (KYOTO, QUITO)
    assert a_host.receipts[-1].left_out == {"bern": "over budget"}


def test_early_refusals_still_offer_what_there_is() -> None:
    a_host = host(plan(evaluation=AT_END, gates=(Gate(metric="accuracy", at_least=0.5),)))
    a_host.feed(ALL)
    a_host.play_round()
    a_host.feed(lose(BERN), lose(KYOTO))
    a_host.play_round()  # the last evaluation
    [candidate], [end] = a_host.candidates, a_host.ends
    assert end.state == "stopped"
    assert end.detail == candidate.detail
    assert end.detail.startswith("candidate ended after round 1 of 3: 2 sites refused for good")
    assert candidate.scores == {"accuracy": 0.8}


def test_an_early_end_that_misses_a_gate_offers_nothing() -> None:
    a_host = host(plan(evaluation=AT_END, gates=(Gate(metric="accuracy", at_least=0.9),)))
    a_host.feed(ALL)
    a_host.play_round()
    a_host.feed(lose(BERN), lose(KYOTO))
    a_host.play_round()
    assert a_host.candidates == []
    assert "accuracy: 0.8 is below 0.9; ended after round 1 of 3" in a_host.ends[0].detail


# --- gates and bad ends ------------------------------------------------------------------------


def test_a_model_that_misses_a_gate_is_no_candidate() -> None:
    gates = (Gate(metric="accuracy", at_least=0.9), Gate(metric="auc", at_least=0.5))
    a_host = host(plan(evaluation=AT_END, gates=gates))
    a_host.feed(ALL)
    while not a_host.ends:
        a_host.play_round()
    assert a_host.candidates == []
    [end] = a_host.ends
    assert end.state == "failed"
    assert "accuracy: 0.8 is below 0.9; gate auc: not measured" in end.detail


def test_an_evaluation_that_nobody_can_do_is_given_up() -> None:
    a_host = host(plan(rounds=1, attempts=1, evaluation=AT_END))
    a_host.feed(ALL)
    a_host.play_round()
    a_host.feed(deadline(a_host))
    [candidate] = a_host.candidates
    assert candidate.scores == {}
    assert a_host.receipts[-1].kind == "evaluate"
    assert a_host.receipts[-1].model == ""


def test_sites_that_refuse_to_score_may_still_train() -> None:
    a_host = host(plan(rounds=2, evaluation=Evaluation(every=1)))
    a_host.feed(ALL)
    a_host.play_round()
    a_host.feed(lose(BERN), lose(KYOTO))
    assert [task.kind for task in a_host.open_tasks()] == ["train"] * 3
    a_host.play_round()
    assert a_host.candidates[0].scores == {}


def test_a_model_that_diverges_fails_the_run() -> None:
    a_host = host(plan(strategy=FedAvg(server_lr=1e300)))
    a_host.feed(ALL)
    a_host.play_round()
    [end] = a_host.ends
    assert end.state == "failed"
    assert "diverged in round 1: lower strategy.server_lr" in end.detail
    assert a_host.receipts[0].model == ""


def test_a_rule_that_is_not_installed_is_refused_before_anything_runs() -> None:
    class Odd(FedAvg):
        def brief(self, state: ServerState) -> Brief:
            return Brief(state.params, rule="odd")

    a_plan = plan()
    object.__setattr__(a_plan, "strategy", Odd())
    with pytest.raises(
        ConfigError, match=r"rule 'odd' is not installed; there are .*newton, plain, prox"
    ):
        Run.begin(RUN, a_plan, MODEL)


# --- stopping ----------------------------------------------------------------------------------


def test_stopping_an_open_round_cancels_its_tasks_and_leaves_a_receipt() -> None:
    a_host = host(plan())
    a_host.feed(ALL)
    a_host.feed(answer(a_host.open_tasks()[0]), StopAsked("ana: wrong data"))
    cancelled = [c.site for c in a_host.log if isinstance(c, CancelTask)]
    assert cancelled == [KYOTO, QUITO]
    assert a_host.receipts[0].missing["kyoto"] == "the run was stopped: ana: wrong data"
    assert a_host.ends == [End("stopped", "ana: wrong data; 0 rounds are committed")]
    assert a_host.candidates == []


def test_stopping_while_a_round_is_being_committed_commits_it_first() -> None:
    a_host = host(plan())
    a_host.commits_at_once = False
    a_host.feed(ALL)
    a_host.play_round()
    a_host.feed(StopAsked("ana"))
    assert not a_host.ends
    a_host.feed(Committed())
    assert a_host.ends == [End("stopped", "ana; 1 rounds are committed")]


def test_stopping_a_waiting_run_ends_it_at_once() -> None:
    a_host = host(plan())
    a_host.feed(StopAsked("ana"), ALL, StopAsked("ana again"))
    assert a_host.ends == [End("stopped", "ana; 0 rounds are committed")]


# --- crashes -----------------------------------------------------------------------------------

KEEPS_GOING = plan(rounds=2, evaluation=AT_END)


def whole_story() -> Host:
    a_host = host(KEEPS_GOING)
    a_host.feed(ALL)
    while not a_host.ends:
        a_host.play_round()
    return a_host


def strip(receipts: list[Receipt]) -> list[Receipt]:
    return [replace(receipt, opened=0.0, closed=0.0) for receipt in receipts]


def restart(before: Host) -> Host:
    """What a coordinator does after kill -9: only what it had on disk is left."""
    state = before.state or KEEPS_GOING.strategy.start(MODEL)
    run = Run.resume(RUN, KEEPS_GOING, state, before.receipts, before.opened)
    after = Host(run, receipts=list(before.receipts), state=before.state, opened=before.opened)
    after.start()
    after.feed(ALL)
    return after


def test_a_crash_in_an_open_round_asks_for_the_same_bytes_again() -> None:
    before = host(KEEPS_GOING)
    before.feed(ALL)
    before.feed(answer(before.open_tasks()[1]))
    after = restart(before)
    resent = [c.task for c in after.log if isinstance(c, SendTask)]
    assert [task.id for task in resent] == [task.id for task in before.open_tasks()]
    assert [t.brief.params.digest() for t in resent] == [
        t.brief.params.digest() for t in before.open_tasks()
    ]


@pytest.mark.parametrize("events", range(13))
def test_a_crash_after_any_event_leads_to_the_same_model_and_receipts(events: int) -> None:
    a_host = host(KEEPS_GOING)
    a_host.feed(ALL)
    for step in range(40):
        if step == events:
            a_host = restart(a_host)
        if a_host.ends:
            break
        assert a_host.opened is not None
        a_host.feed(answer(a_host.open_tasks()[step % 3]))
    story = whole_story()
    assert a_host.candidates[-1].params == story.candidates[0].params
    assert strip(a_host.receipts) == strip(story.receipts)
    assert a_host.ends == story.ends


def test_a_crash_between_the_commit_and_the_next_round_repeats_nothing() -> None:
    before = host(KEEPS_GOING)
    before.commits_at_once = False
    before.feed(ALL)
    before.play_round()  # the commit is on disk, `Committed` never came
    after = restart(before)
    assert [task.round for task in after.open_tasks()] == [2, 2, 2]
    assert after.run.done == 1


def test_a_run_that_was_over_offers_its_candidate_again_with_the_same_bytes() -> None:
    story = whole_story()
    again = restart(story)
    assert again.candidates[0].params.digest() == story.candidates[0].params.digest()
    assert again.ends == story.ends


# --- any history -------------------------------------------------------------------------------

steps = st.one_of(
    st.builds(lambda k: ("answer", k), st.integers(0, 2)),
    st.builds(lambda k: ("damage", k), st.integers(0, 2)),
    st.builds(lambda k: ("lose", k), st.integers(0, 2)),
    st.builds(lambda k: ("refuse", k), st.integers(0, 2)),
    st.builds(lambda k: ("sites", k), st.integers(0, 7)),
    st.builds(lambda k: (k, 0), st.sampled_from(["deadline", "patience", "late", "commit"])),
    st.just(("stop", 0)),
)
HARD = plan(
    rounds=2,
    attempts=2,
    evaluation=Evaluation(every=1),
    gates=(Gate(metric="accuracy", at_least=0),),
)


def happening(a_host: Host, step: tuple[str, int]) -> Event:
    what, k = step
    tasks = a_host.open_tasks() if a_host.opened else []
    site = SITES[k % 3]
    match what:
        case "answer" if tasks:
            return answer(tasks[k % len(tasks)])
        case "late" if a_host.tasks:
            return answer(next(iter(a_host.tasks.values())))
        case "damage" if tasks and tasks[0].kind == "train":
            event = answer(tasks[k % len(tasks)])
            assert isinstance(event, UpdateArrived)
            delta = Params({"w": torch.full((2,), float("nan"))})
            return UpdateArrived(replace(event.update, delta=delta))
        case "lose" | "refuse":
            return SiteLost(site, "gone", what == "refuse")
        case "sites":
            return SitesChanged(
                tuple(status(s, connected=bool(k >> n & 1)) for n, s in enumerate(SITES))
            )
        case "deadline" if a_host.opened:
            return deadline(a_host)
        case "stop":
            return StopAsked("ana")
        case "patience":
            waits = [c.token for c in a_host.log if isinstance(c, WakeAt)]
            return Tick(next((t for t in reversed(waits) if t.startswith("patience")), ""))
        case _:
            return Committed()


def live(history: list[tuple[str, int]]) -> tuple[Host, list[Event]]:
    a_host, fed = host(HARD), list[Event]()
    for step in [("sites", 7), *history]:
        event = happening(a_host, step)
        fed.append(event)
        a_host.feed(event)
    return a_host, fed


@given(st.lists(steps, max_size=40))
def test_any_history_ends_at_most_once_and_counts_no_site_twice(
    history: list[tuple[str, int]],
) -> None:
    a_host, _ = live(history)
    assert len(a_host.ends) <= 1
    assert len(a_host.candidates) <= 1
    for receipt in a_host.receipts:
        counted = [one.site for one in receipt.counted]
        assert len(set(counted)) == len(counted)
        assert sorted([*counted, *receipt.missing]) == sorted(receipt.asked)
        assert (receipt.kind != "train" or not receipt.model) or len(counted) >= 2
    keys = [(r.kind, r.round, r.attempt) for r in a_host.receipts]
    assert len(set(keys)) == len(keys)
    if a_host.ends:
        before = list(a_host.log)
        a_host.feed(ALL, StopAsked("x"), Committed(), lose(BERN), Tick("1.1"))
        assert a_host.log == before


@given(st.lists(steps, max_size=40))
def test_replaying_a_history_gives_the_same_bits(history: list[tuple[str, int]]) -> None:
    first, fed = live(history)
    second = host(HARD)
    second.feed(*fed)
    assert first.receipts == second.receipts
    assert first.ends == second.ends
    assert [c.params.digest() for c in first.candidates] == [
        c.params.digest() for c in second.candidates
    ]


@given(st.lists(steps, max_size=30))
def test_clocks_alone_bring_any_run_to_its_end(history: list[tuple[str, int]]) -> None:
    a_host, _ = live(history)
    for _ in range(20):  # every wait has a clock, and a run waits only so often
        woken = [c.token for c in a_host.log if isinstance(c, WakeAt)]
        a_host.feed(*(Tick(token) for token in woken[-1:]))
    assert len(a_host.ends) == 1


def test_a_listed_cohort_is_enough_to_know_when_waiting_is_useless() -> None:
    a_host = host(plan(cohort=Cohort(quorum=2, deadline=60, sites=(BERN, KYOTO))))
    a_host.feed(ALL, lose(KYOTO))
    assert a_host.ends[0].state == "stopped"
