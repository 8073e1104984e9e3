from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError
from fedml.recipes.partition import dirichlet_label_skew

LABELS = np.repeat([0, 1], [357, 212])


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 8),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_every_row_goes_to_one_site_and_sites_are_of_one_size(
    labels: list[int], sites: int, alpha: float, seed: int
) -> None:
    sites = min(sites, len(labels))
    dealt = dirichlet_label_skew(labels, sites, alpha, seed)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))
    sizes = [len(rows) for rows in dealt]
    assert len(sizes) == sites and max(sizes) - min(sizes) <= 1


def test_one_seed_deals_the_same_and_another_does_not() -> None:
    first, again, other = (dirichlet_label_skew(LABELS, 4, 0.5, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_small_alpha_skews_and_a_large_one_does_not() -> None:
    def spread(alpha: float) -> float:
        shares = [
            LABELS[rows].mean()
            for seed in range(20)
            for rows in dirichlet_label_skew(LABELS, 4, alpha, seed)
        ]
        return float(np.std(shares))

    assert spread(0.1) > spread(1.0) > spread(1000.0)
    assert spread(0.1) > 0.3 and spread(1000.0) < 0.07


@pytest.mark.parametrize(("sites", "alpha"), [(0, 0.5), (570, 0.5), (4, 0.0), (4, float("nan"))])
def test_impossible_settings_are_refused(sites: int, alpha: float) -> None:
    with pytest.raises(ConfigError):
        dirichlet_label_skew(LABELS, sites, alpha, 0)
