"""FLTrust follows its paper's algorithm, and no number of liars turns it against its root."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError, Contradiction, MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.rounds import Cohort
from fedml.rounds.compatibility import trial
from fedml.strategies import FedAvg, build, describe
from fedml.strategies.robust import FLTrust
from fedml.strategies.robust.cohort import Matrix, Vector
from tests.strategies.test_robust import point, reduced, spread, updates

RULE = FLTrust(root="s03")


def formula(x: Matrix, root: int) -> Vector:
    """Algorithm 2 of the paper, a client at a time."""
    g0, total, trust_sum = x[root], np.zeros(x.shape[1]), 0.0
    for k, g in enumerate(x):
        if k == root:
            continue
        cosine = np.dot(g, g0) / np.linalg.norm(g) / np.linalg.norm(g0)
        trust = max(cosine, 0.0)
        trust_sum += trust
        total += trust * np.linalg.norm(g0) / np.linalg.norm(g) * g
    return np.asarray(total / trust_sum)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_paper_s_formula(seed: int) -> None:
    x = spread(8, seed=seed)
    x[0] *= -30
    x[5] *= 1e-3
    np.testing.assert_allclose(point(RULE, x), formula(x, 3), rtol=1e-12)


def test_its_answer_for_four_updates_in_the_plane() -> None:
    x = np.array([[4.0, 4.0], [0.0, 9.0], [-7.0, 0.0], [2.0, 0.0]])  # cosines 1/√2, 0, -1
    np.testing.assert_allclose(point(RULE, x), [np.sqrt(2), np.sqrt(2)], rtol=1e-12)
    damped = reduced(RULE, updates(x)).damped
    assert damped.keys() == {"s01", "s02"}
    assert damped["s02"] == "0% of an even share: trust 0.00, by its angle to s03"


def test_attack_a_majority_that_lies_does_not_turn_the_root_s_direction() -> None:
    x = spread(10)
    x[4:] = -1e6 * x[3]  # six of ten
    x[:3] = x[3] + 0.1 * spread(3, seed=1)
    got = point(RULE, x)
    assert got @ x[3] > 0.9 * np.linalg.norm(got) * np.linalg.norm(x[3])
    assert np.linalg.norm(got) <= np.linalg.norm(x[3]) * (1 + 1e-12)
    assert {f"s{k:02}" for k in range(4, 10)} == reduced(RULE, updates(x)).damped.keys()


def test_attack_counters_are_the_root_s_own() -> None:
    some = []
    for one, steps in zip(updates(spread(4)), (2**60, 2**60, 2**60, 7), strict=True):
        counted = Params({**one.delta, "n": torch.tensor(steps)})
        some.append(replace(one, delta=counted))
    assert int(reduced(RULE, some).delta["n"]) == 7


def test_attack_a_claimed_weight_buys_nothing() -> None:
    x, weights = spread(8), np.ones(8)
    weights[0] = 1e12
    assert point(RULE, x).tobytes() == point(RULE, x, weights).tobytes()


def test_where_nobody_points_its_way_the_root_goes_alone() -> None:
    x = np.array([[-1.0, 0.0], [0.0, 5.0], [0.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(point(RULE, x), x[3])
    x[3] = 0.0  # which says nothing
    np.testing.assert_array_equal(point(RULE, x), x[3])


def test_without_its_root_a_round_has_no_aggregate() -> None:
    some = updates(spread(4))
    with pytest.raises(MalformedUpdate, match=r"s00, s01, s02: FLTrust needs that of its root s03"):
        reduced(RULE, some[:3])
    with pytest.raises(MalformedUpdate, match=r"s03: .* and another"):
        reduced(RULE, some[3:])


def test_a_plan_that_may_leave_the_root_out_is_refused() -> None:
    plan = trial(FedAvg(reducer=FLTrust(root="clean")), "none")
    listed = (SiteId("a"), SiteId("b"), SiteId("clean"))
    replace(plan, cohort=Cohort(quorum=2, deadline=60.0, sites=listed, size=3))
    with pytest.raises(Contradiction, match=r"root clean, .* not among cohort\.sites: add it"):
        replace(plan, cohort=Cohort(quorum=2, deadline=60.0, sites=listed[:2]))
    with pytest.raises(Contradiction, match=r"cohort\.size 2: its root clean .* cohort\.size=0"):
        replace(plan, cohort=Cohort(quorum=2, deadline=60.0, sites=listed, size=2))


def test_it_travels_and_a_root_that_is_no_site_s_name_is_refused() -> None:
    strategy = FedAvg(reducer=FLTrust(root="clean"))
    assert describe(strategy)["reducer"] == {"name": "fltrust", "root": "clean"}
    assert build(describe(strategy)) == strategy
    with pytest.raises(ConfigError, match=r"FLTrust\.root: site 'Not A Name'"):
        FLTrust(root="Not A Name")
