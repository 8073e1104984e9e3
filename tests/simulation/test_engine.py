"""A simulated federation is the production run on virtual time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedml.protocol.messages import Privacy, SiteId
from fedml.protocol.tasks import Task
from fedml.rounds import Evaluation, SiteLost
from fedml.simulation.executors.base import Answer
from fedml.simulation.executors.inline import Inline
from tests.simulation.worlds import Late, engine, holdings, plan, play, recipe

SLOW = SiteId("site-3")


def test_a_run_trains_and_offers_a_candidate() -> None:
    outcome = play(plan(rounds=8))
    assert outcome.end.state == "done"
    assert outcome.candidate is not None
    assert outcome.candidate.scores["accuracy"] > 0.9
    assert [receipt.kind for receipt in outcome.receipts] == ["train"] * 8 + ["evaluate"]


def test_the_same_plan_gives_the_same_receipts_to_the_bit() -> None:
    assert play(plan()).receipts == play(plan()).receipts


def test_every_receipt_has_the_digest_of_each_update() -> None:
    for receipt in play(plan()).receipts[:-1]:
        assert len({one.digest for one in receipt.counted}) == 4
        assert all(len(one.digest) == 64 for one in receipt.counted)


def test_answers_that_come_late_change_nothing_but_time() -> None:
    hurried, patient = engine(plan()), engine(plan())
    patient.world = Late(lambda task: 1.0 + len(task.site) + hash(task.site) % 7)
    one, other = hurried.play(), patient.play()
    assert [r.model for r in one.receipts] == [r.model for r in other.receipts]
    assert (one.seconds, other.seconds > 4) == (0.0, True)


def test_a_straggler_misses_the_deadline_and_the_round_goes_on_without() -> None:
    slow = engine(plan(rounds=2))
    slow.world = Late(lambda task: 61.0 if task.site == SLOW else 1.0)
    outcome = slow.play()
    assert outcome.end.state == "done"
    assert all(r.missing == {SLOW: "no answer within 60 s"} for r in outcome.receipts)
    assert outcome.seconds == 180.0  # two rounds and an evaluation, a minute each


def test_a_deadline_that_nobody_meets_fails_the_run() -> None:
    slow = engine(plan(attempts=2))
    slow.world = Late(lambda task: 1e6)
    outcome = slow.play()
    assert outcome.end.state == "failed"
    assert outcome.candidate is None
    assert [receipt.attempt for receipt in outcome.receipts] == [1, 2]


class Refusing(Inline):
    """Sites whose owners say no from the second round on."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        for task in tasks:
            if task.round > 1 and task.kind == "train":
                yield SiteLost(task.site, "over budget", True, task.id)
            else:
                yield from super().run([task])


def test_sites_that_refuse_end_the_run_with_what_there_is() -> None:
    a_plan = plan()
    outcome = engine(a_plan, Refusing(a_plan, recipe(), holdings())).play()
    assert outcome.end.state == "stopped"
    assert "over budget" in outcome.end.detail
    assert outcome.candidate is not None
    assert outcome.candidate.scores


def test_a_private_run_spends_its_epsilon_and_no_more() -> None:
    privacy = Privacy("record", epsilon=5.0, delta=1e-5, rounds=3, evaluation_epsilon=1.0)
    outcome = play(plan(privacy=privacy))
    assert outcome.end.state == "done"
    last = outcome.receipts[-2]
    assert all(4.5 < one.epsilon <= 5.0 for one in last.counted)


def test_a_run_private_by_site_is_charged_without_amplification_and_tells_no_loss() -> None:
    privacy = Privacy("site_central", epsilon=5.0, delta=1e-5, clip=1.0, rounds=3)
    outcome = play(plan(privacy=privacy, evaluation=Evaluation(at_end=False)))
    assert outcome.end.state == "done"
    spent = [one.epsilon for receipt in outcome.receipts for one in receipt.counted]
    assert all(4.9 < epsilon <= 5.0 for epsilon in spent[-2:])
    assert {(one.weight, one.digest) for r in outcome.receipts for one in r.counted} == {(1.0, "")}
    assert all(receipt.metrics == {} for receipt in outcome.receipts)


def test_watchers_see_each_commit_once() -> None:
    watched = engine(plan())
    seen: list[int] = []
    watched.watch = lambda commit: seen.append(commit.receipt.round)
    watched.play()
    assert seen == [1, 2, 3, 3]
