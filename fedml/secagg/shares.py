"""Shamir's secret sharing: any `threshold` shares give the secret back, fewer tell nothing.

Source: Shamir 1979, "How to share a secret", over the first prime above 2^256.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from fedml.errors import Untrusted

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes

Below = Callable[[int], int]  # a uniform number from 0 to below its argument


def split(
    secret: bytes, threshold: int, holders: Sequence[int], below: Below = secrets.randbelow
) -> dict[int, bytes]:
    """Return one share of the 32 bytes `secret` for each of `holders`, distinct numbers above 0."""
    assert len(secret) == SECRET and 1 <= threshold <= len(holders), "not for us to share"
    assert min(holders) > 0 and len(set(holders)) == len(holders), "place 0 is the secret"
    curve = [int.from_bytes(secret, "big"), *(below(PRIME) for _ in range(threshold - 1))]
    return {holder: _value(curve, holder).to_bytes(SHARE, "big") for holder in holders}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that `shares`, one for each holder and at least the threshold, tell.

    Too few or wrong shares give another secret, or `Untrusted`: hold it against a commitment.
    """
    holders = tuple(sorted(shares))
    total = sum(
        int.from_bytes(shares[holder], "big") * factor
        for holder, factor in zip(holders, _factors(holders), strict=True)
    )
    secret = total % PRIME
    if secret >= 2**256:
        raise Untrusted("shares do not belong together: what they give is no secret of 256 bits")
    return secret.to_bytes(SECRET, "big")


def _value(curve: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(curve):
        value = (value * place + coefficient) % PRIME
    return value


@lru_cache(maxsize=64)
def _factors(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's factors at 0: the same for all secrets that the same holders share."""
    factors = []
    for mine in holders:
        above = below = 1
        for other in holders:
            if other != mine:
                above = above * other % PRIME
                below = below * (other - mine) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(factors)
