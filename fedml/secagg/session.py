"""One attempt at a masked round: its phases, and what is signed and agreed on in them.

The two roles stand beside this file: `site.Site` and `coordinator.Coordinator`. Messages in,
messages out: no network, no clock, and randomness from the system unless it is given. Whoever
hosts a role carries the messages, and decides when a phase has been waited for.

M0 adverts -> M1 -> M2 shares -> M3 boxes -> M4 masked vectors -> M5 survivors -> M6 consents
-> M7 -> M8 unmasking. Sites may fall out at any time; while `threshold` are left the sum is that
of all whose vectors came, exactly, and otherwise the attempt is over and nobody learns anything.

Source: Bonawitz et al. CCS 2017, with signed keys and the consistency round of its section 6,
over the complete graph. What is added: everything is bound to one context (`terms.Terms`).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import Advert
from fedml.secagg.keys import agree
from fedml.secagg.terms import Terms, bind


class Phase(IntEnum):
    """What a site did last, and what the coordinator waits for until it has it."""

    NEW = 0
    ADVERTISED = 1
    SHARED = 2
    BOXED = 3
    MASKED = 4
    CONSENTED = 5
    UNMASKED = 6
    OVER = 7


def signed_advert(context: bytes, site: SiteId, box_key: bytes, mask_key: bytes) -> bytes:
    """Return what a site signs in M0."""
    return bind("advert", context, site, box_key, mask_key)


def signed_consent(
    context: bytes, adverts: bytes, boxed: Iterable[SiteId], survivors: Iterable[SiteId]
) -> bytes:
    """Return what a site signs in M6: who is in the sum, and whose masks it put on."""
    lists = (bind(*sorted(boxed)), bind(*sorted(survivors)))
    return bind("consent", context, adverts, *lists)


def digest_of(adverts: Iterable[Advert]) -> bytes:
    """Return the digest of all keys of a round, which every agreed key depends on."""
    ordered = sorted(adverts, key=lambda advert: advert.site)
    return bind("adverts", *(part for a in ordered for part in (a.site, a.box_key, a.mask_key)))


def commitment(context: bytes, site: SiteId, seed: bytes) -> bytes:
    """Return the digest that a site's own seed is held against when it is put together."""
    return bind("seed", context, site, seed)


def mask_key(private: X25519PrivateKey, other: bytes, context: bytes, adverts: bytes) -> bytes:
    """Return the key of the mask that two sites share: one adds it, the other takes it off."""
    return agree(private, other, context, b"fedml-sa1 mask" + adverts)


def box_key(private: X25519PrivateKey, other: bytes, context: bytes, adverts: bytes) -> bytes:
    """Return the key of the boxes between two sites."""
    return agree(private, other, context, b"fedml-sa1 box" + adverts)


def sign_of(terms: Terms, site: SiteId, other: SiteId) -> int:
    """Return 1 if `site` adds the mask that it shares with `other`, -1 if it takes it off."""
    return 1 if terms.places[site] > terms.places[other] else -1
