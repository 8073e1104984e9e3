"""The audit's statistics, held against mechanisms whose epsilon is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.privacy.accounting import SampledGaussian, epsilon
from fedml.privacy.audit import (
    Scores,
    distribution_free_bound,
    estimate,
    gaussian_bound,
    judge,
)

DELTA = 1e-5
MU = 0.7191  # of a Gaussian mechanism with epsilon 3 at that delta


def gaussian(mu: float, seed: int, canaries: int = 2000) -> Scores:
    """Return the scores of canaries that each move a coordinate of their own by mu deviations."""
    random = np.random.default_rng(seed)
    included = random.random(canaries) < 0.5
    return Scores(random.normal(size=canaries) + mu * included, included)


def randomised(truth: float, seed: int, canaries: int = 2000) -> Scores:
    """Return the scores of randomised response, which has exactly that epsilon at delta 0."""
    random = np.random.default_rng(seed)
    included = random.random(canaries) < 0.5
    honest = random.random(canaries) < 1 / (1 + math.exp(-truth))
    return Scores(np.where(included == honest, 1.0, -1.0) + random.random(canaries), included)


def test_the_mechanism_of_these_tests_has_the_epsilon_they_say() -> None:
    assert epsilon([SampledGaussian(1.0, 1 / MU, 1)], DELTA) == pytest.approx(3.0, abs=2e-3)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_distribution_free_bound_holds_and_is_near_for_the_worst_mechanism(
    truth: float,
) -> None:
    bounds = [distribution_free_bound(randomised(truth, seed), 0.0) for seed in range(40)]
    assert sum(bound > truth for bound in bounds) <= 6  # of 40, at 95 %
    assert np.mean(bounds) > 0.6 * truth


def test_the_gaussian_bound_holds_and_comes_near_with_more_canaries() -> None:
    bounds = [gaussian_bound(gaussian(MU, seed), DELTA) for seed in range(40)]
    assert sum(bound > 3 for bound in bounds) <= 6
    assert np.mean(bounds) > 1.2
    assert 2.4 < gaussian_bound(gaussian(MU, 0, 100_000), DELTA, 0.999) <= 3


def test_the_gaussian_bound_is_not_taken_in_by_its_own_choice_of_threshold() -> None:
    """Of scores that say nothing, the best of 99 thresholds looks good where it was chosen."""
    found = [gaussian_bound(gaussian(0.0, seed, 400), DELTA, 0.5) for seed in range(60)]
    assert sum(bound > 0 for bound in found) < 20  # 38, were it judged there


def test_the_estimate_is_right_on_average() -> None:
    found = [estimate(gaussian(MU, seed), DELTA) for seed in range(100)]
    assert np.mean(found) == pytest.approx(3.0, abs=0.05)


def test_the_estimate_does_not_measure_where_nothing_is_known_to_be() -> None:
    """Of 2000 canaries it strays by .155; the difference of both kinds' means, by .22."""
    found = [estimate(gaussian(MU, seed), DELTA) for seed in range(1000)]
    assert np.std(found) == pytest.approx(0.155, abs=0.015)
    assert all(2.2 <= value <= 3.9 for value in found)


@pytest.mark.parametrize("pull", [-1.0, -0.2, 0.2, 1.0])
def test_noise_that_is_not_around_nothing_is_blamed_and_not_measured_from(pull: float) -> None:
    """The estimate takes for granted that canaries which were not there score 0."""
    pulled = [
        Scores(run.values + pull, run.included)
        for run in (gaussian(MU / 2, seed) for seed in range(2))
    ]
    assert "where noise alone gives 0" in judge(pulled, 3.0, DELTA).broken


def test_one_unlucky_choice_of_threshold_does_not_weaken_the_gaussian_bound() -> None:
    """Seed 46 proved .83 where the threshold was chosen on one half alone."""
    bounds = [gaussian_bound(gaussian(MU, seed, 10_000), DELTA, 0.999) for seed in range(30, 60)]
    assert 1.7 < min(bounds) < max(bounds) <= 3


def test_scores_that_say_nothing_prove_nothing() -> None:
    nothing = gaussian(0.0, 3)
    assert distribution_free_bound(nothing, DELTA) == gaussian_bound(nothing, DELTA) == 0
    assert estimate(nothing, DELTA) < 0.5
    backwards = Scores(-nothing.values - 5 * nothing.included, nothing.included)
    assert estimate(backwards, DELTA) == gaussian_bound(backwards, DELTA) == 0


def test_scores_without_noise_prove_all_that_canaries_can() -> None:
    included = np.random.default_rng(0).random(2000) < 0.5
    bare = Scores(included.astype(float), included)
    assert distribution_free_bound(bare, DELTA) > 5
    assert estimate(bare, DELTA) == math.inf
    assert gaussian_bound(bare, DELTA) > 20
    assert judge([bare], 3.0, DELTA).broken.startswith("an attacker proves epsilon")


def test_a_sound_mechanism_is_not_blamed() -> None:
    for seed in range(20):
        verdict = judge([gaussian(MU, 100 * seed + run) for run in range(3)], 3.0, DELTA)
        assert not verdict.broken


def test_twice_the_leak_is_proven_and_a_small_claim_s_is_seen_by_the_estimate() -> None:
    assert "proves" in judge([gaussian(2 * MU, run) for run in range(3)], 3.0, DELTA).broken
    small = 0.2680  # epsilon 1
    verdicts = [judge([gaussian(2 * small, seed)], 1.0, DELTA) for seed in range(20)]
    assert all(verdict.broken for verdict in verdicts)
    unproven = [v for v in verdicts if max(v.gaussian, v.distribution_free) < 1]
    assert unproven and all("epsilon is about" in verdict.broken for verdict in unproven)


def test_the_worst_run_counts_for_the_distribution_free_bound() -> None:
    included = np.random.default_rng(0).random(2000) < 0.5
    bare = Scores(included.astype(float), included)
    assert judge([gaussian(MU, 1), bare], 3.0, DELTA).distribution_free > 5


def test_too_few_canaries_or_of_one_kind_alone_are_no_audit() -> None:
    for included in (np.ones(100, bool), np.zeros(100, bool), np.array([True] * 9 + [False] * 9)):
        with pytest.raises(ConfigError, match="40 canaries or more"):
            Scores(np.zeros(len(included)), included)
    both = np.arange(100) % 2 == 0
    with pytest.raises(ConfigError, match="not finite"):
        Scores(np.where(np.arange(100) == 3, np.nan, 0.0), both)
