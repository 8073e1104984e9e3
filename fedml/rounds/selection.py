"""Who is asked in a round, and for every other site why not. The same inputs, the same cohort.

A `Run` draws from a `Pool`. A coordinator's is a `Roll`, which lists every site; a simulated
crowd of a million sites is a pool too, and never lists them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedml.protocol.messages import DatasetCard, RecipeId, SiteId
from fedml.rounds.plan import Plan
from fedml.strategies import buffering_of, in_turn

Reasons = Mapping[str, str]  # by site
NOBODY: Reasons = {}


@dataclass(frozen=True)
class SiteStatus:
    """What the host knows of a site right now.

    `runs_at_once` is in how many runs it takes part at a time, 0 for any number; `busy` says why
    it cannot take part in one run now, though it may later. `region` is the one that it is reached
    through, which hands up sums only. `can_mask` if its operator accepted the roster of masked
    rounds that is ours.
    """

    site: SiteId
    connected: bool
    recipes: tuple[RecipeId, ...] = ()
    datasets: tuple[DatasetCard, ...] = ()
    runs_at_once: int = 0
    busy: str = ""
    region: str = ""
    can_mask: bool = False


@dataclass(frozen=True)
class Selection:
    """The sites to ask, sorted, and why each other known or listed site is left out."""

    asked: tuple[SiteId, ...]
    left_out: Reasons


class Muster(Protocol):
    """Who could take part at one moment."""

    @property
    def ready(self) -> int:
        """How many sites could take part now."""

    @property
    def willing(self) -> int:
        """How many have not refused for good, ready or not."""

    @property
    def left_out(self) -> Reasons:
        """Why others could not."""

    def cohort(self, number: int, busy: Reasons = NOBODY) -> Selection:
        """Return who is asked to train in round `number`; nobody is who is not ready.

        `busy` sites have their places in the cohort already, and none of them is asked.
        """

    def scorers(self, number: int) -> Selection:
        """Return who scores the model after round `number`."""


@runtime_checkable
class Pool(Protocol):
    """The sites of a federation, however many."""

    def muster(self, plan: Plan, barred: Reasons) -> Muster:
        """Return who could take part in `plan` now; `barred` sites have refused for good."""


@dataclass(frozen=True)
class Roll:
    """A pool that lists every site's status; `awaits_turn` if only other runs are in the way."""

    statuses: tuple[SiteStatus, ...] = ()
    awaits_turn: bool = False

    def muster(self, plan: Plan, barred: Reasons) -> Muster:
        """Look at every site."""
        return _RollCall(plan, barred, eligible(plan, self.statuses, barred))


@dataclass(frozen=True)
class _RollCall:
    plan: Plan
    barred: Reasons
    found: Selection

    @property
    def ready(self) -> int:
        return len(self.found.asked)

    @property
    def willing(self) -> int:
        listed: set[str] = {*self.plan.cohort.sites} or {*self.found.asked, *self.found.left_out}
        return len(listed - self.barred.keys())

    @property
    def left_out(self) -> Reasons:
        return self.found.left_out

    def cohort(self, number: int, busy: Reasons = NOBODY) -> Selection:
        if not busy:
            return draw(self.plan, number, self.found)
        idle = tuple(site for site in self.found.asked if site not in busy)
        others = {site: why for site, why in self.found.left_out.items() if site not in busy}
        return draw(self.plan, number, Selection(idle, others), len(busy))

    def scorers(self, number: int) -> Selection:
        return self.found


def eligible(plan: Plan, statuses: Iterable[SiteStatus], barred: Reasons) -> Selection:
    """Return all sites that could take part now; `barred` sites have refused for good."""
    known = {status.site: status for status in statuses}
    asked: list[SiteId] = []
    left_out: dict[str, str] = {}
    for site in sorted(known.keys() | set(plan.cohort.sites)):
        objection = barred.get(site) or _objection(plan, site, known.get(site))
        if objection:
            left_out[site] = objection
        else:
            asked.append(site)
    return Selection(tuple(asked), left_out)


def draw(plan: Plan, number: int, pool: Selection, taken: int = 0) -> Selection:
    """Return the cohort of round `number`: `pool`, or `cohort.size` of it drawn by `plan.seed`.

    Where a strategy's sites take turns it is the one whose turn it is, or the next that is there.
    Each site's lot depends on seed, round and its own name only, so a newcomer moves no others.
    So many places as are `taken` are not drawn for.
    """
    if in_turn(plan.strategy):
        return _whose_turn(plan, number, pool)
    size = max(0, plan.cohort.size - taken)
    if plan.cohort.size == 0 or len(pool.asked) <= size:
        return pool

    def lot(site: SiteId) -> bytes:
        return hashlib.sha256(f"cohort.{plan.seed}.{number}.{site}".encode()).digest()

    drawn = set(sorted(pool.asked, key=lot)[:size])
    reason = f"not drawn: {size} of {len(pool.asked)} sites are asked in a round"
    spared = {site: reason for site in pool.asked if site not in drawn}
    left_out = dict(sorted([*pool.left_out.items(), *spared.items()]))
    return Selection(tuple(sorted(drawn)), left_out)


def _whose_turn(plan: Plan, number: int, pool: Selection) -> Selection:
    order = plan.cohort.sites or pool.asked
    first = (number - 1) % max(len(order), 1)
    there = {*pool.asked}
    asked = next((site for site in (*order[first:], *order[:first]) if site in there), None)
    if asked is None:
        return pool
    spared = {site: f"it is the turn of {asked}" for site in pool.asked if site != asked}
    return Selection((asked,), dict(sorted([*pool.left_out.items(), *spared.items()])))


def needs_each(plan: Plan, region: str) -> str:
    """Say why a site behind `region`, which sends sums, cannot take part; "" if it can."""
    sends = f"region {region} sends the sum of its sites' updates and"
    if not plan.strategy.reducer.linear:
        name = type(plan.strategy.reducer).__name__
        return f"{sends} reducer {name} needs each of them: use reducer=weighted-mean"
    if plan.privacy.mode == "site_central":
        return f"{sends} site_central privacy looks at each one's norm: use privacy=record"
    if buffering_of(plan.strategy):
        name = type(plan.strategy).__name__
        return f"{sends} strategy {name} takes each as it comes: use strategy=fedavg"
    if plan.secagg.is_on:
        return f"{sends} secagg adds up masked words of sites that dial us: use secagg=none"
    return ""


def _objection(plan: Plan, site: SiteId, status: SiteStatus | None) -> str:
    if plan.cohort.sites and site not in plan.cohort.sites:
        return "not among the plan's sites"
    if status is None:
        return "never seen"
    if not status.connected:
        return "not connected"
    if status.region and (reason := needs_each(plan, status.region)):
        return reason
    if plan.recipe not in status.recipes:
        others = [r.digest[:12] for r in status.recipes if r.name == plan.recipe.name]
        has = f"has {', '.join(others)}" if others else "does not have that recipe"
        return f"{has}, the run needs {plan.recipe.name} {plan.recipe.digest[:12]}"
    if plan.secagg.is_on and not status.can_mask:
        return "has not accepted this roster of sites that mask"
    rows = [card.rows for card in status.datasets if card.name == plan.dataset]
    if not rows:
        return f"has no dataset named {plan.dataset}"
    return status.busy if rows[0] > 0 else f"declares no rows in {plan.dataset}"
