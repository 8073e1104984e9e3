"""The cohort follows from seed and round, and whoever is not asked is told why."""

from __future__ import annotations

import pytest

from fedml.protocol.messages import DatasetCard, RecipeId, SiteId
from fedml.rounds import Cohort, SiteStatus, draw, eligible
from tests.rounds.worlds import RECIPE, plan, status

MANY = [status(f"site-{k}") for k in range(10)]


def cohort(size: int, number: int, seed: int = 0, statuses: list[SiteStatus] = MANY) -> set[str]:
    a_plan = plan(cohort=Cohort(quorum=1, deadline=1, size=size), seed=seed)
    chosen = draw(a_plan, number, eligible(a_plan, statuses, {}))
    known = {one.site for one in statuses}
    assert set(chosen.asked) | set(chosen.left_out) == known
    assert not set(chosen.asked) & set(chosen.left_out)
    return set(chosen.asked)


def test_the_same_round_draws_the_same_cohort_in_any_order_of_statuses() -> None:
    assert cohort(4, 1) == cohort(4, 1, statuses=MANY[::-1])


def test_rounds_and_seeds_draw_differently() -> None:
    assert len({frozenset(cohort(4, number)) for number in range(1, 9)}) > 4
    assert len({frozenset(cohort(4, 1, seed)) for seed in range(8)}) > 4


def test_every_site_has_its_turn() -> None:
    counts = [sum(f"site-{k}" in cohort(4, n) for n in range(1, 301)) for k in range(10)]
    assert all(80 <= count <= 160 for count in counts)  # 120 expected, sd 8.5


def test_a_newcomer_moves_at_most_one_site() -> None:
    before, after = cohort(4, 1), cohort(4, 1, statuses=[*MANY, status("zurich")])
    assert len(before - after) <= 1


def test_size_zero_asks_all() -> None:
    assert cohort(0, 1) == {one.site for one in MANY}


def test_those_not_drawn_hear_so() -> None:
    a_plan = plan(cohort=Cohort(quorum=1, deadline=1, size=4))
    chosen = draw(a_plan, 1, eligible(a_plan, MANY, {}))
    assert set(chosen.left_out.values()) == {"not drawn: 4 of 10 sites are asked in a round"}


ODD = RecipeId("line", "ef" * 32)
CARD = DatasetCard("points", 5, "cd" * 32)
A, B = SiteId("a"), SiteId("b")


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (SiteStatus(A, False, (RECIPE,), (CARD,)), "not connected"),
        (SiteStatus(A, True, (ODD,), (CARD,)), f"has {'ef' * 6}, the run needs line {'ab' * 6}"),
        (SiteStatus(A, True, (), (CARD,)), "does not have that recipe"),
        (SiteStatus(A, True, (RECIPE,), ()), "has no dataset named points"),
        (status("a", rows=0), "declares no rows in points"),
    ],
)
def test_an_unfit_site_hears_why(one: SiteStatus, reason: str) -> None:
    selection = eligible(plan(), [one], {})
    assert selection.asked == ()
    assert reason in selection.left_out["a"]


def test_listed_and_unlisted_sites_hear_why() -> None:
    a_plan = plan(cohort=Cohort(quorum=1, deadline=1, sites=(A, B)))
    selection = eligible(a_plan, [status("a"), status("c")], {})
    assert selection.asked == (A,)
    assert selection.left_out == {"b": "never seen", "c": "not among the plan's sites"}


def test_a_site_that_refused_for_good_is_not_asked_again() -> None:
    selection = eligible(plan(), [status("a"), status("b")], {"a": "over budget"})
    assert selection.asked == (B,)
    assert selection.left_out == {"a": "over budget"}
