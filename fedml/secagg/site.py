"""A site's half of a masked round; `session` has the protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableSet, Set
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedml.errors import Refused, Untrusted
from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import (
    Advert,
    Adverts,
    Boxes,
    Consent,
    Consents,
    Shares,
    Survivors,
    Unmasking,
)
from fedml.secagg import keys, session, shares
from fedml.secagg.keys import Random
from fedml.secagg.masking import Floats, Mask, Vector, Words, mask
from fedml.secagg.session import Phase
from fedml.secagg.terms import Demands, Roster, Terms


class Site:
    """A site's half. Whatever it refuses ends it: its secrets are gone, and it says no more."""

    def __init__(
        self,
        me: SiteId,
        identity: Ed25519PrivateKey,
        roster: Roster,
        terms: Terms,
        *,
        demands: Demands | None = None,
        released: MutableSet[str] | None = None,
        random: Random = os.urandom,
    ) -> None:
        """Take part under `terms`, which this site worked out itself.

        `released` has the sums for which this site has given shares, over all its sessions; it
        is added to before any are given, and must survive a crash. A second sum over the same
        updates and other sites would tell the sites' updates apart.
        """
        (demands or Demands()).check(me, roster, terms)
        self.me, self.terms, self.phase = me, terms, Phase.NEW
        self._identity, self._roster, self._random = identity, roster, random
        self._released: MutableSet[str] = set() if released is None else released
        self._check_unreleased()
        self._seed = bytearray(random(32))
        self._box_key: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(random(32))
        self._mask_key: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(random(32))
        self._public = _raw(self._box_key), _raw(self._mask_key)
        self._mask_keys: dict[SiteId, bytes] = {}  # of U1, public
        self._adverts = b""
        self._channels: dict[SiteId, bytes] = {}
        self._held: dict[SiteId, tuple[bytes, bytes]] = {}  # shares, of U2
        self._survivors: frozenset[SiteId] = frozenset()  # U3

    def advertise(self) -> Advert:
        """M0: return this round's public keys, signed."""
        with self._step(self.terms.context, (Phase.NEW,), Phase.ADVERTISED):
            context, me, public = self.terms.context, self.me, self._public
            signature = self._identity.sign(session.signed_advert(context, me, *public))
            return Advert(context, me, *public, signature)

    def share(self, message: Adverts) -> Shares:
        """M1 -> M2: check everyone's keys; return shares of this site's secrets for each other."""
        with self._step(message.context, (Phase.ADVERTISED,), Phase.SHARED):
            self._check_adverts(message.adverts)
            adverts = {advert.site: advert for advert in message.adverts}
            self._adverts = session.digest_of(adverts.values())
            self._mask_keys = {site: advert.mask_key for site, advert in adverts.items()}
            places = {site: self.terms.places[site] for site in adverts}
            assert self._box_key and self._mask_key, "a session that is over"
            seeds, mask_keys = (
                shares.split(secret, self.terms.threshold, [*places.values()], self._below)
                for secret in (bytes(self._seed), self._mask_key.private_bytes_raw())
            )
            mine = places.pop(self.me)
            self._held = {self.me: (seeds[mine], mask_keys[mine])}
            boxes = {}
            for site, place in places.items():
                key = session.box_key(
                    self._box_key, adverts[site].box_key, message.context, self._adverts
                )
                self._channels[site] = key
                about = (message.context, self.me, site)
                pair = (seeds[place], mask_keys[place])
                boxes[site] = keys.seal(key, about, pair, self._random)
            commitment = session.commitment(message.context, self.me, bytes(self._seed))
            return Shares(message.context, self.me, boxes, commitment)

    def receive(self, message: Boxes) -> None:
        """M3: keep the others' shares; the masks will be for these sites and no others."""
        with self._step(message.context, (Phase.SHARED,), Phase.BOXED):
            for site, box in message.boxes.items():
                if site not in self._channels:
                    raise Untrusted(f"a box from {site}, which advertised no keys; alarm")
                about = (message.context, site, self.me)
                self._held[site] = keys.unseal(self._channels[site], about, box)
            self._check_enough("shares", len(self._held))

    def mask(
        self, values: Mapping[str, Floats], weight: float, threads: int = 0
    ) -> Iterator[Words]:
        """M4: return this site's numbers, by part, as masked words in slices; once.

        `weight` is as large as the terms' cap at most. Raises `MalformedUpdate`, also between
        slices, at what cannot be summed.
        """
        with self._step(self.terms.context, (Phase.BOXED,), Phase.MASKED):
            vector = Vector(self.terms.grid, values, weight / self.terms.weight_cap)
            return mask(vector, self.terms.grid, self._masks(), threads)

    def consent(self, message: Survivors) -> Consent:
        """M5 -> M6: sign the list of those in the sum, and no other list ever."""
        before = (Phase.MASKED, Phase.CONSENTED)
        with self._step(message.context, before, Phase.CONSENTED):
            told = frozenset(message.sites)
            self._check_survivors(told)
            self._survivors = told
            signature = self._identity.sign(self._consent())
            return Consent(message.context, self.me, signature)

    def unmask(self, message: Consents) -> Unmasking:
        """M7 -> M8: return shares of survivors' seeds and of the others' mask keys; once."""
        with self._step(message.context, (Phase.CONSENTED,), Phase.OVER):
            self._check_consents(message.signatures)
            self._check_unreleased()
            self._released.add(self.terms.sum)
            seeds = {site: self._held[site][0] for site in sorted(self._survivors)}
            mask_keys = {site: self._held[site][1] for site in sorted(self._lost())}
            self.forget()
            return Unmasking(message.context, self.me, seeds, mask_keys)

    def forget(self) -> None:
        """Erase what this session knows: the attempt is over for this site."""
        self.phase = Phase.OVER
        self._seed[:] = bytes(len(self._seed))
        self._box_key = self._mask_key = None  # OpenSSL wipes a key that nobody holds
        self._channels.clear()
        self._held.clear()

    def _masks(self) -> list[Mask]:
        assert self._mask_key, "a session that is over"
        masks = [Mask(bytes(self._seed), 1)]
        for site in sorted(self._held.keys() - {self.me}):
            key = session.mask_key(
                self._mask_key, self._mask_keys[site], self.terms.context, self._adverts
            )
            masks.append(Mask(key, session.sign_of(self.terms, self.me, site)))
        return masks

    def _lost(self) -> Set[SiteId]:
        """Whose mask keys to tell; of the others it is the seeds, and of none both."""
        return self._held.keys() - self._survivors

    @contextmanager
    def _step(self, context: bytes, before: tuple[Phase, ...], after: Phase) -> Iterator[None]:
        try:
            if context != self.terms.context:
                raise Untrusted(
                    f"round {self.terms.round}: the message is for another run, round, attempt, "
                    "model, roster or terms; alarm"
                )
            self._check_phase(before)
            yield
        except BaseException:
            self.forget()
            raise
        self.phase = after

    def _check_phase(self, before: tuple[Phase, ...]) -> None:
        if self.phase not in before:
            raise Untrusted(
                f"round {self.terms.round}: asked for what comes after {before[0].name}, and this "
                f"site's session is {self.phase.name}; each step is taken once"
            )

    def _check_adverts(self, adverts: tuple[Advert, ...]) -> None:
        by_site = {advert.site: advert for advert in adverts}
        if len(by_site) < len(adverts):
            raise Untrusted("a site advertised keys twice; alarm")
        self._check_enough("keys", len(by_site))
        for site, advert in by_site.items():
            if site not in self.terms.places:
                raise Untrusted(f"keys of {site}, which is not in the cohort; alarm")
            self._check_advert(advert)
        mine = by_site.get(self.me)
        if mine is None or (mine.box_key, mine.mask_key) != self._public:
            raise Untrusted(f"{self.me}: this site's own keys were replaced; alarm")

    def _check_advert(self, advert: Advert) -> None:
        signed = session.signed_advert(
            self.terms.context, advert.site, advert.box_key, advert.mask_key
        )
        self._roster.verify(advert.site, advert.signature, signed)

    def _check_enough(self, what: str, number: int) -> None:
        if number < self.terms.threshold:
            raise Refused(
                f"round {self.terms.round}: {what} of {number} sites, and the sum is to be of at "
                f"least {self.terms.threshold}; nothing was revealed"
            )

    def _check_survivors(self, told: frozenset[SiteId]) -> None:
        self._check_enough("vectors", len(told))
        if not told <= self._held.keys():
            raise Untrusted(f"survivors {sorted(told - self._held.keys())} shared no keys; alarm")
        if self.me not in told:
            raise Untrusted(f"{self.me} is not among the survivors: it has nothing to unmask")
        self._check_same_survivors(told)

    def _check_same_survivors(self, told: frozenset[SiteId]) -> None:
        if self._survivors and told != self._survivors:
            raise Untrusted("a second, different list of survivors; alarm")

    def _check_consents(self, signatures: Mapping[SiteId, bytes]) -> None:
        self._check_enough("consents", len(signatures))
        if not signatures.keys() <= self._survivors:
            raise Untrusted("consents of sites that are not in the sum; alarm")
        signed = self._consent()
        for site, signature in signatures.items():
            self._roster.verify(site, signature, signed)

    def _check_unreleased(self) -> None:
        if self.terms.sum in self._released:
            raise Refused(
                f"{self.terms.sum}: this site has given shares for that sum; a second one over "
                "other sites would tell their updates apart"
            )

    def _consent(self) -> bytes:
        return session.signed_consent(
            self.terms.context, self._adverts, self._held, self._survivors
        )

    def _below(self, limit: int) -> int:
        # 16 bytes more than the limit has: what is not uniform in it is below 2^-128
        size = (limit.bit_length() + 7) // 8 + 16
        return int.from_bytes(self._random(size), "big") % limit


def _raw(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()
