"""Who is let count for little round after round: an alert, where a single round says nothing.

A robust rule measures its cohort anew in each round, and will name an honest site now and then. A
site that it names every time is broken, unlike the others, or lies. Where it names most of a
cohort, as `krum` does, which leaves out all but one, that says nothing of any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedml.protocol.messages import SiteId
from fedml.protocol.operations import Receipt

ROUNDS = 5  # in a row that make an alert


class Vigil:
    """Counts each site's rounds in a row; rounds that say nothing of it are passed over."""

    def __init__(self, receipts: Iterable[Receipt] = ()) -> None:
        """Take in what a run has behind it."""
        self._rows: dict[SiteId, int] = {}
        self._why: dict[SiteId, str] = {}
        for receipt in receipts:
            self.take(receipt)

    def take(self, receipt: Receipt) -> tuple[SiteId, ...]:
        """Take in a round's receipt; return the sites whose alert it raises or renews.

        An alert is renewed with as many rounds again, so that it is not lost in a long log.
        """
        said_little = 2 * len(receipt.damped) >= len(receipt.counted) > 0
        if receipt.kind != "train" or not receipt.model or said_little:
            return ()
        for counted in receipt.counted:
            why = receipt.damped.get(counted.site)
            if why is None:
                self._rows.pop(counted.site, None)
                self._why.pop(counted.site, None)
            else:
                self._rows[counted.site] = self._rows.get(counted.site, 0) + 1
                self._why[counted.site] = why
        named = (site for site in self.rows if site in receipt.damped)
        return tuple(site for site in named if self._rows[site] % ROUNDS == 0)

    @property
    def rows(self) -> dict[SiteId, int]:
        """How many rounds in a row each site was damped that was in its last one, by name."""
        return dict(sorted(self._rows.items()))

    def alerts(self) -> Iterator[str]:
        """Yield a line for each site with an alert."""
        for site, rounds in self.rows.items():
            if rounds >= ROUNDS:
                yield self.alert(site)

    def alert(self, site: SiteId) -> str:
        """Say what is wrong with a site, and what to do about it."""
        return (
            f"{site} counted for little in {self._rows[site]} rounds in a row, last because "
            f"{self._why[site]}; have its data and scaling looked at, or go on without it"
        )
