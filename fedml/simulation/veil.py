"""The sites' half of masked rounds in a simulation: the production sessions, in this process.

Identities are made anew for each simulation, and what would cross the network crosses a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedml.errors import FedmlError
from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import Adverts, Boxes, Consents, FromSite, Masked, Secagg, Survivors
from fedml.protocol.tasks import Brief, Report, Task, Update
from fedml.rounds import Opening, Relay, Said, SiteLost, terms_of, vectors
from fedml.secagg import Demands, Member, Roster, Site, Terms


class Veil:
    """Masks what simulated sites answer, and speaks for them until the sum is unmasked."""

    def __init__(
        self,
        settings: Secagg,
        sites: Sequence[SiteId],
        about: Callable[[Brief], str] = lambda _: "",
        grain: float = 0.0,
    ) -> None:
        """Mask for `sites`; `about` says what they were told beside the model.

        `grain` is that of `privacy.shares.grain_of`: not 0 if they share the noise of their sum.
        """
        self._settings, self._about, self._grain = settings, about, grain
        self._identities = {site: Ed25519PrivateKey.generate() for site in sites}
        keys = {s: key.public_key().public_bytes_raw() for s, key in self._identities.items()}
        self.roster = Roster(tuple(Member(site, key) for site, key in keys.items()))
        self._released: dict[SiteId, set[str]] = {site: set() for site in sites}
        self._opening: Opening | None = None
        self._sessions: dict[SiteId, tuple[Task, Site]] = {}

    def open(self, opening: Opening) -> None:
        """A round opens; the sessions of the one before are over."""
        for _, session in self._sessions.values():
            session.forget()
        self._opening, self._sessions = opening, {}

    def terms(self, brief: Brief) -> Terms:
        """Return what the open round is about, as each site works it out."""
        assert self._opening is not None, "no round is open"
        about, shared = self._about(brief), self._grain != 0
        return terms_of(self._opening, brief, self._settings, self.roster, about, shared=shared)

    def begin(self, task: Task) -> Said | SiteLost:
        """Begin a task's session; return the site's keys for the round."""
        site = task.site
        try:
            session = Site(
                site,
                self._identities[site],
                self.roster,
                self.terms(task.brief),
                demands=Demands(colluders=self._settings.colluders),
                released=self._released[site],
            )
        except FedmlError as error:
            return SiteLost(site, str(error), task=task.id)
        self._sessions[site] = task, session
        return Said(task.id, session.advertise())

    def hear(self, relay: Relay) -> Said | SiteLost | None:
        """Hand the coordinator's message to its site; return what the site says to it."""
        _, session = self._sessions[relay.site]
        try:
            answer = _answer(session, relay)
        except FedmlError as error:
            return SiteLost(relay.site, str(error), task=relay.task)
        return None if answer is None else Said(relay.task, answer)

    def mask(self, answer: Update | Report) -> Said | SiteLost:
        """Return an answer as its site would hand it in: masked."""
        task, session = self._sessions[answer.site]
        settings, brief = self._settings, task.brief
        try:
            if isinstance(answer, Update) and self._grain:
                values, weight = vectors.shares_of(self._whole(answer), brief), answer.weight
            elif isinstance(answer, Update):
                values, weight = vectors.numbers_of(answer, brief, settings), answer.weight
            else:
                values, weight = vectors.scores_of(answer, settings), settings.weight_cap
            words = np.concatenate([*session.mask(values, weight)])
        except FedmlError as error:
            session.forget()
            return SiteLost(answer.site, str(error), task=task.id)
        message = Masked(session.terms.context, answer.site)
        return Said(task.id, message, words, epsilon=answer.epsilon)

    def _whole(self, update: Update) -> dict[str, Tensor]:
        """Return what a site's worker would have left, which an executor made a delta of."""
        steps = update.weight / self._grain
        return {name: (moved.double() * steps).round() for name, moved in update.delta.items()}


def _answer(session: Site, relay: Relay) -> FromSite | None:
    match relay.message:
        case Adverts() as adverts:
            return session.share(adverts)
        case Boxes() as boxes:
            session.receive(boxes)
            return None
        case Survivors() as survivors:
            return session.consent(survivors)
        case Consents() as consents:
            return session.unmask(consents)
