"""The coordinator's half of a masked round; `session` has the protocol.

It relays keys and boxes that it cannot open, adds masked vectors up as they come, and at the end
learns just enough to take the masks off the sum. No vector of one site is ever here unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedml.errors import MalformedMessage, QuorumLost, RoundFailed, Untrusted
from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import (
    Advert,
    Adverts,
    Boxes,
    Consent,
    Consents,
    FromSite,
    Masked,
    Shares,
    Survivors,
    ToSite,
    Unmasking,
)
from fedml.secagg import session, shares
from fedml.secagg.masking import Mask, Total, Words
from fedml.secagg.session import Phase
from fedml.secagg.terms import Roster, Terms

M = TypeVar("M", Advert, Shares, Masked, Consent, Unmasking)


class Coordinator:
    """Collects each phase's messages from those that the last one left.

    `take` what arrives while `waiting` holds its sender, `advance` when all are there or have
    been waited for, and `finish` after the last phase. Both raise `QuorumLost` when too few
    sites are left: the attempt is over then, and another one starts from new keys.
    """

    def __init__(self, roster: Roster, terms: Terms, *, threads: int = 0) -> None:
        self.terms, self.phase = terms, Phase.ADVERTISED
        self.waiting = set(terms.cohort)
        self._roster, self._threads = roster, threads
        self._adverts: dict[SiteId, Advert] = {}
        self._shares: dict[SiteId, Shares] = {}
        self._masked: dict[SiteId, Masked] = {}
        self._consents: dict[SiteId, Consent] = {}
        self._unmaskings: dict[SiteId, Unmasking] = {}
        self._digest = b""  # of all adverts
        self._signed = b""  # what consents sign
        self._total: Total | None = None

    @property
    def survivors(self) -> tuple[SiteId, ...]:
        """Whose vectors are in the sum, in order."""
        return tuple(sorted(self._masked))

    @property
    def is_hopeless(self) -> bool:
        """True if too few are left even if all that are waited for answer."""
        have: Mapping[Phase, Sized] = {
            Phase.ADVERTISED: self._adverts,
            Phase.SHARED: self._shares,
            Phase.MASKED: self._masked,
            Phase.CONSENTED: self._consents,
            Phase.UNMASKED: self._unmaskings,
        }
        return len(have.get(self.phase, {})) + len(self.waiting) < self.terms.threshold

    def take(self, message: FromSite, words: Words | None = None) -> bool:
        """Take a site's message in, a `Masked` with its words; True if it counts.

        A late or repeated one does not. Raises `Untrusted` at one that does not check out: the
        site is not waited for any longer.
        """
        if message.site not in self.waiting or self._phase_of(message) is not self.phase:
            return False
        self.waiting.discard(message.site)
        if message.context != self.terms.context:
            raise Untrusted(
                f"{message.site}: its message is for another run, round, attempt, model, roster "
                "or terms than this round's"
            )
        match message:
            case Advert():
                signed = session.signed_advert(
                    message.context, message.site, message.box_key, message.mask_key
                )
                self._roster.verify(message.site, message.signature, signed)
                self._adverts[message.site] = message
            case Shares():
                if message.boxes.keys() != self._adverts.keys() - {message.site}:
                    raise MalformedMessage(f"{message.site}: its boxes are not for all the others")
                self._shares[message.site] = message
            case Masked():
                self._add(message, words)
            case Consent():
                self._roster.verify(message.site, message.signature, self._signed)
                self._consents[message.site] = message
            case Unmasking():
                if message.seeds.keys() != self._masked.keys() or message.keys.keys() != self._lost:
                    raise MalformedMessage(f"{message.site}: its shares are not those asked for")
                self._unmaskings[message.site] = message
        return True

    def lose(self, site: SiteId) -> None:
        """Do not wait for `site` any longer in this phase; what it has sent stays."""
        self.waiting.discard(site)

    def advance(self) -> Mapping[SiteId, ToSite]:
        """End the phase with those that answered; return what each of them is to be told."""
        context = self.terms.context
        match self.phase:
            case Phase.ADVERTISED:
                adverts = Adverts(context, tuple(self._answered("keys", self._adverts).values()))
                self._digest = session.digest_of(adverts.adverts)
                return self._tell(Phase.SHARED, self._adverts, lambda _: adverts)
            case Phase.SHARED:
                sent = self._answered("shares", self._shares)
                return self._tell(Phase.MASKED, sent, lambda site: Boxes(context, self._for(site)))
            case Phase.MASKED:
                survivors = Survivors(context, tuple(self._answered("vectors", self._masked)))
                self._signed = session.signed_consent(
                    context, self._digest, self._shares, self._masked
                )
                return self._tell(Phase.CONSENTED, self._masked, lambda _: survivors)
            case Phase.CONSENTED:
                given = self._answered("consents", self._consents)
                consents = Consents(context, {site: c.signature for site, c in given.items()})
                return self._tell(Phase.UNMASKED, given, lambda _: consents)
            case _:
                raise AssertionError(f"advance() in phase {self.phase.name}")

    def finish(self) -> Total:
        """Return the sum over all survivors, its masks taken off."""
        assert self.phase is Phase.UNMASKED and self._total is not None, "nothing to unmask"
        replies = self._answered("unmasking shares", self._unmaskings)
        chosen = [*replies.values()][: self.terms.threshold]
        masks = [*self._own_masks(chosen), *self._pair_masks(chosen)]
        self.phase = Phase.OVER
        self._total.unmask(masks, self._threads)
        return self._total

    def _add(self, message: Masked, words: Words | None) -> None:
        if words is None:
            raise MalformedMessage(f"{message.site}: a masked vector without words")
        if self._total is None:
            self._total = Total(self.terms.grid)
        self._total.add(words, self._threads)
        self._masked[message.site] = message

    def _answered(self, what: str, answers: Mapping[SiteId, M]) -> dict[SiteId, M]:
        if len(answers) < self.terms.threshold:
            self.phase = Phase.OVER
            raise QuorumLost(
                f"round {self.terms.round}: {what} of {len(answers)} sites, and the masked sum "
                f"needs {self.terms.threshold} of {len(self.terms.cohort)}; no update was revealed"
            )
        return dict(sorted(answers.items()))

    def _tell(
        self, phase: Phase, sites: Iterable[SiteId], message: Callable[[SiteId], ToSite]
    ) -> Mapping[SiteId, ToSite]:
        self.phase, self.waiting = phase, set(sites)
        return {site: message(site) for site in sorted(self.waiting)}

    def _for(self, site: SiteId) -> dict[SiteId, bytes]:
        return {other: s.boxes[site] for other, s in self._shares.items() if other != site}

    @property
    def _lost(self) -> set[SiteId]:
        """Those whose masks are on the survivors' vectors, but not their own vectors in the sum."""
        return self._shares.keys() - self._masked.keys()

    def _own_masks(self, replies: list[Unmasking]) -> Iterable[Mask]:
        for site in self._masked:
            seed = self._combine(site, {reply.site: reply.seeds[site] for reply in replies})
            told = self._shares[site].commitment
            if session.commitment(self.terms.context, site, seed) != told:
                raise RoundFailed(_LIES.format(self.terms.round, "seed", site))
            yield Mask(seed, -1)

    def _pair_masks(self, replies: list[Unmasking]) -> Iterable[Mask]:
        for site in sorted(self._lost):
            raw = self._combine(site, {reply.site: reply.keys[site] for reply in replies})
            private = X25519PrivateKey.from_private_bytes(raw)
            if private.public_key().public_bytes_raw() != self._adverts[site].mask_key:
                raise RoundFailed(_LIES.format(self.terms.round, "mask key", site))
            for other in self._masked:
                public = self._adverts[other].mask_key
                key = session.mask_key(private, public, self.terms.context, self._digest)
                yield Mask(key, -session.sign_of(self.terms, other, site))

    def _combine(self, site: SiteId, held: Mapping[SiteId, bytes]) -> bytes:
        try:
            return shares.combine({self.terms.places[who]: share for who, share in held.items()})
        except Untrusted as error:
            raise RoundFailed(_LIES.format(self.terms.round, "secret", site)) from error

    @staticmethod
    def _phase_of(message: FromSite) -> Phase:
        match message:
            case Advert():
                return Phase.ADVERTISED
            case Shares():
                return Phase.SHARED
            case Masked():
                return Phase.MASKED
            case Consent():
                return Phase.CONSENTED
            case Unmasking():
                return Phase.UNMASKED


_LIES = (
    "round {}: shares of the {} of {} do not fit what it committed to: a site lied; "
    "another attempt, without it, may do better"
)
