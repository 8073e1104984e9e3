"""Two of ten sites lie in seven ways, and robust rules learn digits all the same."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest

from fedml.params import Params
from fedml.protocol.messages import RecipeId, RunId, SiteId, Training
from fedml.rounds import Cohort, Evaluation, Plan, Run
from fedml.simulation.attackers import Attack, Attackers, GaussianNoise, NotANumber, SignFlip
from fedml.simulation.collusion import InnerProduct, LittleIsEnough, Mimic
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAvg, Reducer, WeightedMean
from fedml.strategies.robust import (
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    Robust,
    TrimmedMean,
)
from simulations.robust.data import Sites
from simulations.robust.recipe import digits

pytest.importorskip("sklearn")

LIARS = ("guest-0", "guest-1")
ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "sign flip": SignFlip(),
    "little is enough": LittleIsEnough(1.5),
    "inner product": InnerProduct(10.0),
    "noise": GaussianNoise(1000.0),
    "not a number": NotANumber(),
    "mimic": Mimic(),
}


@functools.cache
def sites(alpha: float) -> Mapping[SiteId, Holding]:
    return Sites(alpha=alpha).deal(digits(), None)


def play(
    reducer: Reducer,
    attack: Attack | None,
    alpha: float = 0.0,
    rounds: int = 100,
    liars: tuple[str, ...] = LIARS,
) -> Outcome:
    plan = Plan(
        model="digits",
        recipe=RecipeId("digits", "ab" * 32),
        dataset="digits",
        strategy=FedAvg(reducer=reducer),
        training=Training(lr=15.0, steps=1),
        cohort=Cohort(quorum=8, deadline=60.0),
        rounds=rounds,
        evaluation=Evaluation(),
    )
    make = Attackers(attack, sites=liars).take_over(Vectorised) if attack else Vectorised
    executor = make(plan, digits(), sites(alpha), Memory())
    run = Run.begin(RunId("r"), plan, Params(digits().build().state_dict()))
    return Engine(run, executor, statuses(plan, sites(alpha))).play()


def accuracy(outcome: Outcome) -> float:
    return outcome.receipts[-1].scores["accuracy"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("alpha", "least"), [(0.0, 0.92), (0.5, 0.92)])
def test_the_default_rule_learns_whatever_two_of_ten_do(
    attack: str, alpha: float, least: float
) -> None:
    assert accuracy(play(Robust(f=2), ATTACKS[attack], alpha)) >= least


@pytest.mark.parametrize("reducer", [Median(f=2), TrimmedMean(f=2), MultiKrum(f=2),
                                     GeometricMedian(f=2)], ids=repr)  # fmt: skip
@pytest.mark.parametrize("attack", ["little is enough", "inner product", "noise"])
def test_other_rules_learn_from_sites_that_are_alike(reducer: Reducer, attack: str) -> None:
    assert accuracy(play(reducer, ATTACKS[attack])) >= 0.9


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_clean_site_says_is_learnt_whatever_the_others_do(attack: str) -> None:
    """By a ninth of the rows, alone of ten sites known to be clean."""
    rule = FLTrust(root="site-0")
    assert accuracy(play(rule, ATTACKS[attack])) >= 0.9


def test_a_majority_of_liars_is_lost_on_the_root_alone() -> None:
    most = tuple(f"site-{k}" for k in range(1, 6)) + LIARS
    attack = InnerProduct(10.0)
    assert accuracy(play(FLTrust(root="site-0"), attack, liars=most)) >= 0.9
    assert accuracy(play(GeometricMedian(f=2), attack, liars=most)) < 0.2


def test_the_plain_mean_is_lost_to_two_of_ten() -> None:
    assert accuracy(play(WeightedMean(), ATTACKS["inner product"])) < 0.2
    assert accuracy(play(WeightedMean(), ATTACKS["noise"])) < 0.2


def test_receipts_name_who_lies() -> None:
    receipts = play(Robust(f=2), ATTACKS["inner product"], rounds=5).receipts[:-1]
    for receipt in receipts:
        assert receipt.damped.keys() == set(LIARS)
        assert len(receipt.counted) == 10
        assert "of an even share" in receipt.damped["guest-0"]
    refused = play(Krum(f=2), ATTACKS["not a number"], rounds=1).receipts[0]
    assert refused.missing.keys() == set(LIARS)
