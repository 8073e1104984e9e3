"""A round whose updates are masked: the coordinator learns their sum, and none of them.

As `round.Round` it is fed events and gives commands, and does no IO. Beside tasks it relays the
messages of secure aggregation, whose keys are agreed on while sites train. What a site hands in
is noise until the end, when enough of those whose vectors came have consented to the same sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedml.errors import MalformedMessage, QuorumLost, RoundFailed, Untrusted
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.operations import Counted
from fedml.protocol.secagg import FromSite, Masked, Secagg, ToSite
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import round as rounds
from fedml.rounds import vectors
from fedml.rounds.round import (
    Account,
    CancelTask,
    Close,
    DeadlinePassed,
    Fail,
    Opening,
    ReportArrived,
    SendTask,
    SiteLost,
    StackArrived,
    SumArrived,
    UpdateArrived,
    WakeAt,
)
from fedml.secagg import Coordinator, Roster, Terms, least_threshold
from fedml.secagg.masking import Words
from fedml.secagg.session import Phase


@dataclass(frozen=True)
class Said:
    """A site's message of secure aggregation; who it is was checked by the host.

    `words` come with `Masked`, with the `digest` of their bytes and the site's epsilon so far.
    """

    task: TaskId
    message: FromSite
    words: Words | None = None
    digest: str = ""
    epsilon: float = 0.0


@dataclass(frozen=True)
class Relay:
    """Hand `message` to the site that works on `task`."""

    task: TaskId
    site: SiteId
    message: ToSite


Event = Said | rounds.Event
Command = SendTask | CancelTask | WakeAt | Relay | Close | Fail


def terms_of(
    opening: Opening,
    brief: Brief,
    settings: Secagg,
    roster: Roster,
    about: str = "",
    *,
    shared: bool = False,
) -> Terms:
    """Return what a round is about, as the coordinator and each site work it out alike.

    `about` is what else must be equal: see `protocol.secagg.about`. `shared` says that sites
    share the noise of their sum.
    """
    if opening.kind == "train":
        parts = vectors.parts_of(brief, settings, shared=shared)
    else:
        parts = vectors.score_parts(settings)
    least = least_threshold(len(opening.asked), settings.colluders)
    return Terms(
        run=opening.run,
        round=opening.number,
        attempt=opening.attempt,
        model=brief.digest(),
        roster=roster.digest,
        cohort=opening.asked,
        threshold=max(least, opening.quorum),
        parts=parts,
        weight_cap=settings.weight_cap,
        kind=opening.kind,
        settings=about,
    )


class MaskedRound:
    """Collects masked vectors from the asked sites, and then what takes the masks off their sum.

    It closes with the vectors that had come when all had, or enough, or the deadline passed. It
    fails if fewer sites than the threshold are left at any time; no update is known then.
    """

    def __init__(
        self,
        opening: Opening,
        settings: Secagg,
        roster: Roster,
        about: str = "",
        grain: float = 0.0,
        enough: int = 0,
    ) -> None:
        """`about` is that of `terms_of`; `grain` is not 0 if sites share their sum's noise.

        Slower sites are called back, and drop out, once `enough` vectors are there, 0 for all;
        never before a threshold is.
        """
        self.opening, self._settings, self._roster = opening, settings, roster
        self._about, self._grain, self._enough = about, grain, enough
        self._sums: Coordinator | None = None
        self._brief: Brief | None = None
        self._counted: dict[SiteId, Counted] = {}
        self._missing: dict[SiteId, str] = {}
        self._final: set[SiteId] = set()
        self._over = False

    @property
    def progress(self) -> str:
        """How far it is, for a person."""
        asked, lost = len(self.opening.asked), len(self._missing)
        phase = self._sums.phase if self._sums else Phase.NEW
        where = f"{len(self._counted)} of {asked} sites' masked vectors came"
        if phase in (Phase.CONSENTED, Phase.UNMASKED):
            where = f"unmasking the sum of {len(self._counted)} of {asked} sites"
        return where + (f", {lost} lost" if lost else "")

    @property
    def terms(self) -> Terms:
        """What the round is about, once it is open."""
        return self._open_sums().terms

    def awaits(self, token: str) -> bool:
        """True if `token` is of a deadline that still matters."""
        return not self._over and token == self._token

    def open(self, brief: Brief) -> list[SendTask | WakeAt]:
        """Start the round: one task per site, a deadline, and one for the first exchange."""
        opening, self._brief = self.opening, brief
        shared = self._grain != 0
        terms = terms_of(opening, brief, self._settings, self._roster, self._about, shared=shared)
        self._sums = Coordinator(self._roster, terms)
        tasks = [
            Task(opening.task_id(site), opening.run, opening.number, site, opening.kind, brief)
            for site in opening.asked
        ]
        deadline = WakeAt(opening.deadline, opening.token)
        return [*(SendTask(task) for task in tasks), deadline, self._patience()]

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; return what the host must do now."""
        if self._over:
            return []
        commands: list[Command] = []
        match event:
            case Said():
                self._hear(event)
                commands = self._call_back_slow_ones()
            case SiteLost(site, reason, final, task):
                if task in (None, self.opening.task_id(site)):
                    self._lose(site, reason, final=final)
            case DeadlinePassed():
                commands = self._give_up_on_late_ones()
            case UpdateArrived(answer) | ReportArrived(answer):
                self._lose(answer.site, "its answer came unmasked, and was dropped")
            case SumArrived(total):
                for summand in total.summands:
                    self._lose(summand.site, "its answer came unmasked, and was dropped")
            case StackArrived():
                raise AssertionError("a host of masked rounds hands in vectors one by one")
        return [*commands, *self._go_on()]

    def abandon(self, reason: str) -> list[Command]:
        """End the round without a result, whoever has answered; its tasks are cancelled."""
        if self._over:
            return []
        return self._fail(RoundFailed(f"round {self.opening.number}: {reason}"), reason)

    def _hear(self, said: Said) -> None:
        site = said.message.site
        if site in self._missing or said.task != self.opening.task_id(site):
            return
        sums = self._open_sums()
        try:
            counts = sums.take(said.message, said.words)
        except (Untrusted, MalformedMessage) as error:
            self._lose(site, f"answer refused: {error}")
            return
        if counts and isinstance(said.message, Masked):
            self._counted[site] = Counted(site, 0.0, said.digest, said.epsilon)

    def _lose(self, site: SiteId, reason: str, *, final: bool = False) -> None:
        self._open_sums().lose(site)
        if site in self.opening.asked and site not in self._counted:
            self._missing.setdefault(site, reason)
            if final:
                self._final.add(site)

    def _give_up_on_late_ones(self) -> list[Command]:
        sums = self._open_sums()
        patience = self.opening.deadline if sums.phase is Phase.MASKED else self._settings.patience
        return self._give_up(f"no answer within {patience:g} s")

    def _call_back_slow_ones(self) -> list[Command]:
        sums = self._open_sums()
        enough = max(self._enough, sums.terms.threshold) if self._enough else math.inf
        if sums.phase is not Phase.MASKED or len(self._counted) < enough:
            return []
        return self._give_up("not waited for: enough masked vectors came")

    def _give_up(self, reason: str) -> list[Command]:
        """Wait for nobody in this phase; whose vector is not there is called back."""
        asked, task_of = self.opening.asked, self.opening.task_id
        late = [site for site in asked if site in self._open_sums().waiting]
        for site in late:
            self._lose(site, reason)
        return [CancelTask(task_of(s), s, reason) for s in late if s in self._missing]

    def _go_on(self) -> list[Command]:
        """Go to the next phase, and the next, as far as nobody is waited for."""
        commands: list[Command] = []
        sums = self._open_sums()
        if sums.is_hopeless:
            sums.waiting.clear()
        while not sums.waiting and not self._over:
            try:
                commands += self._close() if sums.phase is Phase.UNMASKED else self._advance()
            except RoundFailed as error:
                commands += self._fail(error, "not waited for: too few sites are left")
        return commands

    def _advance(self) -> list[Command]:
        sums, opening = self._open_sums(), self.opening
        told = sums.advance()
        relays = [Relay(opening.task_id(site), site, message) for site, message in told.items()]
        for site in [site for site in sums.waiting if site in self._missing]:
            sums.lose(site)
        return [*relays] if sums.phase is Phase.MASKED else [*relays, self._patience()]

    def _close(self) -> list[Command]:
        assert self._brief is not None, "handle() before open()"
        total, settings = self._open_sums().finish(), self._settings
        if self.opening.kind == "evaluate":
            close = Close(vectors.scores_in(total, settings), self._account())
        else:
            count = len(self._counted)
            aggregate = vectors.aggregate_of(total, count, self._brief, settings, self._grain)
            close = Close(aggregate, self._account())
        self._over = True
        return [close]

    def _fail(self, error: RoundFailed, reason: str) -> list[Command]:
        self._over = True
        left = [site for site in self.opening.asked if site not in self._missing]
        self._counted.clear()
        for site in left:
            self._lose(site, reason)
        if isinstance(error, QuorumLost):
            why = "; ".join(f"{site}: {told}" for site, told in self._missing.items())
            error = QuorumLost(f"{error} ({why})")
        cancels = [CancelTask(self.opening.task_id(site), site, reason) for site in left]
        return [*cancels, Fail(error, self._account())]

    @property
    def _token(self) -> str:
        """What the `WakeAt` of the current phase carries."""
        phase = self._open_sums().phase
        return self.opening.token if phase is Phase.MASKED else f"{self.opening.token}.{phase.name}"

    def _patience(self) -> WakeAt:
        return WakeAt(self._settings.patience, self._token)

    def _open_sums(self) -> Coordinator:
        assert self._sums is not None, "handle() before open()"
        return self._sums

    def _account(self) -> Account:
        return Account.of(self.opening.asked, self._counted, self._missing, self._final)
