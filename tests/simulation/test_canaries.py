"""The private training that sites run, attacked by canaries: at epsilon 3, and with faults.

Noise comes from the system's entropy, so these tests draw anew each time. What they ask holds but
once in some ten thousand runs: bounds are at 99.9 %, and twenty estimates, which stray by .16, all
lie within the five deviations that are asked but once in 250,000.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from fedml.errors import ConfigError, TaskFailed
from fedml.privacy.audit import (
    Scores,
    Verdict,
    distribution_free_bound,
    estimate,
    gaussian_bound,
    judge,
)
from fedml.protocol.messages import Privacy
from fedml.recipes.breast_cancer import BreastCancer
from fedml.simulation.canaries import Audit
from fedml.simulation.executors.base import MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from tests.attacks.sabotage import scale

torch.set_num_threads(1)

CLAIM, DELTA = 3.0, 1e-5
RECORD = Privacy("record", epsilon=CLAIM, delta=DELTA, clip=0.5, rounds=4)
LEAST, MOST = 2.2, 3.9  # of an estimate by 2000 canaries


def play(seeds: int, privacy: Privacy = RECORD, make: MakeExecutor = Inline) -> Sequence[Scores]:
    audit = Audit(BreastCancer(), privacy, canaries=2000, sites=5, steps=5, make=make)
    return [audit.play(seed) for seed in range(seeds)]


@cache
def sound() -> Sequence[Scores]:
    """Return what twenty seeds of five sites and four rounds give, played once."""
    return play(20)


def test_at_epsilon_3_no_bound_of_twenty_seeds_is_above_the_claim() -> None:
    for scores in sound():
        assert distribution_free_bound(scores, DELTA) <= CLAIM
        assert gaussian_bound(scores, DELTA, 0.999) <= CLAIM
    assert not judge(sound(), CLAIM, DELTA).broken


def test_at_epsilon_3_the_estimate_of_twenty_seeds_is_the_claim() -> None:
    found = [estimate(scores, DELTA) for scores in sound()]
    assert all(LEAST <= value <= MOST for value in found)
    assert statistics.fmean(found) == pytest.approx(CLAIM, abs=0.15)


def test_the_audit_proves_most_of_what_is_claimed() -> None:
    """A bound that never comes near would pass any engine."""
    assert judge(sound(), CLAIM, DELTA).gaussian > 2.2


def test_the_vectorised_engine_keeps_the_claim() -> None:
    assert not judge(play(3, make=Vectorised), CLAIM, DELTA).broken


FAULTS: dict[str, dict[str, float]] = {
    "noise off": {"noise": 0.0},
    "noise divided by the batch twice": {"noise": 1 / 240},
    "clipping off": {"clip": 1e6},
    "half the noise": {"noise": 0.5},
}


def with_fault(fault: str, patch: pytest.MonkeyPatch, make: MakeExecutor) -> Verdict:
    scale(patch, **FAULTS[fault])
    return judge(play(2, make=make), CLAIM, DELTA)


@pytest.mark.parametrize("make", [Inline, Vectorised])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_with_a_fault_is_caught_by_a_proof(
    fault: str, make: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = with_fault(fault, monkeypatch, make)
    assert verdict.gaussian > CLAIM
    assert re.match(r"an attacker proves epsilon [\d.inf]+, above the 3", verdict.broken)
    if fault != "half the noise":  # which no distribution-free bound of one run can show
        assert verdict.distribution_free > 5


def test_an_audit_of_no_claim_or_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="claims nothing to audit"):
        Audit(BreastCancer(), Privacy())
    with pytest.raises(ConfigError, match="1 or more of each"):
        Audit(BreastCancer(), RECORD, canaries=0)
    with pytest.raises(ConfigError, match=r"privacy\.clip 100000"):
        Audit(BreastCancer(), replace(RECORD, clip=1e5))


def test_a_recipe_that_is_unfit_for_privacy_ends_the_audit_with_its_reason() -> None:
    class Mixing(BreastCancer):
        def build(self) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))

    with pytest.raises(TaskFailed, match="BatchNorm1d"):
        Audit(Mixing(), RECORD).play(0)
