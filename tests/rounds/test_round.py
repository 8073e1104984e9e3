"""A round ends once, counts each site once, and does not care who was first."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import ConfigError, QuorumLost
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Brief, Report, Stack, Update
from fedml.rounds import Opening, ReportArrived, Round, SiteLost, StackArrived, UpdateArrived
from fedml.rounds.round import (
    CancelTask,
    Close,
    Command,
    DeadlinePassed,
    Event,
    Fail,
    SendTask,
    WakeAt,
)
from fedml.stacked import Stacked
from fedml.strategies import Aggregate, WeightedMean, number
from tests.rounds.worlds import MODEL, RUN, SITES

BERN, KYOTO, QUITO = SITES
OPENING = Opening(RUN, 1, 1, SITES, quorum=2, deadline=60.0)


def update(name: str, value: float = 1.0, weight: float = 1.0) -> Update:
    site = SiteId(name)
    return Update(OPENING.task_id(site), 1, site, Params({"w": torch.full((2,), value)}), weight)


def altered(name: str, **changes: object) -> Update:
    return replace(update(name), **changes)  # type: ignore[arg-type]


def open_round(quorum: int = 2, opening: Opening = OPENING) -> tuple[Round, list[Command]]:
    round_ = Round(replace(opening, quorum=quorum), WeightedMean())
    return round_, [*round_.open(Brief(MODEL))]


def feed(round_: Round, *events: Event) -> list[Command]:
    return [command for event in events for command in round_.handle(event)]


def closed(commands: list[Command]) -> Close:
    [end] = [c for c in commands if isinstance(c, Close | Fail)]
    assert isinstance(end, Close), end
    return end


def failed(commands: list[Command]) -> Fail:
    [end] = [c for c in commands if isinstance(c, Close | Fail)]
    assert isinstance(end, Fail), end
    return end


def test_every_site_gets_one_task_and_the_host_one_deadline() -> None:
    _, commands = open_round()
    tasks = [c.task for c in commands if isinstance(c, SendTask)]
    assert [task.site for task in tasks] == list(SITES)
    assert [task.id for task in tasks] == ["run-1.1.1.bern", "run-1.1.1.kyoto", "run-1.1.1.quito"]
    assert commands[-1] == WakeAt(60.0, "1.1")


def test_opening_again_sends_the_same_tasks() -> None:
    assert open_round()[1] == open_round()[1]


def test_the_mean_is_weighted() -> None:
    round_, _ = open_round()
    events = [UpdateArrived(update("bern", 1.0, 1)), UpdateArrived(update("kyoto", 4.0, 2))]
    close = closed(feed(round_, *events, SiteLost(QUITO, "crashed")))
    assert isinstance(close.total, Aggregate)
    assert close.total.delta["w"].tolist() == [3.0, 3.0]
    assert close.account.missing == {"quito": "crashed"}


def test_the_account_tells_weight_digest_and_epsilon() -> None:
    round_, _ = open_round()
    events = [
        UpdateArrived(replace(update(site, weight=k + 1), epsilon=0.5), f"digest-{site}")
        for k, site in enumerate(SITES)
    ]
    counted = closed(feed(round_, *events)).account.counted
    assert [(c.site, c.weight, c.digest, c.epsilon) for c in counted] == [
        (site, k + 1, f"digest-{site}", 0.5) for k, site in enumerate(SITES)
    ]


def test_the_deadline_closes_with_a_quorum_and_cancels_stragglers() -> None:
    round_, _ = open_round()
    feed(round_, UpdateArrived(update("bern")), UpdateArrived(update("quito")))
    commands = round_.handle(DeadlinePassed())
    assert commands[0] == CancelTask(TaskId("run-1.1.1.kyoto"), KYOTO, "no answer within 60 s")
    assert closed(commands).account.missing == {"kyoto": "no answer within 60 s"}


def test_too_few_updates_at_the_deadline_lose_the_quorum() -> None:
    round_, _ = open_round()
    feed(round_, UpdateArrived(update("bern")))
    fail = failed(round_.handle(DeadlinePassed()))
    assert isinstance(fail.error, QuorumLost)
    assert str(fail.error).startswith("round 1: 1 of 2 sites needed (kyoto: no answer within 60 s;")


def test_a_round_without_hope_ends_at_once_and_stops_the_others() -> None:
    round_, _ = open_round(quorum=3)
    commands = round_.handle(SiteLost(KYOTO, "over budget", final=True))
    assert failed(commands).account.final == (KYOTO,)
    assert {c.site for c in commands if isinstance(c, CancelTask)} == {BERN, QUITO}


LAYOUT, ROUND = Params({"w": torch.zeros(3)}), 2
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"delta": Params({"w": torch.zeros(3)})}, "w: shape (3,), expected (2,)"),
        ({"delta": Params({"v": torch.zeros(2)})}, "names differ"),
        ({"delta": Params({"w": torch.zeros(2).double()})}, "dtype torch.float64"),
        ({"delta": Params({"w": torch.tensor([NAN, 0])})}, "its norm is nan"),
        ({"delta": Params({"w": torch.tensor([INF, 0])})}, "its norm is inf"),
        ({"delta": Params({"w": torch.tensor([3e9, 0])})}, "do not fit the sum"),
        ({"weight": 0.0}, "weight 0.0"),
        ({"weight": NAN}, "weight nan"),
        ({"weight": -3.0}, "weight -3.0"),
        ({"round": 2}, "it is for round 2"),
        ({"slots": {"control": MODEL}}, "has slots ['control'], rule plain reports []"),
    ],
)
def test_an_unsound_update_counts_as_missing_with_its_reason(
    changes: dict[str, object], reason: str
) -> None:
    round_, _ = open_round(quorum=1)
    feed(round_, UpdateArrived(altered("bern", **changes)))
    close = closed(feed(round_, UpdateArrived(update("kyoto")), UpdateArrived(update("quito"))))
    assert isinstance(close.total, Aggregate)
    assert close.total.count == 2
    assert reason in close.account.missing["bern"]


def arriving(slots: list[Params], *, stacked: bool) -> list[Event]:
    """Updates of all sites with these in the slot `weight`, in one stack or each by itself."""
    told = [altered(s, slots={"weight": one}) for s, one in zip(SITES, slots, strict=True)]
    if not stacked:
        return [UpdateArrived(one) for one in told]
    stack = Stack(
        1, SITES, tuple(one.task for one in told), Stacked([one.delta for one in told]),
        tuple(one.weight for one in told), {"weight": Stacked(slots)},
    )  # fmt: skip
    return [StackArrived(stack)]


@pytest.mark.parametrize("stacked", [False, True])
def test_sites_report_single_numbers_where_their_rule_says_so(stacked: bool) -> None:
    round_ = Round(OPENING, WeightedMean(), frozenset({"weight"}))
    round_.open(Brief(MODEL, "fednova"))
    numbers = [number(value) for value in (1.0, 2.0, 6.0)]
    close = closed(feed(round_, *arriving(numbers, stacked=stacked)))
    assert isinstance(close.total, Aggregate)
    assert close.total.number("weight") == pytest.approx(3.0)


def test_a_model_in_the_place_of_a_number_costs_its_own_site_alone() -> None:
    round_ = Round(OPENING, WeightedMean(), frozenset({"weight"}))
    round_.open(Brief(MODEL, "fednova"))
    close = closed(feed(round_, *arriving([MODEL, number(1.0), number(2.0)], stacked=False)))
    assert close.account.missing == {"bern": "answer refused: names differ: ['value', 'w']"}


@pytest.mark.parametrize("rule", ["plain", "fednova"])
def test_a_stack_of_models_in_the_place_of_numbers_is_refused_and_the_reverse(rule: str) -> None:
    round_ = Round(OPENING, WeightedMean(), frozenset({"weight"}))
    round_.open(Brief(MODEL, rule))
    wrong = number(1.0) if rule == "plain" else MODEL
    account = failed(feed(round_, *arriving([wrong] * 3, stacked=True))).account
    assert set(account.missing.values()) == {"answer refused: names differ: ['value', 'w']"}


def test_a_report_is_no_answer_to_training() -> None:
    round_, _ = open_round(quorum=2)
    feed(round_, ReportArrived(Report(OPENING.task_id(BERN), 1, BERN, {}, 1.0)))
    close = closed(feed(round_, UpdateArrived(update("kyoto")), UpdateArrived(update("quito"))))
    assert "it is a report" in close.account.missing["bern"]


@pytest.mark.parametrize(
    "event",
    [
        UpdateArrived(update("stranger")),
        UpdateArrived(altered("bern", task=TaskId("run-1.1.2.bern"))),
        UpdateArrived(altered("bern", site=KYOTO)),
        SiteLost(SiteId("stranger"), "gone"),
        SiteLost(BERN, "an old refusal", final=True, task=TaskId("run-1.1.0.bern")),
    ],
)
def test_what_is_not_for_this_round_changes_nothing(event: Event) -> None:
    round_, _ = open_round(quorum=3)
    assert round_.handle(event) == []
    close = closed(feed(round_, *(UpdateArrived(update(site)) for site in SITES)))
    assert close.account.missing == {}


def test_updates_that_do_not_fit_the_sum_together_fail_the_round() -> None:
    round_, _ = open_round()
    fail = failed(feed(round_, *(UpdateArrived(update(s, 2e9)) for s in SITES)))
    assert "the updates add up to" in str(fail.error)


def test_abandoning_a_round_cancels_its_tasks() -> None:
    round_, _ = open_round(quorum=1)
    feed(round_, UpdateArrived(update("bern")))
    commands = round_.abandon("the operator said so")
    assert [c.site for c in commands if isinstance(c, CancelTask)] == [KYOTO, QUITO]
    assert [c.site for c in failed(commands).account.counted] == [BERN]
    assert round_.abandon("again") == []


def test_a_quorum_needs_sites() -> None:
    with pytest.raises(ConfigError, match="quorum 4 of 3 sites"):
        replace(OPENING, quorum=4)
    with pytest.raises(ConfigError, match="ask each site once"):
        replace(OPENING, asked=(BERN, BERN))


# --- evaluations -------------------------------------------------------------------------------

SCORING = replace(OPENING, kind="evaluate")


def report(site: SiteId, totals: dict[str, float], count: float) -> ReportArrived:
    return ReportArrived(Report(SCORING.task_id(site), 1, site, totals, count))


def test_scores_are_totals_over_counts() -> None:
    round_, _ = open_round(quorum=2, opening=SCORING)
    events = [report(BERN, {"accuracy": 9.0, "auc": 5.0}, 10.0), report(KYOTO, {"accuracy": 3}, 30)]
    close = closed(feed(round_, *events, SiteLost(QUITO, "gone")))
    assert close.total == {"accuracy": 0.3, "auc": 0.5}


def test_training_and_evaluation_tasks_have_different_ids() -> None:
    assert SCORING.task_id(BERN) == "run-1.1.e1.bern"


@pytest.mark.parametrize("bad", [NAN, INF, 1e308])
def test_an_unsound_report_counts_as_missing(bad: float) -> None:
    round_, _ = open_round(quorum=1, opening=SCORING)
    events = [report(BERN, {"accuracy": bad}, 10.0), report(KYOTO, {"accuracy": 1.0}, 2.0)]
    close = closed(feed(round_, *events, SiteLost(QUITO, "gone")))
    assert close.total == {"accuracy": 0.5}
    assert "its accuracy is" in close.account.missing["bern"]


def test_noise_that_leaves_no_rows_gives_no_scores() -> None:
    round_, _ = open_round(quorum=1, opening=SCORING)
    fail = failed(feed(round_, *(report(site, {"accuracy": 1.0}, -1.0) for site in SITES)))
    assert "add up to no rows" in str(fail.error)


# --- any history -------------------------------------------------------------------------------

DAMAGED = {"delta": Params({"w": torch.tensor([NAN, 0])})}
events = st.one_of(
    st.builds(
        lambda site, value: UpdateArrived(update(site, value)),
        st.sampled_from([*SITES, "stranger"]),
        st.floats(-1e3, 1e3, width=32),
    ),
    st.builds(lambda site: UpdateArrived(altered(site, **DAMAGED)), st.sampled_from(SITES)),
    st.builds(SiteLost, st.sampled_from(SITES), st.just("crashed"), st.booleans()),
    st.just(DeadlinePassed()),
)


@given(st.lists(events, max_size=20), st.integers(1, 3))
def test_a_round_ends_at_most_once_and_surely_at_the_deadline(
    history: list[Event], quorum: int
) -> None:
    round_, _ = open_round(quorum)
    commands = feed(round_, *history)
    ends = [c for c in commands if isinstance(c, Close | Fail)]
    assert len(ends) <= 1
    if not ends:
        ends = [c for c in round_.handle(DeadlinePassed()) if isinstance(c, Close | Fail)]
    [end] = ends
    assert feed(round_, *history, DeadlinePassed()) == []
    counted = [c.site for c in end.account.counted]
    assert len(set(counted)) == len(counted)
    assert sorted([*counted, *end.account.missing]) == sorted(SITES)
    if isinstance(end, Close):
        assert isinstance(end.total, Aggregate)
        assert quorum <= end.total.count == len(counted)


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(0.1, 1e3)), min_size=3, max_size=3
    ),
    st.sampled_from(["answers", "crashes", "is damaged"]),
    st.randoms(use_true_random=False),
)
def test_any_order_of_arrival_gives_the_same_aggregate_and_account(
    sent: list[tuple[float, float]], last: str, shuffler: random.Random
) -> None:
    told: list[Event] = [UpdateArrived(update(s, *sent[k])) for k, s in enumerate(SITES)]
    if last == "crashes":
        told[2] = SiteLost(QUITO, "crashed")
    elif last == "is damaged":
        told[2] = UpdateArrived(altered("quito", **DAMAGED))
    told *= 2  # every answer is delivered twice
    shuffled = list(told)
    shuffler.shuffle(shuffled)
    first = closed(feed(open_round()[0], *told))
    second = closed(feed(open_round()[0], *shuffled))
    assert first.account == second.account
    assert isinstance(first.total, Aggregate)
    assert isinstance(second.total, Aggregate)
    assert first.total.delta.digest() == second.total.delta.digest()
