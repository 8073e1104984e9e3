from __future__ import annotations

import math
import os
from fractions import Fraction

import pytest
import torch

from fedml.errors import ConfigError
from fedml.privacy.noise import FINENESS, SecureNoise
from fedml.privacy.sampling import PoissonSampler


def test_noise_has_the_standard_deviation_and_the_tails_asked() -> None:
    values = SecureNoise().normal((500, 1000), 3.0)
    assert values.dtype == torch.float64 and values.shape == (500, 1000)
    assert abs(float(values.mean())) < 5 * 3.0 / math.sqrt(values.numel())
    assert float(values.std()) == pytest.approx(3.0, rel=0.01)
    beyond = float((values.abs() > 2 * 3.0).double().mean())
    assert beyond == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=0.03)


def test_an_odd_size_across_blocks_is_filled_to_the_end() -> None:
    values = SecureNoise().normal(2**16 + 3, 1.0)
    assert bool((values[-10:] != 0).all()) and len(values) == 2**16 + 3
    assert len(SecureNoise().normal(0, 1.0)) == 0


def test_the_experiments_seed_does_not_seed_noise() -> None:
    """Two sites with one seed must not draw noise that subtracting their updates removes."""
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(SecureNoise().normal(50_000, 1.0))
    correlation = float(torch.corrcoef(torch.stack(draws))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(50_000)


def test_calls_and_objects_never_repeat() -> None:
    noise = SecureNoise()
    seen = {float(n.normal(1, 1.0)[0]) for n in (noise, noise, SecureNoise()) for _ in range(20)}
    assert len(seen) == 60


def test_a_forked_process_does_not_repeat_its_parents_noise() -> None:
    noise = SecureNoise()
    back, front = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(front, noise.below(2**64).to_bytes(8))
        os._exit(0)
    mine = noise.below(2**64)
    os.waitpid(child, 0)
    assert int.from_bytes(os.read(back, 8)) != mine
    os.close(back)
    os.close(front)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_senseless_deviation_is_refused(std: float) -> None:
    with pytest.raises(ConfigError, match="standard deviation"):
        SecureNoise().normal(3, std)


def test_discrete_laplace_follows_its_law() -> None:
    noise, scale = SecureNoise(), Fraction(5, 3)
    draws = torch.tensor([noise.discrete_laplace(scale) for _ in range(20_000)])
    p = math.exp(-1 / scale)
    for value in (-2, -1, 0, 1, 2, 5):
        expected = (1 - p) / (1 + p) * p ** abs(value)
        share = float((draws == value).double().mean())
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / 20_000))


def test_integers_below_an_end_are_even() -> None:
    noise = SecureNoise()
    counts = torch.bincount(torch.tensor([noise.below(5) for _ in range(10_000)]), minlength=5)
    assert len(counts) == 5 and noise.below(1) == 0
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 30  # chi-square, 4 degrees: 1 in 200 000


def test_each_row_joins_as_often_as_its_rate_says_and_by_itself() -> None:
    noise, sampler = SecureNoise(), PoissonSampler(rows=40, probability=0.3)
    joined = torch.zeros(4000, 40, dtype=torch.float64)
    for step in range(4000):
        joined[step, sampler.sample(noise)] = 1
    spread = math.sqrt(0.3 * 0.7 / 4000)
    assert bool(((joined.mean(0) - 0.3).abs() < 5 * spread).all())
    correlations = torch.corrcoef(joined.T) - torch.eye(40, dtype=torch.float64)
    assert float(correlations.abs().max()) < 6 / math.sqrt(4000)
    sizes = joined.sum(1)
    assert float(sizes.var()) == pytest.approx(40 * 0.3 * 0.7, rel=0.15)  # not fixed batches


def test_a_rate_of_one_takes_all_and_no_rows_give_none() -> None:
    noise = SecureNoise()
    assert PoissonSampler(7, 1.0).sample(noise).tolist() == list(range(7))
    assert PoissonSampler(0, 0.5).sample(noise).tolist() == []
    for rows, probability in ((-1, 0.5), (5, 0.0), (5, 1.1)):
        with pytest.raises(ConfigError, match="sampling"):
            PoissonSampler(rows, probability)


def test_what_is_released_lies_on_the_grid_and_has_the_noise_that_was_asked() -> None:
    for fraction in (0.0, 0.3, 0.5):
        total = torch.full((400_000,), 1000 + fraction, dtype=torch.float64)
        SecureNoise().hide(total)
        assert torch.equal(total, total.round())
        spread = (total - 1000 - fraction) / FINENESS
        assert abs(float(spread.mean())) < 5 / math.sqrt(400_000)
        assert float(spread.square().mean()) == pytest.approx(1 + 1 / 12 / 256, abs=0.012)


def test_points_of_the_grid_come_as_often_as_a_gaussian_has_it() -> None:
    """Chi-square over the integers within four deviations, and the tails beyond."""
    total = torch.full((1_000_000,), 0.25, dtype=torch.float64)
    SecureNoise().hide(total)
    edges = torch.arange(-64, 66, dtype=torch.float64) - 0.5
    cumulated = torch.special.ndtr((edges - 0.25) / FINENESS)
    shares = torch.cat([cumulated[:1], cumulated.diff(), 1 - cumulated[-1:]])
    counts = torch.bincount(torch.bucketize(total, edges), minlength=len(shares))
    expected = shares * len(total)
    chi, freedom = float(((counts - expected) ** 2 / expected).sum()), len(shares) - 1
    assert abs(chi - freedom) < 6 * math.sqrt(2 * freedom)


def test_far_tails_are_drawn_with_more_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all radii count as far, the law is the same, and no radius is one of 2**31."""
    monkeypatch.setattr("fedml.privacy.noise._LEAST", 2**31 - 1)
    noise = SecureNoise()
    values = noise.normal(200_000, 1.0)
    assert float(values.square().mean()) == pytest.approx(1, abs=0.016)
    assert float((values.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.0006)
    words = noise._pad.radius.square().mul(-0.5).exp().mul(2.0**31)
    assert float((words - words.round()).abs().max()) > 0.3


def test_halves_of_a_block_and_blocks_are_independent() -> None:
    values = SecureNoise().normal(2**17, 1.0).view(-1, 2**14)
    correlations = torch.corrcoef(torch.cat([values, values.abs()])) - torch.eye(16)
    assert float(correlations.abs().max()) < 6 / math.sqrt(2**14)


@pytest.mark.parametrize("probability", [1e-4, 0.3, 1 - 1e-5, 1.0])
def test_rare_and_common_rows_are_picked_at_their_rate(probability: float) -> None:
    noise = SecureNoise()
    picked = sum(len(noise.pick(100_000, probability)) for _ in range(40))
    spread = math.sqrt(4e6 * probability * (1 - probability))
    assert abs(picked - 4e6 * probability) <= 5 * spread
