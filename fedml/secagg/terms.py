"""What a masked round is about, and who may be in it: what every site recomputes for itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedml.errors import ConfigError, Refused, Untrusted
from fedml.protocol.messages import Assignment, RunId, SiteId, check_digest, check_id
from fedml.protocol.secagg import KEY, Masking, Part, about, check_length
from fedml.secagg.masking import Grid

LEAST_COHORT = 3  # of two, each knows the other's vector from the sum


def bind(*parts: bytes | str | int) -> bytes:
    """Return SHA-256 over `parts`, each with its length, so that no two lists have one digest."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        raw = raw.to_bytes(8, "big") if isinstance(raw, int) else raw
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.digest()


def least_threshold(cohort: int, colluders: int = 0) -> int:
    """Return how many sites must agree so that no two lists of survivors can both be agreed on.

    Two sets of t among n sites have 2t - n in common; with t above (n + c) / 2 that is more than
    the `colluders`, so an honest site would have to sign both. And a sum of two tells each of
    them what the other put in.
    """
    return max(LEAST_COHORT, (cohort + colluders) // 2 + 1)


@dataclass(frozen=True)
class Member:
    """A site of the consortium and its Ed25519 identity key (raw, 32 bytes)."""

    site: SiteId
    key: bytes

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length(f"identity key of {self.site}", self.key, KEY)


@dataclass(frozen=True)
class Roster:
    """The sites whose keys count, as each site's operator accepted the list; nobody adds to it."""

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        members = tuple(sorted(self.members, key=lambda member: member.site))
        object.__setattr__(self, "members", members)
        if len({member.site for member in members}) < len(members):
            raise ConfigError("roster: a site is on it twice; each has one identity key")
        if len({member.key for member in members}) < len(members):
            raise ConfigError("roster: two sites have the same identity key; each needs its own")

    @staticmethod
    def parse(text: bytes, what: str) -> Roster:
        """Return the roster in a JSON object of sites' names and keys in hex.

        `what` names it in the `ConfigError` that is raised at anything else.
        """
        try:
            named = json.loads(text)
            rows = [Member(SiteId(str(n)), bytes.fromhex(key)) for n, key in named.items()]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f'{what}: no roster; it has the form {{"site": "key in hex"}}') from (
                error
            )
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from error
        return Roster(tuple(rows))

    @cached_property
    def keys(self) -> Mapping[SiteId, bytes]:
        """Each site's identity key."""
        return {member.site: member.key for member in self.members}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical list: what operators compare by telephone."""
        rows = [{"key": member.key.hex(), "site": member.site} for member in self.members]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest()

    def verify(self, site: SiteId, signature: bytes, message: bytes) -> None:
        """Raise `Untrusted` unless `site` is on the roster and its pinned key signed `message`."""
        if site not in self.keys:
            raise Untrusted(f"site {site} is not on the roster that was accepted here; alarm")
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[site]).verify(signature, message)
        except InvalidSignature as error:
            raise Untrusted(
                f"{site}: its identity key did not sign this for this round; "
                "it was changed on the way, or is for another run, round, model or terms"
            ) from error


def _row(part: Part) -> list[object]:
    row = [part.name, part.size, float(part.clip).hex(), part.fine]
    return [*row, "whole"] if part.whole else row


@dataclass(frozen=True)
class Terms:
    """All that fixes one attempt at a masked round; the digests in it are SHA-256 or BLAKE3.

    A site fills it in from what it sees itself (its task, the model's bytes, its own roster), so
    a coordinator that tells two sites two things gets two contexts, which do not mix. `model` is
    the digest of the brief in hex. `settings` is what else must be equal, as canonical text.
    """

    run: RunId
    round: int
    attempt: int
    model: str
    roster: bytes
    cohort: tuple[SiteId, ...]
    threshold: int
    parts: tuple[Part, ...]
    weight_cap: float = 1.0
    kind: Literal["train", "evaluate"] = "train"
    settings: str = ""

    def __post_init__(self) -> None:
        check_id("run", self.run)
        check_digest("model", self.model)
        check_length("roster", self.roster, KEY)
        object.__setattr__(self, "cohort", tuple(sorted(self.cohort)))
        if len(set(self.cohort)) < len(self.cohort):
            raise ConfigError(f"round {self.round}: a site is in the cohort twice")
        if self.round < 1 or self.attempt < 1 or not 0 < self.weight_cap < math.inf:
            raise ConfigError(
                f"round {self.round}, attempt {self.attempt}, weight cap {self.weight_cap}: "
                "all must be positive"
            )
        if len(self.cohort) < LEAST_COHORT:
            raise ConfigError(
                f"{len(self.cohort)} sites: a sum hides nobody below {LEAST_COHORT}; ask more"
            )
        if not least_threshold(len(self.cohort)) <= self.threshold <= len(self.cohort):
            raise ConfigError(
                f"threshold {self.threshold} of {len(self.cohort)} sites: use "
                f"{least_threshold(len(self.cohort))} to {len(self.cohort)}"
            )

    @cached_property
    def grid(self) -> Grid:
        """How the vector's numbers become words."""
        return Grid(len(self.cohort), self.parts)

    @cached_property
    def places(self) -> Mapping[SiteId, int]:
        """Each site's place, from 1: where its shares lie, and who adds a pair's mask."""
        return {site: place for place, site in enumerate(self.cohort, 1)}

    @cached_property
    def context(self) -> bytes:
        """The digest that every key, box and signature of the attempt is bound to."""
        record = {
            "cohort": self.cohort,
            "kind": self.kind,
            "parts": [_row(part) for part in self.parts],
            "settings": self.settings,
            "threshold": self.threshold,
            "weight_cap": float(self.weight_cap).hex(),
        }
        settings = bind(json.dumps(record, separators=(",", ":"), sort_keys=True))
        about = (self.run, self.round, self.attempt, self.model)
        return bind("fedml-sa1", *about, self.roster, settings)

    @staticmethod
    def of(order: Assignment, masking: Masking, roster: Roster) -> Terms:
        """Return what a site makes of an order, with its own roster and the model it trains."""
        return Terms(
            run=order.run,
            round=order.round,
            attempt=masking.attempt,
            model=order.model.digest,
            roster=roster.digest,
            cohort=masking.cohort,
            threshold=masking.threshold,
            parts=masking.parts,
            weight_cap=masking.settings.weight_cap,
            kind=order.kind,
            settings=about(
                order.recipe,
                order.training,
                order.privacy,
                order.rule,
                order.settings,
                masking.settings,
            ),
        )

    @property
    def sum(self) -> str:
        """Names what a site gives shares for once, whatever the attempt."""
        return f"{self.run}.{self.round}.{self.kind}"


@dataclass(frozen=True)
class Demands:
    """What a site's own policy wants of a masked round, whatever the coordinator asks.

    `colluders` is how many other sites are assumed to help the coordinator.
    """

    cohort: int = LEAST_COHORT
    colluders: int = 0

    def check(self, site: SiteId, roster: Roster, terms: Terms) -> None:
        """Raise `Refused` or `Untrusted` unless `site` may take part under `terms`."""
        if roster.digest != terms.roster:
            raise Untrusted(
                f"roster {terms.roster.hex()[:16]}: this site accepted {roster.digest.hex()[:16]}; "
                "the operator must accept a new roster"
            )
        strangers = [other for other in terms.cohort if other not in roster.keys]
        if strangers:
            raise Untrusted(
                f"site {strangers[0]} is not on the roster that was accepted here; alarm"
            )
        if site not in terms.places:
            raise Untrusted(f"{site} is not in the cohort {', '.join(terms.cohort)}; alarm")
        if len(terms.cohort) < self.cohort:
            raise Refused(
                f"cohort of {len(terms.cohort)} sites: this site's policy wants {self.cohort}"
            )
        least = least_threshold(len(terms.cohort), self.colluders)
        if terms.threshold < least:
            raise Refused(
                f"threshold {terms.threshold} of {len(terms.cohort)} sites: this site's policy, "
                f"which assumes {self.colluders} that collude, wants {least}"
            )
