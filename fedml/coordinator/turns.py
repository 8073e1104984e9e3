"""Whose turn it is, where a site takes part in fewer runs at once than want it. Pure.

A run holds the sites of its open round. A run that could open a round were it not for others
waits in line; when sites come free, the first in line that has enough of them takes them, and a
run that has just had a round stands behind those who wait. A run that could not start anyway
keeps nobody waiting.
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
            self._line.pop(run.id, None)
        told = (replace(s, busy=_busy(s)) if s.site in taken else s for s in statuses)
        return Roll(tuple(told), awaits_turn=waits)

    def hold(self, run: RunId, sites: Sequence[SiteId]) -> bool:
        """Note whom a run's open round asks; true if others were let go."""
        before = self._held.pop(run, frozenset())
        if sites:
            self._held[run] = frozenset(sites)
            self._line.pop(run, None)
        return bool(before - frozenset(sites))

    def leave(self, run: RunId) -> None:
        """Forget a run that is over."""
        self._held.pop(run, None)
        self._line.pop(run, None)

    def _room(self, run: RunId, statuses: Sequence[SiteStatus]) -> dict[SiteId, int]:
        """Count the places left for `run` at each site that limits them."""
        room = {s.site: s.runs_at_once for s in statuses if s.runs_at_once}
        for other, sites in self._held.items():
            if other != run:
                for site in sites & room.keys():
                    room[site] -= 1
        for other, want in self._line.items():
            if other == run:
                break
            free = [site for site in want.sites if room.get(site, 1) > 0]
            if len(free) >= want.quorum:
                for site in free:
                    if site in room:
                        room[site] -= 1
        return room


def _busy(status: SiteStatus) -> str:
    return f"it is other runs' turn (its policy runs_at_once = {status.runs_at_once})"
