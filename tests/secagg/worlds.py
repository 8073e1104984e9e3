"""A consortium in one process, for tests of the masked round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableSet
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.secagg import (
    Adverts,
    Boxes,
    Consents,
    FromSite,
    Masked,
    Survivors,
    ToSite,
)
from fedml.secagg import Coordinator, Demands, Member, Part, Roster, Site, Terms, least_threshold
from fedml.secagg.masking import Floats, Vector, Words, mask

RUN = RunId("run-1")
MODEL = "ab" * 32
PARTS = (Part("delta", 1003, 0.5), Part("metrics", 2, 100.0, fine=True))


def names(count: int) -> tuple[SiteId, ...]:
    return tuple(SiteId(f"site-{number:02}") for number in range(count))


@dataclass
class World:
    """A cohort with its identities, terms, and each site's numbers and weight."""

    count: int
    parts: tuple[Part, ...] = PARTS
    seed: int = 0
    identities: dict[SiteId, Ed25519PrivateKey] = field(default_factory=dict)
    released: dict[SiteId, MutableSet[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = names(self.count)
        self.identities = {site: Ed25519PrivateKey.generate() for site in self.sites}
        self.released = {site: set() for site in self.sites}
        draw = np.random.default_rng(self.seed)
        self.weights = {site: float(draw.integers(1, 101)) for site in self.sites}
        self.values: dict[SiteId, dict[str, Floats]] = {
            site: {
                part.name: draw.uniform(-part.clip, part.clip, part.size).astype(np.float32)
                for part in self.parts
            }
            for site in self.sites
        }

    @property
    def roster(self) -> Roster:
        keys = self.identities.items()
        return Roster(tuple(Member(s, k.public_key().public_bytes_raw()) for s, k in keys))

    def terms(self, **changes: object) -> Terms:
        fields: dict[str, object] = {
            "run": RUN,
            "round": 3,
            "attempt": 1,
            "model": MODEL,
            "roster": self.roster.digest,
            "cohort": self.sites,
            "threshold": least_threshold(self.count),
            "parts": self.parts,
            "weight_cap": 100.0,
        }
        return Terms(**{**fields, **changes})  # type: ignore[arg-type]

    def site(
        self, name: SiteId, terms: Terms | None = None, demands: Demands | None = None
    ) -> Site:
        return Site(
            name,
            self.identities[name],
            self.roster,
            terms or self.terms(),
            demands=demands,
            released=self.released[name],
        )

    def cohort(self, terms: Terms | None = None) -> dict[SiteId, Site]:
        return {name: self.site(name, terms) for name in self.sites}

    def mean(self, sites: Iterable[SiteId], part: str) -> NDArray[np.float64]:
        """Return what the masked sum over `sites` must give, in float64."""
        total = sum(self.weights[site] for site in sites)
        rows = [self.weights[site] * self.values[site][part].astype(np.float64) for site in sites]
        mean: NDArray[np.float64] = np.sum(rows, axis=0) / total
        return mean


@dataclass
class Host:
    """Carries messages between the two roles; who is in `gone` has stopped for good."""

    world: World
    coordinator: Coordinator
    sites: dict[SiteId, Site]
    gone: set[SiteId] = field(default_factory=set)
    words: dict[SiteId, Words] = field(default_factory=dict)  # what crossed the wire
    seen: list[FromSite] = field(default_factory=list)

    @classmethod
    def over(cls, world: World, terms: Terms | None = None) -> Host:
        terms = terms or world.terms()
        return cls(world, Coordinator(world.roster, terms, threads=1), world.cohort(terms))

    def fill(self, names: Collection[SiteId]) -> None:
        """Let those of `names` that are left answer what the coordinator waits for."""
        for name in sorted(self.coordinator.waiting):
            if name in names and name not in self.gone:
                self.give(self.answer(name, self.inbox.get(name)))
            else:
                self.coordinator.lose(name)

    inbox: Mapping[SiteId, ToSite] = field(default_factory=dict)

    def answer(self, name: SiteId, message: ToSite | None) -> FromSite:
        site = self.sites[name]
        match message:
            case None:
                return site.advertise()
            case Adverts():
                return site.share(message)
            case Boxes():
                site.receive(message)
                return self.masked(name)
            case Survivors():
                return site.consent(message)
            case Consents():
                return site.unmask(message)

    def masked(self, name: SiteId) -> Masked:
        site, world = self.sites[name], self.world
        slices = site.mask(world.values[name], world.weights[name], threads=1)
        self.words[name] = np.concatenate([*slices])
        return Masked(site.terms.context, name)

    def give(self, message: FromSite) -> bool:
        self.seen.append(message)
        return self.coordinator.take(message, self.words.get(message.site))

    def phase(self, losing: Collection[SiteId] = ()) -> None:
        """Play one phase, in which `losing` stop for good before they answer."""
        self.gone |= set(losing)
        self.fill(self.world.sites)

    def advance(self) -> None:
        self.inbox = self.coordinator.advance()

    def play(self, losing: Mapping[int, Collection[SiteId]] | None = None) -> None:
        """Play all five phases; `losing` has who stops in which, from 0."""
        for number in range(5):
            self.phase((losing or {}).get(number, ()))
            if number < 4:
                self.advance()


def plain(world: World, name: SiteId, terms: Terms) -> Words:
    """Return a site's words as they are without masks: what no attack may get at."""
    return plain_words(world.values[name], world.weights[name] / terms.weight_cap, terms)


def plain_words(values: Mapping[str, Floats], weight: float, terms: Terms) -> Words:
    """Return `values` as words, without masks."""
    vector = Vector(terms.grid, values, weight)
    return np.concatenate([*mask(vector, terms.grid, [], threads=1)])
