from __future__ import annotations

import math

import pytest
import torch

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Params
from fedml.privacy.mechanisms import MARGIN, clip, clip_factors, noisy_totals
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


def test_factors_scale_down_to_the_limit_and_never_up() -> None:
    norms = torch.tensor([0.0, 0.1, 0.7, 1.4, 1e300], dtype=torch.float64)
    right = [1.0, 1.0, 1 - MARGIN, 0.5 * (1 - MARGIN), 0.7e-300 * (1 - MARGIN)]
    assert clip_factors(norms, 0.7).tolist() == pytest.approx(right, rel=1e-12)


def test_what_is_not_finite_gets_a_factor_of_zero() -> None:
    norms = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    assert clip_factors(norms, 0.7).tolist() == [0.0, 0.0, 0.0]


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
