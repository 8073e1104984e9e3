"""Masks cancel exactly, at any slice and on any number of threads; rounding is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml.errors import ConfigError, MalformedUpdate, RoundFailed
from fedml.protocol.secagg import Part
from fedml.secagg.masking import SLICE, Grid, Mask, Total, Vector, Words, mask

KEY, OTHER = bytes(range(32)), bytes(range(32, 64))
LONG = Grid(3, (Part("delta", 2 * SLICE + 12345, 0.5), Part("metrics", 3, 10.0, fine=True)))


def numbers(grid: Grid, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    return {
        part.name: draw.uniform(-part.clip, part.clip, part.size).astype(np.float32)
        for part in grid.parts
    }


def words(grid: Grid, weight: float = 0.5, *masks: Mask, threads: int = 1, seed: int = 0) -> Words:
    slices = mask(Vector(grid, numbers(grid, seed), weight), grid, masks, threads)
    return np.concatenate([*slices])


def test_a_mask_is_the_key_stream_of_aes_256_ctr_added_word_by_word() -> None:
    stream = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    expected = np.frombuffer(stream.update(bytes(4 * LONG.length)), np.uint32)
    assert np.array_equal(words(LONG, 0.5, Mask(KEY, 1)) - words(LONG), expected)
    assert np.array_equal(words(LONG) - words(LONG, 0.5, Mask(KEY, -1)), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_masks_cancel_on_any_number_of_threads(threads: int) -> None:
    masks = Mask(KEY, 1), Mask(OTHER, -1)
    total = Total(LONG)
    total.add(words(LONG, 0.5, *masks, threads=threads), threads)
    total.unmask([Mask(KEY, -1), Mask(OTHER, 1)], threads)
    assert np.array_equal(total._words, words(LONG))


def test_slices_come_in_order_and_add_up_to_the_vector() -> None:
    slices = [*mask(Vector(LONG, numbers(LONG), 0.5), LONG, [], threads=2)]
    assert [len(piece) for piece in slices] == [SLICE, SLICE, LONG.length - 2 * SLICE]


@settings(max_examples=60)
@given(
    st.integers(1, 100),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_the_mean_is_within_half_a_step_for_each_site(
    cohort: int, clip: float, weights: list[float], seed: int
) -> None:
    cohort = max(cohort, len(weights))
    grid = Grid(cohort, (Part("delta", 50, clip), Part("metrics", 4, clip, fine=True)))
    total, rows = Total(grid), []
    for number, weight in enumerate(weights):
        total.add(words(grid, weight, seed=seed + number), 1)
        rows.append(numbers(grid, seed + number))
    assert total.weight == pytest.approx(sum(weights), rel=1e-12)
    out = np.empty(50)
    total.mean_into("delta", out, 1)
    step = len(weights) / 2 * clip / grid.top / sum(weights)
    for part, got, most in (("delta", out, step), ("metrics", total.mean("metrics"), 1e-6 * step)):
        true = sum(w * row[part].astype(np.float64) for w, row in zip(weights, rows, strict=True))
        assert np.abs(got - true / sum(weights)).max() <= most * 1.01


@given(st.floats(0.01, 1), st.lists(st.floats(-9, 9), min_size=1, max_size=20))
def test_a_fine_number_is_clipped_and_then_weighed(weight: float, found: list[float]) -> None:
    grid = Grid(5, (Part("few", len(found), 2.0, fine=True),))
    vector = Vector(grid, {"few": np.array(found)}, weight)
    told = np.empty(grid.length, np.uint32)
    vector.read(0, told, np.empty(grid.length))
    one = grid.whole(weight, 1.0)
    exact = one / (grid.top << grid.low_bits)
    wholes = [grid.whole(max(-2.0, min(2.0, value)) * exact, 2.0) for value in found]
    assert told.tolist() == [word for whole in (*wholes, one) for word in grid.split(whole)]


@given(st.integers(1, 200))
def test_the_largest_sum_of_a_whole_cohort_fits_the_ring(cohort: int) -> None:
    """Every site at the clip with full weight: one step more for each would wrap."""
    grid = Grid(cohort, (Part("delta", 2, 1.0), Part("metrics", 2, 1.0, fine=True)))
    ends = np.array([1.0, -1.0], np.float32)
    one = np.concatenate([*mask(Vector(grid, {"delta": ends, "metrics": ends}, 1.0), grid, [], 1)])
    total = Total(grid)
    for _ in range(cohort):
        total.add(one, 1)
    out = np.empty(2)
    total.mean_into("delta", out, 1)
    assert out.tolist() == pytest.approx([1.0, -1.0])
    assert total.mean("metrics").tolist() == pytest.approx([1.0, -1.0])
    assert total.weight == cohort


def test_what_is_beyond_the_clip_is_clipped() -> None:
    grid = Grid(3, (Part("delta", 4, 0.5), Part("metrics", 2, 1.0, fine=True)))
    values = {"delta": np.array([9, -9, 0.25, 0.5]), "metrics": np.array([9.0, -9.0])}
    total = Total(grid)
    total.add(np.concatenate([*mask(Vector(grid, values, 1.0), grid, [], 1)]), 1)
    out = np.empty(4)
    total.mean_into("delta", out, 1)
    assert out.tolist() == pytest.approx([0.5, -0.5, 0.25, 0.5])
    assert total.mean("metrics").tolist() == pytest.approx([1.0, -1.0])


@given(st.lists(st.lists(st.integers(-(2**45), 2**45), min_size=3, max_size=3), min_size=1))
def test_whole_numbers_add_up_as_they_are_modulo_the_ring(rows: list[list[int]]) -> None:
    """No weight and no clip touches them, so a sum tells nothing of how it came about."""
    grid = Grid(len(rows), (Part("noised", 3, 1.0, whole=True),))
    total = Total(grid)
    for number, row in enumerate(rows, 1):
        vector = Vector(grid, {"noised": np.array(row, np.float64)}, number / len(rows))
        total.add(np.concatenate([*mask(vector, grid, [], 1)]), 1)
    out = np.empty(3)
    total.mean_into("noised", out, 1)
    wanted = [(sum(column) + 2**31) % 2**32 - 2**31 for column in zip(*rows, strict=True)]
    assert np.rint(out * total.weight).astype(np.int64).tolist() == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["delta", "metrics"])
def test_what_is_not_finite_is_refused(bad: float, part: str) -> None:
    grid = Grid(3, (Part("delta", 4, 0.5), Part("metrics", 2, 1.0, fine=True)))
    values = numbers(grid)
    values[part][1] = bad
    with pytest.raises(MalformedUpdate, match=f"holds {bad}"):
        [*mask(Vector(grid, values, 1.0), grid, [], 1)]


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, np.nan])
def test_a_weight_beyond_the_cap_is_refused(weight: float) -> None:
    with pytest.raises(MalformedUpdate, match="must be above 0 and at most 1"):
        words(LONG, weight)


def test_parts_that_do_not_fit_are_refused() -> None:
    grid = Grid(3, (Part("delta", 4, 0.5),))
    with pytest.raises(MalformedUpdate, match=r"parts \['other'\], expected \['delta'\]"):
        Vector(grid, {"other": np.zeros(4)}, 1.0)
    with pytest.raises(MalformedUpdate, match=r"part 'delta': float64 \(3,\), expected \(4,\)"):
        Vector(grid, {"delta": np.zeros(3)}, 1.0)
    with pytest.raises(MalformedUpdate, match="a masked vector of"):
        Total(grid).add(np.zeros(3, np.uint32))
    with pytest.raises(ConfigError, match="named twice"):
        Grid(3, (Part("delta", 4, 0.5), Part("delta", 4, 0.5)))


def test_a_sum_without_weight_has_no_mean() -> None:
    with pytest.raises(RoundFailed, match="the sum of weights is 0"):
        Total(LONG).weight  # noqa: B018


def test_the_same_numbers_give_the_same_words() -> None:
    assert np.array_equal(words(LONG), words(LONG))
