from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Params
from fedml.privacy.mechanisms import clip, clipped_sum, noisy_totals
from fedml.privacy.noise import SecureNoise


def test_a_long_delta_is_cut_to_the_limit_and_a_short_one_left_alone() -> None:
    delta = Params({"a": torch.full((3,), 2.0), "b": torch.full((4,), -3.0)})
    assert clip(delta, 1.5).norm() == pytest.approx(1.5)
    assert clip(delta, 100.0) == delta
    assert clip(delta.zeros(), 1.0) == delta.zeros()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_delta_that_is_not_finite_is_malformed(bad: float) -> None:
    with pytest.raises(MalformedUpdate, match="norm is"):
        clip(Params({"a": torch.tensor([1.0, bad])}), 1.0)


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6, 1e30, math.inf, math.nan]))
@settings(max_examples=60, deadline=None)
def test_one_row_moves_the_sum_by_at_most_the_limit(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(9, 4, 3, generator=generator), torch.randn(9, 5, generator=generator)]
    rows = [part.clone() for part in rows]
    rows[0][4] *= scale
    whole = clipped_sum(rows, 0.7)
    fewer = clipped_sum([torch.cat([part[:4], part[5:]]) for part in rows], 0.7)
    moved = torch.cat([(a - b).flatten() for a, b in zip(whole, fewer, strict=True)]).norm()
    assert float(moved) <= 0.7 * (1 + 1e-9)


def test_a_row_with_nan_or_infinity_counts_as_zero() -> None:
    rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0], [0.3, 0.4]])
    [total] = clipped_sum([rows], 1.0)
    assert torch.allclose(total, torch.tensor([0.9, 1.2], dtype=torch.float64))


def test_the_norm_of_a_row_is_taken_over_all_parameters_together() -> None:
    [first, second] = clipped_sum([torch.tensor([[3.0]]), torch.tensor([[4.0]])], 1.0)
    assert float(first) == pytest.approx(0.6) and float(second) == pytest.approx(0.8)


def test_no_rows_sum_to_zero() -> None:
    [total] = clipped_sum([torch.zeros(0, 2, 3)], 1.0)
    assert total.shape == (2, 3) and not total.any()


def test_noisy_totals_are_right_on_average_and_spread_as_their_epsilon_says() -> None:
    noise, right = SecureNoise(), torch.tensor([1.0] * 60 + [0.0] * 40)
    draws = [noisy_totals({"accuracy": right}, 100, 0.5, noise) for _ in range(4000)]
    totals = torch.tensor([totals["accuracy"] for totals, _ in draws], dtype=torch.float64)
    counts = torch.tensor([count for _, count in draws], dtype=torch.float64)
    for values, mean in ((totals, 60), (counts, 100)):
        assert float(values.mean()) == pytest.approx(mean, abs=0.5)
        assert float(values.std()) == pytest.approx(math.sqrt(2) * 2 / 0.5, rel=0.1)


def test_a_poisoned_score_moves_a_total_by_at_most_one() -> None:
    values = torch.tensor([1.0, math.nan, 1e9, -1e9, math.inf])
    totals, _ = noisy_totals({"s": values}, 5, 1e6, SecureNoise())
    assert totals["s"] == pytest.approx(3.0)


def test_scores_of_other_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"score 's': there must be one value a row$"):
        noisy_totals({"s": torch.ones(3)}, 4, 1.0, SecureNoise())
    with pytest.raises(ConfigError, match="evaluation epsilon"):
        noisy_totals({}, 4, 0.0, SecureNoise())
