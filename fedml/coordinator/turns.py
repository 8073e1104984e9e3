"""Whose turn it is, where a site takes part in fewer runs at once than want it. Pure.

A run holds the sites of its open round. A run that could open a round were it not for others
waits in line, and a run that has just had a round stands behind those who wait. What comes free
is kept for the first in line until it has enough, or runs that need few sites would keep one that
needs many waiting for ever; those behind it go ahead with what it leaves. A run that could not
start anyway keeps nobody waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedml.protocol.messages import RunId, SiteId
from fedml.rounds.run import Run
from fedml.rounds.selection import Roll, SiteStatus, eligible


@dataclass(frozen=True)
class _Want:
    """What a run in line needs before it can open a round."""

    sites: frozenset[SiteId]
    quorum: int


class Turns:
    """The line before the sites; each run asks for its `pool` when it is about to open a round."""

    def __init__(self) -> None:
        self._held: dict[RunId, frozenset[SiteId]] = {}
        self._line: dict[RunId, _Want] = {}  # in order of arrival
        self._yielding: set[RunId] = set()  # let go of sites, and nobody was told

    def pool(self, run: Run, statuses: Sequence[SiteStatus]) -> Roll:
        """Return the sites as `run` may have them now; it stands in line if they are too few."""
        room = self._room(run.id, statuses)
        wanted = eligible(run.plan, statuses, run.barred).asked
        taken = {site for site in wanted if room.get(site, 1) < 1}
        quorum = run.plan.cohort.quorum
        waits = not run.asked and len(wanted) >= quorum > len(wanted) - len(taken)
        if waits:
            self._line[run.id] = _Want(frozenset(wanted), quorum)  # a known key keeps its place
        elif not run.asked:
            self._step_out(run.id, frozenset())
        told = (replace(s, busy=_busy(s)) if s.site in taken else s for s in statuses)
        return Roll(tuple(told), awaits_turn=waits)

    def take(self, run: RunId, sites: Sequence[SiteId]) -> None:
        """Hold whom a round asks that opens, and who is held already; no longer stand in line."""
        self._held[run] = self._held.get(run, frozenset()) | frozenset(sites)
        self._step_out(run, self._held[run])

    def keep(self, run: RunId, sites: Sequence[SiteId]) -> None:
        """Hold no others than these; those let go know that their round is over."""
        before = self._held.pop(run, frozenset())
        if sites:
            self._held[run] = frozenset(sites)
        if before - frozenset(sites):
            self._yielding.add(run)

    def leave(self, run: RunId) -> None:
        """Forget a run that is over."""
        self._held.pop(run, None)
        self._line.pop(run, None)
        self._yielding.discard(run)

    def yields(self, run: RunId) -> bool:
        """True, once, if others may have sites now that `run` held or kept for itself."""
        told = run in self._yielding
        self._yielding.discard(run)
        return told

    def _step_out(self, run: RunId, seats: frozenset[SiteId]) -> None:
        """Take a run that has got `seats`, or waits no longer, out of the line."""
        want = self._line.pop(run, None)
        if want is not None and want.sites - seats:
            self._yielding.add(run)

    def _room(self, run: RunId, statuses: Sequence[SiteStatus]) -> dict[SiteId, int]:
        """Count the places left for `run` at each site that limits them."""
        room = {s.site: s.runs_at_once for s in statuses if s.runs_at_once}
        for other, sites in self._held.items():
            if other != run:
                for site in sites & room.keys():
                    room[site] -= 1
        for place, (other, want) in enumerate(self._line.items()):
            if other == run:
                break
            free = [site for site in want.sites if room.get(site, 1) > 0]
            if place == 0 or len(free) >= want.quorum:
                for site in free:
                    if site in room:
                        room[site] -= 1
        return room


def _busy(status: SiteStatus) -> str:
    return f"it is other runs' turn (its policy runs_at_once = {status.runs_at_once})"
