"""What is said of a wrong clock: no more than can be known, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml.identity.certificates import DAY, Authority, new_key_and_csr
from fedml.identity.clocks import Clock, complaint, difference, is_issued_by

T = 1_800_000_000.0
HOUR = 3600.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca"), T)


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> bytes:
    return authority.issue(new_key_and_csr("bern")[1], "bern", "site", T, days=30)


@pytest.mark.parametrize(
    ("now", "ahead", "line"),
    [
        (T, 0.0, ""),
        (T - 200, 0.0, ""),  # back-dated, for clocks that go a little slow
        (T + 5 * HOUR, 5 * HOUR, ""),  # wrong, and the certificate holds all the same
        (
            T - 5 * HOUR,
            0.0,
            "this machine's clock is at least 5 h 0 min slow: it says 2027-01-15 03:00 UTC, and "
            "the certificate of site bern was issued after that; set the clock",
        ),
        (
            T - 5 * HOUR,
            -7 * HOUR,
            "this machine's clock is 7 h 0 min behind the coordinator's; set it: by it the "
            "certificate of site bern is out of its time",
        ),
        (
            T + 33 * DAY,
            0.0,
            "the certificate of site bern expired 3 days ago, if this machine's clock is right, "
            "which says 2027-02-17 08:00 UTC: set the clock, or join with a new token",
        ),
        (
            T + 33 * DAY,
            4 * DAY,
            "this machine's clock is 4 days ahead of the coordinator's; set it: by it the "
            "certificate of site bern is out of its time",
        ),
    ],
)
def test_the_line_says_what_can_be_known(
    certificate: bytes, now: float, ahead: float, line: str
) -> None:
    cure = "join with a new token"
    assert complaint("site bern", certificate, now, ahead, cure) == line


@pytest.mark.parametrize(
    ("ahead", "line"),
    [
        (59.0, ""),
        (-59.0, ""),
        (61.0, "this machine's clock is 1 min ahead of the coordinator's; set it"),
        (-100 * HOUR, "this machine's clock is 4 days behind the coordinator's; set it"),
    ],
)
def test_a_difference_that_may_be_the_line_s_is_none(ahead: float, line: str) -> None:
    assert difference(ahead) == line


def test_the_coordinator_s_time_goes_on_by_a_clock_that_nobody_sets() -> None:
    clock = Clock()
    assert (clock.ahead(T, 7.0), clock.now(T, 7.0)) == (0.0, T)
    clock.hear(0.0, 7.0)  # of a version that does not tell
    assert clock.now(T, 7.0) == T
    clock.hear(T, 7.0)
    assert clock.ahead(T + 2, 9.0) == 0.0
    assert clock.ahead(T + HOUR, 9.0) == HOUR - 2  # set since
    assert clock.now(T + HOUR, 9.0) == T + 2


def test_only_what_the_authority_issued_says_anything_of_a_clock(
    authority: Authority, certificate: bytes, tmp_path: Path
) -> None:
    stranger = Authority.create(tmp_path, T)
    assert is_issued_by(certificate, authority.certificate)
    assert not is_issued_by(certificate, stranger.certificate)
    assert not is_issued_by(b"garbage", authority.certificate)
