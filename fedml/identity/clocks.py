"""A machine whose clock is wrong: how that is found out, and the line that says so.

The coordinator's clock is the one that counts: by it certificates are issued and refused. It
tells its time in each `Welcome`; before the first, certificates say that ours cannot be right.
"""

from __future__ import annotations

import datetime
import math

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedml.identity.certificates import SKEW

NOTABLE = 60.0  # seconds; a smaller difference may be the line's


class Clock:
    """The coordinator's time, as told; `steady` is a clock of ours that nobody sets."""

    def __init__(self) -> None:
        self._told = self._at = math.nan

    def hear(self, told: float, steady: float) -> None:
        """Take in the time that the coordinator told; 0 if it is of a version that tells none."""
        if told > 0:
            self._told, self._at = told, steady

    def now(self, ours: float, steady: float) -> float:
        """Return the coordinator's time now, or ours if it never told."""
        return ours - self.ahead(ours, steady)

    def ahead(self, ours: float, steady: float) -> float:
        """Return by how many seconds our clock is ahead of the coordinator's, 0 if unknown."""
        if math.isnan(self._told):
            return 0.0
        return ours - (self._told + steady - self._at)


def difference(ahead: float) -> str:
    """Say that our clock is off by so many seconds, and what to do; "" if it is not."""
    if abs(ahead) < NOTABLE:
        return ""
    way = "ahead of" if ahead > 0 else "behind"
    return f"this machine's clock is {_span(ahead)} {way} the coordinator's; set it"


def complaint(whose: str, certificate: bytes, now: float, ahead: float, cure: str) -> str:
    """Say why a certificate (PEM) does not hold by our clock, at `now`; "" if it does.

    One that was issued in our future proves that we are slow by so much at least. One that has
    expired proves nothing, unless we know to be `ahead` of the coordinator: it may be our clock,
    or time for the `cure`.
    """
    leaf = x509.load_pem_x509_certificate(certificate)
    start, end = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    if start <= now < end:
        return ""
    if known := difference(ahead):
        return f"{known}: by it the certificate of {whose} is out of its time"
    if now < start:
        slow = _span(start + SKEW - now)
        return (
            f"this machine's clock is at least {slow} slow: it says {_utc(now)}, and the "
            f"certificate of {whose} was issued after that; set the clock"
        )
    return (
        f"the certificate of {whose} expired {_span(now - end)} ago, if this machine's clock is "
        f"right, which says {_utc(now)}: set the clock, or {cure}"
    )


def is_issued_by(certificate: bytes, ca: bytes) -> bool:
    """True if the authority `ca` signed `certificate` (PEM both), whatever its time."""
    try:
        leaf, issuer = map(x509.load_pem_x509_certificate, (certificate, ca))
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _span(seconds: float) -> str:
    minutes = round(abs(seconds) / 60)
    hours, days = minutes // 60, minutes // 1440
    if days >= 2:
        return f"{days} days"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _utc(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
