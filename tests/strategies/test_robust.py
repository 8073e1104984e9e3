"""Robust rules follow their papers' formulas, and a minority does not lead them astray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies import Aggregate, Reducer, build, describe
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.robust import (
    Bulyan,
    CentredClipping,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    Robust,
    TrimmedMean,
    cohort,
    gram,
)
from fedml.strategies.robust.cohort import Matrix, Vector

X = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
HUGE_CLIP = 1e6  # as good as none


def updates(rows: Matrix, weights: Vector | None = None) -> list[Update]:
    """One update a row, of two tensors of different dtype's worth of float64."""
    found = []
    for k, row in enumerate(rows):
        delta = Params({"w": torch.tensor(row[1:]), "v": torch.tensor(row[:1])})
        weight = 1.0 if weights is None else float(weights[k])
        found.append(Update(TaskId(f"t{k:02}"), 1, SiteId(f"s{k:02}"), delta, weight))
    return found


def reduced(reducer: Reducer, some: list[Update]) -> Aggregate:
    reduction = reducer.start()
    for one in some:
        reduction.add(one)
    assert reduction.result() is reduction.result()
    return reduction.result()


def point(reducer: Reducer, rows: Matrix, weights: Vector | None = None) -> Vector:
    delta = reduced(reducer, updates(rows, weights)).delta
    return np.concatenate([delta["v"].numpy(), delta["w"].numpy()])


def spread(n: int, d: int = 40, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(0.3, 1.0, (n, d))


# --- byzfl's own unit tests ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "wanted"),
    [
        (Median(), [4, 5, 6]),
        (TrimmedMean(f=1), [4, 5, 6]),
        (CentredClipping(tau=100.0, iterations=1), [4, 5, 6]),
        (GeometricMedian(nu=0.1, iterations=3), [3.78788764, 4.78788764, 5.78788764]),
    ],
    ids=repr,
)
def test_byzfl_says_the_same_of_its_vectors(reducer: Reducer, wanted: list[float]) -> None:
    np.testing.assert_allclose(point(reducer, X), wanted, atol=1e-8)


def test_byzfl_says_the_same_of_nearest_neighbour_mixing_arc_and_krum() -> None:
    mixed = [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]]
    np.testing.assert_allclose(gram.nnm(X @ X.T, 1) @ X, mixed, atol=1e-12)
    clipped = [*X[:2], [4.41004009, 5.04004582, 5.67005155]]
    np.testing.assert_allclose(gram.arc(X @ X.T, 1) @ X, clipped, atol=1e-8)
    assert int(np.argmin(gram.krum(X @ X.T, 1))) == 0


# --- the papers' formulas, straight from the vectors ---------------------------------------------


def krum_scores(x: Matrix, f: int) -> Vector:
    near = [
        sorted(np.sum((a - b) ** 2) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)
    ]
    return np.array([sum(row[: max(1, len(x) - f - 2)]) for row in near])


def around(x: Matrix, keep: int) -> Vector:
    found = []
    for column in x.T:
        nearest = sorted(column, key=lambda value: (abs(value - np.median(column)), value))
        found.append(np.mean(nearest[:keep]))
    return np.array(found)


def multi_krum(x: Matrix, f: int) -> Vector:
    best = np.argsort(krum_scores(x, f))[: len(x) - f]
    return np.asarray(x[best].mean(0))


def bulyan(x: Matrix, f: int) -> Vector:
    left, chosen = list(x), list[Vector]()
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(int(np.argmin(krum_scores(np.array(left), f)))))
    return around(np.array(chosen), len(x) - 4 * f)


def weiszfeld(x: Matrix, f: int) -> Vector:
    z = np.zeros(x.shape[1])
    for _ in range(100):
        pull = 1 / np.maximum(1e-6, np.linalg.norm(x - z, axis=1))
        z = pull @ x / pull.sum()
    return np.asarray(z)


def centred(x: Matrix, f: int) -> Vector:
    v = np.zeros(x.shape[1])
    for _ in range(5):
        far = np.linalg.norm(x - v, axis=1)
        v = v + np.mean((x - v) * np.minimum(1, np.median(far) / far)[:, None], axis=0)
    return np.asarray(v)


FORMULAS: list[tuple[Callable[..., Reducer], Callable[[Matrix, int], Vector]]] = [
    (Median, lambda x, f: np.median(x, axis=0)),
    (TrimmedMean, lambda x, f: np.sort(x, axis=0)[f : len(x) - f].mean(0)),
    (MeanAroundMedian, lambda x, f: around(x, len(x) - f)),
    (Krum, lambda x, f: x[np.argmin(krum_scores(x, f))]),
    (MultiKrum, multi_krum),
    (Bulyan, bulyan),
    (GeometricMedian, weiszfeld),
    (CentredClipping, centred),
]


def mixed(x: Matrix, f: int) -> Matrix:
    nearest = [np.argsort(np.linalg.norm(x - a, axis=1), kind="stable")[: len(x) - f] for a in x]
    return np.array([x[rows].mean(0) for rows in nearest])


def arc(x: Matrix, f: int) -> Matrix:
    n, norms = len(x), np.linalg.norm(x, axis=1)
    limit = np.sort(norms)[::-1][math.floor(2 * f / n * (n - f))]
    return np.asarray(x * np.minimum(1, limit / norms)[:, None])


@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (12, 2)])
@pytest.mark.parametrize(
    ("rule", "formula"), FORMULAS, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_rule_is_its_paper_s_formula(
    rule: Callable[..., Reducer], formula: Callable[[Matrix, int], Vector], n: int, f: int
) -> None:
    x = spread(n)
    x[:f] = 5 * x[:f] + 3
    steps: dict[tuple[gram.Step, ...], Matrix] = {(): x, ("arc",): arc(x, f)}
    if rule is not Bulyan:  # of equal mixtures it may choose either
        steps |= {("arc", "nnm"): mixed(arc(x, f), f), ("nnm", "arc"): arc(mixed(x, f), f)}
    for before, after in steps.items():
        got = point(rule(f=f, before=before, clip=HUGE_CLIP), x)
        np.testing.assert_allclose(got, formula(after, f), rtol=1e-7, atol=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=5, max_size=9), st.integers(0, 2))
@settings(max_examples=200)
def test_the_mean_around_the_median_decides_ties_for_the_smaller(column: list[int], f: int) -> None:
    x = np.array([[float(v), 1.0] for v in column])
    got = point(MeanAroundMedian(f=f, clip=HUGE_CLIP), x)
    np.testing.assert_allclose(got, around(x, len(x) - f), atol=1e-12)


def test_the_default_is_arc_then_nearest_neighbour_mixing_then_the_trimmed_mean() -> None:
    x = spread(10)
    x[:2] *= 50
    expected = np.sort(mixed(arc(x, 2), 2), axis=0)[2:8].mean(0)
    np.testing.assert_allclose(point(Robust(f=2, clip=HUGE_CLIP), x), expected, rtol=1e-9)


# --- invariants ----------------------------------------------------------------------------------


def all_rules(f: int = 1) -> list[Reducer]:
    return [*(rule(f=f, clip=HUGE_CLIP) for rule, _ in FORMULAS), Robust(f=f, clip=HUGE_CLIP)]


@pytest.mark.parametrize("before", [(), ("arc",), ("nnm",), ("arc", "nnm")])
def test_without_liars_the_trimmed_mean_is_the_mean(before: tuple[gram.Step, ...]) -> None:
    x = spread(6)
    got = point(TrimmedMean(f=0, before=before, clip=HUGE_CLIP), x)
    np.testing.assert_allclose(got, x.mean(0), atol=1e-12)


def test_without_liars_arc_changes_nothing_and_mixing_makes_each_the_mean() -> None:
    x = spread(6)
    assert np.array_equal(gram.arc(x @ x.T, 0), np.eye(6))
    np.testing.assert_allclose(gram.nnm(x @ x.T, 0) @ x, np.tile(x.mean(0), (6, 1)), atol=1e-12)


@pytest.mark.parametrize("reducer", all_rules(), ids=repr)
def test_twice_as_long_updates_have_an_aggregate_twice_as_long(reducer: Reducer) -> None:
    x = spread(8)
    np.testing.assert_allclose(point(reducer, 4 * x), 4 * point(reducer, x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [Median, TrimmedMean, MeanAroundMedian, Krum, MultiKrum, Bulyan])
@pytest.mark.parametrize("before", [(), ("nnm",)])
def test_a_common_shift_shifts_the_aggregate(
    rule: Callable[..., Reducer], before: tuple[gram.Step, ...]
) -> None:
    x, shift, reducer = spread(8), spread(1, seed=9)[0], rule(before=before, clip=HUGE_CLIP)
    np.testing.assert_allclose(point(reducer, x + shift), point(reducer, x) + shift, atol=1e-9)


@given(st.permutations(range(8)))
@settings(max_examples=15)
def test_any_order_of_arrival_gives_the_same_bits(order: list[int]) -> None:
    x = spread(8)
    x[3] = x[5]  # a tie
    some = updates(x)
    for reducer in all_rules():
        one, other = (reduced(reducer, list(each)) for each in (some, [some[k] for k in order]))
        assert one.delta.digest() == other.delta.digest()
        assert one.damped == other.damped


@pytest.mark.parametrize("reducer", all_rules(), ids=repr)
def test_windows_cover_every_element(reducer: Reducer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = spread(9)
    whole = point(reducer, x)
    monkeypatch.setattr(cohort, "_ELEMENTS", 9 * 7)
    np.testing.assert_allclose(point(reducer, x), whole, rtol=1e-9)


def test_slots_are_part_of_the_vector() -> None:
    """Who sends a sound delta with a wild slot is as far away as who does the reverse."""
    x = spread(6, d=6)
    x[2, 3:] = 40.0
    some = []
    for k, row in enumerate(x):
        delta, slot = Params({"w": torch.tensor(row[:3])}), Params({"w": torch.tensor(row[3:])})
        some.append(Update(TaskId(f"t{k}"), 1, SiteId(f"s{k}"), delta, 1.0, {"control": slot}))
    total = reduced(MultiKrum(clip=HUGE_CLIP), some)
    wanted = multi_krum(x, 1)
    np.testing.assert_allclose(total.delta["w"].numpy(), wanted[:3], rtol=1e-9)
    np.testing.assert_allclose(total.slots["control"]["w"].numpy(), wanted[3:], rtol=1e-9)
    np.testing.assert_allclose(wanted, np.delete(x, 2, axis=0).mean(0))


# --- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [replace(one, clip=10.0) for one in all_rules(2)], ids=repr)  # type: ignore[type-var]
@pytest.mark.parametrize("lie", [1e3, 1e30, -1e99])
def test_attack_huge_updates_move_the_aggregate_no_further_than_the_honest_lie(
    reducer: Reducer, lie: float
) -> None:
    x = spread(12)
    honest = x[2:].copy()
    x[:2] = lie
    got, centre = point(reducer, x), honest.mean(0)
    reach = np.linalg.norm(honest - centre, axis=1).max()
    assert np.linalg.norm(got - centre) < reach
    damped = reduced(reducer, updates(x)).damped
    assert {"s00", "s01"} <= damped.keys()


@pytest.mark.parametrize("reducer", all_rules(), ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e101])
def test_attack_numbers_that_are_none_are_refused_and_leave_the_cohort_alone(
    reducer: Reducer, bad: float
) -> None:
    x, wild = spread(8), spread(1)
    wild[0, 3] = bad
    reduction = reducer.start()
    [other] = updates(wild)
    for one in updates(x)[:4]:
        reduction.add(one)
    with pytest.raises(MalformedUpdate, match="robust rules hold 1e\\+100; training diverged"):
        reduction.add(replace(other, site=SiteId("x")))
    for one in updates(x)[4:]:
        reduction.add(one)
    assert reduction.result().delta == reduced(reducer, updates(x)).delta


def test_attack_a_claimed_weight_buys_nothing() -> None:
    x, weights = spread(8), np.ones(8)
    weights[0] = 1e12
    for reducer in all_rules():
        assert point(reducer, x).tobytes() == point(reducer, x, weights).tobytes()


def test_the_geometric_median_weighs_distances_if_told_to() -> None:
    x, weights = spread(5), np.array([1.0, 1.0, 1.0, 1.0, 9.0])
    rule = GeometricMedian(by_weight=True, clip=HUGE_CLIP)
    np.testing.assert_allclose(point(rule, x, weights), x[4], atol=1e-4)
    assert reduced(rule, updates(x, weights)).damped.keys() == {"s00", "s01", "s02", "s03"}


def test_norms_are_clipped_to_a_multiple_of_their_median_always() -> None:
    x = np.tile(np.array([[3.0, 4.0]]), (5, 1))
    x[4] *= 100
    np.testing.assert_allclose(point(TrimmedMean(f=0, clip=2.0), x), [3.6, 4.8])
    assert reduced(TrimmedMean(f=0, clip=2.0), updates(x)).damped == {
        "s04": "2% of an even share: its norm 500 was clipped to 10"
    }


def test_where_most_send_zeros_nothing_is_clipped() -> None:
    x = np.zeros((5, 2))
    x[4] = 5.0
    np.testing.assert_allclose(point(TrimmedMean(f=0), x), [1.0, 1.0])
    for reducer in all_rules():
        assert np.isfinite(point(reducer, np.zeros((8, 3)))).all()


# --- what else an aggregate has ------------------------------------------------------------------


def test_who_counts_for_little_is_named_with_the_reason() -> None:
    x = spread(8, d=400)
    x[2] += 6.0
    for reducer in (TrimmedMean(), MeanAroundMedian(), MultiKrum(), Median()):
        [(site, why)] = reduced(reducer, updates(x)).damped.items()
        assert site == "s02"
        assert "of an even share: it differs from the others" in why
    assert len(reduced(Bulyan(), updates(x)).damped.keys() - {"s02"}) == 1  # it leaves 2f out
    assert len(reduced(Krum(), updates(x)).damped) == 7
    x[2] *= 100
    assert "its norm 1" in reduced(GeometricMedian(), updates(x)).damped["s02"]


def test_of_three_the_one_in_the_middle_is_told_from_the_others() -> None:
    x = np.array([[1.0, 1.0, 9.0], [2.0, 2.0, 9.0], [3.0, 3.0, 9.0]])  # the last says nothing
    damped = reduced(Median(f=1), updates(x)).damped
    assert damped.keys() == {"s00", "s02"}
    assert damped["s00"].startswith("0% of an even share")


def test_counters_are_a_site_s_own_and_never_the_furthest_one_s() -> None:
    some = []
    for k, (steps, flag) in enumerate([(3, True), (5, True), (2**62, False), (4, True)]):
        tensors = {"w": torch.zeros(2), "n": torch.tensor([steps]), "b": torch.tensor([flag])}
        some.append(Update(TaskId("t"), 1, SiteId(f"s{k}"), Params(tensors), 1.0))
    delta = reduced(Median(), some).delta
    assert delta["n"].tolist() == [4]
    assert delta["b"].tolist() == [True]


def test_metrics_are_medians() -> None:
    losses = [1.0, 3.0, 1e200, math.nan]
    some = [
        replace(u, metrics={"loss": m}) for u, m in zip(updates(spread(4)), losses, strict=True)
    ]
    assert reduced(Median(), some).metrics == {"loss": 3.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_keeps_its_dtype(dtype: torch.dtype) -> None:
    some = []
    for k in range(7):
        delta = Params({"w": torch.tensor([k / 2, -1.0], dtype=dtype)})
        some.append(Update(TaskId("t"), 1, SiteId(f"s{k}"), delta, 1.0))
    for rule in (Median(), TrimmedMean(), MeanAroundMedian()):
        got = reduced(rule, some).delta["w"]
        assert got.dtype == dtype
        assert got[0] == 1.5 or isinstance(rule, MeanAroundMedian)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "least"),
    [(Median(f=2), 5), (Krum(f=2), 7), (MultiKrum(f=1), 5), (Bulyan(f=1), 7), (Robust(f=3), 7)],
    ids=repr,
)
def test_too_few_updates_for_its_liars_have_no_aggregate(reducer: Reducer, least: int) -> None:
    assert reducer.least == least
    reduced(reducer, updates(spread(least)))
    with pytest.raises(MalformedUpdate, match=f"{least - 1} updates, .* needs {least}; raise coh"):
        reduced(reducer, updates(spread(least - 1)))


def test_a_site_counts_once() -> None:
    [one, *_] = updates(spread(3))
    reduction = Median().start()
    reduction.add(one)
    with pytest.raises(MalformedUpdate, match="s00 has an update in this round already"):
        reduction.add(one)


def test_updates_of_other_shapes_or_slots_are_refused() -> None:
    [one, two, three] = updates(spread(3))
    reduction = Median().start()
    reduction.add(one)
    with pytest.raises(MalformedUpdate, match="layout differs"):
        reduction.add(replace(two, delta=Params({"w": torch.zeros(3)})))
    with pytest.raises(MalformedUpdate, match=r"slots \['control'\]"):
        reduction.add(replace(three, slots={"control": three.delta}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Median(f=-1), "Median.f -1"),
        (lambda: Krum(clip=0.0), "Krum.clip 0.0"),
        (lambda: Bulyan(before=("mda",)), "Bulyan.before 'mda': use some of arc, nnm"),  # type: ignore[arg-type]
        (lambda: Median(before=("nnm", "nnm")), "list each step once"),
        (lambda: GeometricMedian(nu=0.0), "GeometricMedian.nu 0.0"),
        (lambda: GeometricMedian(iterations=0), "GeometricMedian.iterations 0"),
        (lambda: CentredClipping(tau=-1.0), "CentredClipping.tau -1.0"),
        (lambda: CentredClipping(iterations=5000), "CentredClipping.iterations 5000"),
        (lambda: Robust(f=-2), "TrimmedMean.f -2"),
    ],
)
def test_a_bad_setting_is_refused_at_birth(make: Callable[[], Reducer], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_rule_travels_with_its_settings() -> None:
    strategy = FedAvg(reducer=GeometricMedian(f=2, before=("arc", "nnm"), nu=0.5))
    record = describe(strategy)
    assert record["reducer"] == {
        "name": "geometric-median", "f": 2, "before": ["arc", "nnm"], "clip": 10.0, "nu": 0.5,
        "iterations": 100, "by_weight": False,
    }  # fmt: skip
    assert build(record) == strategy
    with pytest.raises(ConfigError, match=r"before\[0\] 'mda': use one of"):
        build({"name": "fedavg", "reducer": {"name": "krum", "before": ["mda"]}})
