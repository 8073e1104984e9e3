"""Attackers do what their papers say, and nobody else's update changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Report, Task, Update
from fedml.simulation.attackers import (
    Attack,
    Attackers,
    Boost,
    FreeRide,
    GaussianNoise,
    LabelFlip,
    NotANumber,
    SignFlip,
)
from fedml.simulation.collusion import InnerProduct, LittleIsEnough, Mimic
from fedml.simulation.engine import Outcome
from fedml.simulation.executors.base import Answer, Holding, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from tests.contracts.test_executors import answers, tasks
from tests.simulation.worlds import engine, holdings, plan, play, recipe, start

BAD = SiteId("site-2")
SENT = Params({"w": torch.tensor([1.0, -2.0]), "n": torch.tensor([3])})


def attacked(attack: Attack, rounds: int = 5, **settings: object) -> Outcome:
    who = Attackers(attack, **settings)  # type: ignore[arg-type]
    a_plan = plan(rounds=rounds)
    return engine(a_plan, who.take_over(Inline)(a_plan, recipe(), holdings(), Memory())).play()


def accuracy(outcome: Outcome) -> float:
    return outcome.receipts[-1].scores["accuracy"]


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (SignFlip(3.0), [-3.0, 6.0]),
        (Boost(10.0), [10.0, -20.0]),
        (FreeRide(), [0.0, 0.0]),
        (LabelFlip(), [1.0, -2.0]),
    ],
)
def test_what_is_sent_is_bent_by_the_formula(attack: Attack, expected: list[float]) -> None:
    assert attack.bend(SENT, torch.Generator())["w"].tolist() == expected


def test_noise_has_its_deviation_and_whole_numbers_are_left_alone() -> None:
    wide = Params({"w": torch.zeros(20_000), "n": torch.tensor([3])})
    noise = GaussianNoise(200.0).bend(wide, torch.Generator().manual_seed(0))
    assert float(noise["w"].std()) == pytest.approx(200.0, rel=0.03)
    assert noise["n"].tolist() == [3]
    assert bool(NotANumber().bend(wide, torch.Generator())["w"].isnan().all())


def test_only_attackers_updates_change() -> None:
    make = Attackers(SignFlip(2.0), sites=(BAD,)).take_over(Inline)
    honest, bent = (answers(one, plan(), tasks()) for one in (Inline, make))
    for site, update in honest.items():
        other = bent[site]
        assert isinstance(update, Update)
        assert isinstance(other, Update)
        assert other == (replace(update, delta=update.delta * -2.0) if site == BAD else update)
    reports = answers(make, plan(), tasks("evaluate"))
    assert all(isinstance(one, Report) for one in reports.values())
    assert reports == answers(Inline, plan(), tasks("evaluate"))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (LittleIsEnough(1.5), lambda all_: all_.mean(0) - 1.5 * all_.std(0, correction=0)),
        (InnerProduct(10.0), lambda all_: -10 * all_.mean(0)),
        (Mimic(), lambda all_: all_[0]),
    ],
    ids=["little is enough", "inner product", "mimic"],
)
@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_attackers_that_agree_know_what_the_honest_send(
    attack: Attack, expected: Callable[[torch.Tensor], torch.Tensor], make: MakeExecutor
) -> None:
    """Two of four do; the other two are what the formula is of."""
    who = (SiteId("site-0"), BAD)
    honest = answers(make, plan(), tasks())
    bent = answers(Attackers(attack, sites=who).take_over(make), plan(), tasks())
    known = [honest[site] for site in sorted(honest) if site not in who]
    wanted = expected(torch.stack([one.delta["1.weight"] for one in known]).double())  # type: ignore[union-attr]
    assert bent.keys() == honest.keys()
    for site, update in bent.items():
        assert isinstance(update, Update)
        if site in who:
            torch.testing.assert_close(update.delta["1.weight"].double(), wanted, rtol=1e-6, atol=0)
        else:
            assert update == honest[site]


def test_attackers_without_an_honest_site_have_nothing_to_agree_on() -> None:
    everybody = Attackers(Mimic(), share=1.0).take_over(Inline)
    assert answers(everybody, plan(), tasks()) == answers(Inline, plan(), tasks())


class Slotted(Inline):
    """Sites whose algorithm reports a slot beside the delta."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        for task in tasks:
            yield Update(task.id, task.round, task.site, SENT, 1.0, {"control": SENT})


def test_slots_are_bent_as_the_delta_is() -> None:
    found = answers(Attackers(FreeRide(), sites=(BAD,)).take_over(Slotted), plan(), tasks())
    for site, update in found.items():
        assert isinstance(update, Update)
        expected = SENT.zeros() if site == BAD else SENT
        assert update.delta == update.slots["control"] == expected


def test_a_share_of_the_sites_attacks_and_a_seed_says_who() -> None:
    sites = [SiteId(f"s{k}") for k in range(50)]
    some = Attackers(SignFlip(), share=0.3).among(sites)
    assert len(some) == 15
    assert some == Attackers(SignFlip(), share=0.3).among(sites[::-1])
    assert some != Attackers(SignFlip(), share=0.3, seed=1).among(sites)
    assert Attackers(SignFlip(), share=0.0).among(sites) == frozenset()


def test_sign_flippers_ruin_a_plain_mean() -> None:
    assert accuracy(play(plan(rounds=5))) > 0.9
    assert accuracy(attacked(SignFlip(5.0), share=0.25)) < 0.7


def test_not_a_number_is_refused_with_a_reason_and_the_others_count() -> None:
    outcome = attacked(NotANumber(), sites=(BAD,))
    assert outcome.end.state == "done"
    for receipt in outcome.receipts[:-1]:
        assert receipt.missing == {BAD: "answer refused: its norm is nan: training diverged"}
        assert len(receipt.counted) == 3
    assert accuracy(outcome) > 0.9


def test_free_riders_alone_move_nothing() -> None:
    outcome = attacked(FreeRide(), rounds=2, share=1.0)
    assert outcome.candidate is not None
    assert outcome.candidate.params == start()


def test_label_flippers_train_on_wrong_labels_and_score_on_right_ones() -> None:
    outcome, honest = attacked(LabelFlip(), share=0.75), play(plan(rounds=5))
    assert accuracy(outcome) < 0.2 < 0.9 < accuracy(honest)
    rows = Rows(torch.zeros(4, 1), torch.tensor([0, 1, 2, 9]))
    assert LabelFlip().poison(rows, 10).y.tolist() == [9, 8, 7, 0]
    halves = Rows(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))
    assert LabelFlip().poison(halves, 1).y.tolist() == [1.0, 0.0]


def test_an_attack_is_the_same_for_the_same_seed() -> None:
    def models(seed: int) -> list[str]:
        outcome = attacked(GaussianNoise(), rounds=2, sites=(BAD,), seed=seed)
        return [receipt.model for receipt in outcome.receipts]

    assert models(1) == models(1) != models(2)
    assert len(set(models(1)[:2])) == 2


def test_attacks_that_cannot_be_say_why() -> None:
    with pytest.raises(ConfigError, match=r"attackers\.share 1.5: a share of the sites"):
        Attackers(SignFlip(), share=1.5)
    with pytest.raises(ConfigError, match=r"attackers\.sites: there is no ghost; sites are called"):
        Attackers(SignFlip(), sites=("ghost",)).take_over(Inline)(
            plan(), recipe(), holdings(), Memory()
        )
    measured = Rows(torch.zeros(2, 30), torch.tensor([0.5, 7.0]))
    with pytest.raises(ConfigError, match="targets are not whole numbers of 0 to 1"):
        Attackers(LabelFlip(), share=1.0).take_over(Inline)(
            plan(), recipe(), {BAD: Holding(measured, measured)}, Memory()
        )
