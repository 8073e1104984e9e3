"""One synchronous round as a state machine: asked, answered, over.

Rule 1: whatever decides the fate of a round is in this file.
Rule 2: nothing here does IO or reads a clock; a host feeds events and carries out commands.
Rule 3: what counts does not depend on the order of arrival, to the last bit.
Hosts are the coordinator (gRPC) and the simulation; both run this same code. `Run` strings
rounds together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from fedml.errors import ConfigError, MalformedMessage, QuorumLost, RoundFailed
from fedml.protocol.messages import RunId, Scores, SiteId, TaskId
from fedml.protocol.operations import Counted, round_of
from fedml.protocol.tasks import Brief, Report, Stack, Sum, Task, Update
from fedml.rounds.answers import TODAY, Answers, Lags, Reports, Updates
from fedml.strategies import Aggregate, Reducer

Kind = Literal["train", "evaluate"]


# --- events ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UpdateArrived:
    """A site answered; who it is and the bytes' `digest` were checked by the host."""

    update: Update
    digest: str = ""


@dataclass(frozen=True)
class StackArrived:
    """Many simulated sites answered at once; `digests` has one a row, or none at all."""

    stack: Stack
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class SumArrived:
    """A region's leaves answered, in one; that they are its leaves was checked by the host."""

    total: Sum
    region: SiteId
    digest: str = ""


@dataclass(frozen=True)
class ReportArrived:
    """A site scored the model; who it is was checked by the host."""

    report: Report


@dataclass(frozen=True)
class SiteLost:
    """A site will not answer; `final` if asking again is useless (policy, budget).

    With `task` it speaks of that task alone, so an old refusal cannot end a new attempt.
    """

    site: SiteId
    reason: str
    final: bool = False
    task: TaskId | None = None


@dataclass(frozen=True)
class DeadlinePassed:
    """The time asked for by `WakeAt` has come, and `awaits` says that it still matters."""


Event = UpdateArrived | StackArrived | SumArrived | ReportArrived | SiteLost | DeadlinePassed


# --- commands ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendTask:
    """Give `task` to its site, now or when it is back; the site does it once."""

    task: Task


@dataclass(frozen=True)
class CancelTask:
    """Tell `site` that the answer to `task` is no longer wanted."""

    task: TaskId
    site: SiteId
    reason: str


@dataclass(frozen=True)
class WakeAt:
    """Come back with `token` in this many seconds; an outdated token does no harm."""

    seconds: float
    token: str


@dataclass(frozen=True)
class Account:
    """What a receipt needs to know: who was asked, who counted, who did not and why.

    `final` are the missing sites that refused for good. All are in the order of asking. `stale`
    and `carried` are as in a receipt.
    """

    asked: tuple[SiteId, ...]
    counted: tuple[Counted, ...]
    missing: Mapping[str, str]
    final: tuple[SiteId, ...]
    stale: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        asked: tuple[SiteId, ...],
        counted: Mapping[SiteId, Counted],
        missing: Mapping[SiteId, str],
        final: Collection[SiteId],
    ) -> Account:
        """Put what was found out in the order of asking."""
        return cls(
            asked,
            tuple(counted[site] for site in asked if site in counted),
            {site: missing[site] for site in asked if site in missing},
            tuple(site for site in asked if site in final),
        )


@dataclass(frozen=True)
class Close:
    """The round succeeded: with an `Aggregate` to advance by, or with mean scores."""

    total: Aggregate | Scores
    account: Account


@dataclass(frozen=True)
class Fail:
    """The round is over without a result."""

    error: RoundFailed
    account: Account


Command = SendTask | CancelTask | WakeAt | Close | Fail


# --- the machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opening:
    """What is fixed when a round opens; re-opening one after a crash sends the same tasks.

    `carried` are tasks of earlier rounds that some of the asked still work on, instead of new ones.
    """

    run: RunId
    number: int
    attempt: int
    asked: tuple[SiteId, ...]
    quorum: int
    deadline: float
    kind: Kind = "train"
    carried: tuple[TaskId, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= len(set(self.asked)) == len(self.asked):
            raise ConfigError(
                f"round {self.number}: quorum {self.quorum} of {len(self.asked)} sites asked; "
                "ask each site once, and at least the quorum"
            )

    @cached_property
    def token(self) -> str:
        """What the deadline's `WakeAt` carries."""
        mark = "e" if self.kind == "evaluate" else ""
        return f"{self.number}.{mark}{self.attempt}"

    def task_id(self, site: SiteId) -> TaskId:
        """Return the id of a site's task: `run.round.attempt.site`, an `e` marks evaluations."""
        return self._older.get(site) or TaskId(self._prefix + site)

    def round_of(self, site: SiteId) -> int:
        """Return the round of a site's task: this one, or that from which it was carried over."""
        older = self._older.get(site)
        return round_of(self.run, older) if older else self.number

    @cached_property
    def _older(self) -> Mapping[SiteId, TaskId]:
        return {SiteId(task.split(".", self._dots)[-1]): task for task in self.carried}

    @property
    def _dots(self) -> int:
        return self.run.count(".") + 3

    @cached_property
    def _prefix(self) -> str:
        return f"{self.run}.{self.token}."


class Round:
    """Collects answers from the asked sites until all have spoken or the deadline passed.

    It closes with at least the quorum, and fails as soon as that is out of reach. Each site
    counts once; answers from strangers, to other tasks or after the end change nothing. An
    answer that fails a check counts as missing, with its reason.
    """

    def __init__(
        self,
        opening: Opening,
        reducer: Reducer,
        reports: frozenset[str] = frozenset(),
        *,
        coarse: bool = False,
        lags: Lags = lambda _: TODAY,
    ) -> None:
        """Make a round whose updates must report the slots `reports`; their deltas are rounded to
        bfloat16 if `coarse`, and those that answer older models treated as `lags` says.
        """
        self.opening = opening
        self._waiting = set(opening.asked)
        self._counted: dict[SiteId, Counted] = {}
        self._missing: dict[SiteId, str] = {}
        self._final: set[SiteId] = set()
        self._over = False
        self._brief: Brief | None = None
        train = opening.kind == "train"
        self._answers: Answers = (
            Updates(reducer, reports, coarse=coarse, lags=lags) if train else Reports()
        )

    @property
    def progress(self) -> str:
        """How far it is, for a person."""
        counted, lost, asked = len(self._counted), len(self._missing), len(self.opening.asked)
        return f"{counted} of {asked} sites answered" + (f", {lost} lost" if lost else "")

    def awaits(self, token: str) -> bool:
        """True if `token` is of a deadline that still matters."""
        return not self._over and token == self.opening.token

    def open(self, brief: Brief) -> list[SendTask | WakeAt]:
        """Start the round: one task per site that has none, and a deadline."""
        self._brief, opening = brief, self.opening
        tasks = [
            Task(opening.task_id(site), opening.run, opening.number, site, opening.kind, brief)
            for site in opening.asked
            if opening.task_id(site) not in opening.carried
        ]
        return [*(SendTask(task) for task in tasks), WakeAt(opening.deadline, opening.token)]

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; return what the host must do now."""
        if self._over:
            return []
        match event:
            case UpdateArrived(update, digest):
                self._count(update, update.weight, digest)
            case StackArrived(stack, digests):
                self._count_stack(stack, digests or ("",) * len(stack))
            case SumArrived(total):
                self._count_sum(total)
            case ReportArrived(report):
                self._count(report, report.count, "")
            case SiteLost(site, reason, final, task):
                if task in (None, self.opening.task_id(site)):
                    self._lose(site, reason, final=final)
            case DeadlinePassed():
                return self._end(f"no answer within {self.opening.deadline:g} s")
        return self._end(reason) if (reason := self._is_settled()) else []

    def _is_settled(self) -> str:
        """Say why nobody else is waited for; "" if somebody is."""
        if self._waiting and len(self._counted) + len(self._waiting) >= self.opening.quorum:
            return ""
        return "not waited for: a quorum is out of reach"

    def abandon(self, reason: str) -> list[Command]:
        """End the round without a result, whoever has answered; its tasks are cancelled."""
        return [] if self._over else self._end(reason, abandoned=True)

    def _count(self, answer: Update | Report, weight: float, digest: str) -> None:
        site = answer.site
        if site not in self._waiting or answer.task != self.opening.task_id(site):
            return
        assert self._brief is not None, "handle() before open()"
        try:
            if answer.round != self.opening.round_of(site):
                raise MalformedMessage(f"it is for round {answer.round}")
            self._answers.add(answer, self._brief)
        except MalformedMessage as error:
            self._lose(site, f"answer refused: {error}")
            return
        self._waiting.discard(site)
        self._counted[site] = Counted(site, weight, digest, answer.epsilon)

    def _count_stack(self, stack: Stack, digests: tuple[str, ...]) -> None:
        """Count each row as `_count` would, in the stack's order."""
        assert self._brief is not None, "handle() before open()"
        rows = self._due(stack)
        due = stack.take(rows)
        if any(stack.round != self.opening.round_of(site) for site in due.sites):
            why = f"it is for round {stack.round}"
            refused: Mapping[int, str] = dict.fromkeys(range(len(rows)), why)
        else:
            refused = self._answers.add_stack(due, self._brief) if rows else {}
        for number, reason in refused.items():
            self._lose(due.sites[number], f"answer refused: {reason}")
        told = [digests[row] for row in rows]
        spent = due.epsilons or (0.0,) * len(rows)
        self._counted.update(
            zip(due.sites, map(Counted, due.sites, due.weights, told, spent), strict=True)
        )
        for number in refused:
            del self._counted[due.sites[number]]
        self._waiting.difference_update(due.sites)

    def _count_sum(self, total: Sum) -> None:
        """Count all of a sum's sites or none: what is no longer waited for cannot be taken out."""
        assert self._brief is not None, "handle() before open()"
        due = [s for s in total.summands if s.task == self.opening.task_id(s.site)]
        due = [s for s in due if s.site in self._waiting]
        if not due:
            return
        try:
            if total.round != self.opening.number:
                raise MalformedMessage(f"it is for round {total.round}")
            if len({s.site for s in due}) < len(total.summands):
                raise MalformedMessage("its region's sum holds others that are not waited for")
            self._answers.add_sum(total, self._brief)
        except MalformedMessage as error:
            for each in due:
                self._lose(each.site, f"answer refused: {error}")
            return
        for each in due:
            self._waiting.discard(each.site)
            counted = Counted(each.site, each.weight, each.digest, each.epsilon)
            self._counted[each.site] = counted

    def _due(self, stack: Stack) -> list[int]:
        """Return the rows that answer a task of ours, of each site the first."""
        rows: dict[SiteId, int] = {}
        for row, (site, task) in enumerate(zip(stack.sites, stack.tasks, strict=True)):
            if site in self._waiting and site not in rows and task == self.opening.task_id(site):
                rows[site] = row
        return [*rows.values()]

    def _lose(self, site: SiteId, reason: str, *, final: bool = False) -> None:
        if site in self._waiting:
            self._waiting.discard(site)
            self._missing[site] = reason
            if final:
                self._final.add(site)

    def _end(self, reason: str, *, abandoned: bool = False) -> list[Command]:
        stragglers = [site for site in self.opening.asked if site in self._waiting]
        for site in stragglers:
            self._lose(site, reason)
        self._over = True
        cancels = [CancelTask(self.opening.task_id(s), s, reason) for s in stragglers]
        return [*cancels, self._verdict(reason if abandoned else "")]

    def _verdict(self, abandoned: str) -> Command:
        number, quorum, account = self.opening.number, self.opening.quorum, self._account()
        if abandoned:
            return Fail(RoundFailed(f"round {number}: {abandoned}"), account)
        if len(self._counted) < quorum:
            why = "; ".join(f"{site}: {reason}" for site, reason in account.missing.items())
            have = f"round {number}: {len(self._counted)} of {quorum} sites needed"
            return Fail(QuorumLost(f"{have} ({why})"), account)
        try:
            return Close(self._answers.result(), account)
        except MalformedMessage as error:
            return Fail(RoundFailed(f"round {number}: {error}"), account)

    def _account(self) -> Account:
        return Account.of(self.opening.asked, self._counted, self._missing, self._final)
