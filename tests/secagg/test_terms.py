"""Terms that contradict themselves cannot be built, and each field is in the context."""

from __future__ import annotations

import pytest

from fedml.errors import ConfigError, Refused, Untrusted
from fedml.protocol.messages import RunId, SiteId
from fedml.secagg import Demands, Member, Part, Roster, least_threshold
from tests.secagg.worlds import PARTS, World

WORLD = World(5)


@pytest.mark.parametrize(
    "change",
    [
        {"run": RunId("run-2")},
        {"round": 4},
        {"attempt": 2},
        {"model": "cd" * 32},
        {"roster": bytes(32)},
        {"cohort": WORLD.sites[:4]},
        {"threshold": 4},
        {"parts": (Part("delta", 1003, 0.25), PARTS[1])},
        {"parts": (Part("delta", 1004, 0.5), PARTS[1])},
        {"parts": (PARTS[0], Part("metrics", 2, 100.0))},
        {"parts": (Part("delta", 1003, 1.0, whole=True), PARTS[1])},
        {"parts": PARTS[:1]},
        {"weight_cap": 50.0},
        {"kind": "evaluate"},
        {"settings": "privacy: record"},
    ],
    ids=str,
)
def test_every_field_is_in_the_context(change: dict[str, object]) -> None:
    assert WORLD.terms(**change).context != WORLD.terms().context


def test_whether_numbers_are_whole_is_in_the_context() -> None:
    one, other = (Part("delta", 3, 1.0, whole=whole) for whole in (False, True))
    assert WORLD.terms(parts=(one,)).context != WORLD.terms(parts=(other,)).context


def test_the_order_of_a_cohort_is_not() -> None:
    assert WORLD.terms(cohort=WORLD.sites[::-1]).context == WORLD.terms().context


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cohort": WORLD.sites[:2]}, "2 sites: a sum hides nobody below 3"),
        ({"cohort": (*WORLD.sites, WORLD.sites[0])}, "a site is in the cohort twice"),
        ({"threshold": 2}, "threshold 2 of 5 sites: use 3 to 5"),
        ({"threshold": 6}, "threshold 6 of 5 sites: use 3 to 5"),
        ({"round": 0}, "all must be positive"),
        ({"weight_cap": 0.0}, "all must be positive"),
        ({"model": "xy"}, "is no SHA-256"),
    ],
    ids=str,
)
def test_terms_that_cannot_be_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        WORLD.terms(**change)


def test_the_threshold_grows_with_those_that_collude() -> None:
    """Source: n 3, 5, 10 and 100, of which none or a third collude."""
    honest = [least_threshold(n) for n in (3, 4, 5, 10, 100)]
    assert honest == [3, 3, 3, 6, 51]
    assert [least_threshold(n, c) for n, c in ((5, 1), (10, 3), (100, 33))] == [4, 7, 67]


@pytest.mark.parametrize("cohort", range(3, 40))
def test_two_lists_of_survivors_have_more_in_common_than_can_collude(cohort: int) -> None:
    for colluders in range(cohort // 3 + 1):
        threshold = least_threshold(cohort, colluders)
        assert 2 * threshold - cohort > colluders


def test_a_site_s_policy_on_cohort_and_threshold_holds() -> None:
    site = WORLD.sites[0]
    with pytest.raises(Refused, match="cohort of 5 sites: this site's policy wants 6"):
        WORLD.site(site, demands=Demands(cohort=6))
    with pytest.raises(Refused, match="which assumes 2 that collude, wants 4"):
        WORLD.site(site, demands=Demands(colluders=2))
    WORLD.site(site, WORLD.terms(threshold=4), Demands(5, 2))


def test_a_site_outside_the_cohort_takes_no_part() -> None:
    with pytest.raises(Untrusted, match="site-04 is not in the cohort"):
        WORLD.site(WORLD.sites[4], WORLD.terms(cohort=WORLD.sites[:4]))


def test_a_roster_names_and_keys_each_site_once() -> None:
    one, two = WORLD.roster.members[:2]
    with pytest.raises(ConfigError, match="a site is on it twice"):
        Roster((one, Member(one.site, two.key)))
    with pytest.raises(ConfigError, match="two sites have the same identity key"):
        Roster((one, Member(SiteId("other"), one.key)))


def test_a_roster_s_digest_is_of_its_names_and_keys() -> None:
    one, two = WORLD.roster.members[:2]
    digest = Roster((one, two)).digest
    assert Roster((two, one)).digest == digest
    assert Roster((one, Member(SiteId("other"), two.key))).digest != digest
    assert Roster((one, Member(two.site, bytes(32)))).digest != digest
