"""Any threshold of shares gives the secret back; fewer tell nothing."""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import Untrusted
from fedml.secagg.shares import PRIME, combine, split

SECRETS = st.binary(min_size=32, max_size=32)


@given(SECRETS, st.integers(1, 8), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(
    secret: bytes, count: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, threshold, range(1, count + 1))
    for holders in combinations(shares, threshold):
        assert combine({holder: shares[holder] for holder in holders}) == secret
    assert combine(shares) == secret


@given(SECRETS, SECRETS)
def test_fewer_shares_fit_every_secret_alike(one: bytes, other: bytes) -> None:
    """For any two secrets there are curves through the same threshold - 1 shares."""
    draws = [5, 7]
    shares = split(one, 3, [1, 2, 3], lambda _: draws.pop())
    held = {1: int.from_bytes(shares[1], "big"), 2: int.from_bytes(shares[2], "big")}
    # the curve s + a x + b x^2 through both and the other secret at 0
    secret = int.from_bytes(other, "big")
    half = pow(2, -1, PRIME)
    b = (held[2] - 2 * held[1] + secret) * half % PRIME
    a = (held[1] - secret - b) % PRIME
    draws = [b, a]
    again = split(other, 3, [1, 2, 3], lambda _: draws.pop())
    assert (again[1], again[2]) == (shares[1], shares[2])


def test_shares_are_drawn_afresh() -> None:
    assert split(bytes(32), 2, [1, 2]) != split(bytes(32), 2, [1, 2])


@given(SECRETS)
def test_a_wrong_share_gives_another_secret_or_is_noticed(secret: bytes) -> None:
    shares = split(secret, 2, [1, 2, 3])
    wrong = {1: shares[1], 2: bytes([shares[2][0], *shares[2][1:-1], shares[2][-1] ^ 1])}
    with suppress(Untrusted):
        assert combine(wrong) != secret


def test_what_is_no_secret_is_refused() -> None:
    with pytest.raises(Untrusted, match="no secret of 256 bits"):
        combine({1: (2**256 + 5).to_bytes(33, "big")})
