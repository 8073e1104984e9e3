"""What comes in for a round: sites' answers, read and turned into the round's events.

An update is held in the store until the round has made of it what it will.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from fedml import failpoints
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.holds import Holds
from fedml.coordinator.patience import insist
from fedml.coordinator.post import opened
from fedml.coordinator.sizes import largest_update
from fedml.errors import FedmlError, MalformedMessage, Refused
from fedml.params import read
from fedml.protocol.messages import (
    Assignment,
    Declined,
    Failed,
    Scored,
    SecaggSaid,
    SiteId,
    Summed,
    TaskId,
    Trained,
)
from fedml.protocol.tasks import Report, Sum, Update
from fedml.rounds.hosting import Event
from fedml.rounds.masked import Said
from fedml.rounds.round import ReportArrived, SiteLost, SumArrived, UpdateArrived

_LONGEST_REASON = 300  # characters of a site's own words that go into a receipt


class Intake:
    """Answers on their way to one round's host, which is told of them as events.

    `wait` hears why something is tried again, and "" once that is over.
    """

    def __init__(
        self,
        desk: Desk,
        holds: Holds,
        tell: Callable[[Event], None],
        wait: Callable[[str], None],
        masked: Callable[[SiteId, Trained], Said] | None = None,
    ) -> None:
        self._desk, self._holds, self._tell, self._wait = desk, holds, tell, wait
        self._masked = masked  # what reads masked words; regions get none
        self._uploads: Counter[str] = Counter()  # not folded in yet, by digest
        self._asked_again: set[TaskId] = set()

    async def answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        """Turn an answer into an event; a malformed update counts as the site's failure."""
        match answer:
            case Declined(task, reason, for_now):
                self._tell(SiteLost(site, one_line(reason), final=not for_now, task=task))
            case Failed(task, reason):
                self._tell(SiteLost(site, one_line(reason), task=task))
            case Scored(task, totals, count, epsilon):
                report = Report(task, order.round, site, totals, count, epsilon)
                self._tell(ReportArrived(report))
            case SecaggSaid(task):
                self._tell(SiteLost(site, "masked rounds go through no region", task=task))
            case Trained() | Summed():
                await self._uploaded(site, order, answer)

    async def _uploaded(self, site: SiteId, order: Assignment, answer: Trained | Summed) -> None:
        digest = (answer.sent if isinstance(answer, Trained) else answer.total).digest
        self._hold(digest)
        try:
            reading = partial(asyncio.to_thread, self._read, site, order, answer)
            event = await insist(reading, self._wait)  # unpacking takes room on the disk
        except (FedmlError, OSError) as error:
            self._let_go(digest)
            gone = isinstance(error, Refused | OSError)  # maybe with another run's equal update
            if gone and order.task not in self._asked_again:
                self._asked_again.add(order.task)
                for owing, task in _owing(site, answer):
                    self._desk.remind(owing, task)
            else:
                for owing, task in _owing(site, answer):
                    why = f"update refused: {one_line(str(error))}"
                    self._tell(SiteLost(owing, why, task=task))
        else:
            self._hold(event.digest)  # which is the same, unless it came as a parcel
            self._let_go(digest)
            failpoints.reach("update.read")
            self._tell(event)

    def _read(
        self, site: SiteId, order: Assignment, answer: Trained | Summed
    ) -> UpdateArrived | SumArrived | Said:
        if isinstance(answer, Summed):
            parts = read(self._holds.store.path(answer.total.digest))
            total = Sum(order.round, answer.summands, parts, answer.reach)
            return SumArrived(total, site, answer.total.digest)
        if order.masking:
            if self._masked is None:
                raise MalformedMessage("masked words come to no region")
            return self._masked(site, answer)
        parts = opened(self._holds.store, order, answer, largest_update(order))
        if "delta" not in parts:
            raise MalformedMessage(f"an update without a delta: {sorted(parts)[:5]}")
        delta = parts.pop("delta")
        update = Update(
            task=answer.task,
            round=order.round,
            site=site,
            delta=delta,
            weight=answer.weight,
            slots=parts,
            metrics=answer.metrics,
            epsilon=answer.epsilon,
        )
        return UpdateArrived(update, answer.update.digest)

    def taken(self, event: object) -> None:
        """The round has made of an update what it will: if it counts, it is part of the sum."""
        match event:
            case UpdateArrived(update, digest):
                self._let_go(digest)
                self._desk.settle(update.site, update.task)
            case Said(task, message, _, digest) if digest:
                self._let_go(digest)
                self._desk.settle(message.site, task)
            case SumArrived(total, _, digest):
                self._let_go(digest)
                for summand in total.summands:
                    self._desk.settle(summand.site, summand.task)
            case _:
                pass

    def close(self) -> None:
        """Let go of all that was not taken."""
        for digest in list(self._uploads.elements()):
            self._let_go(digest)

    def _hold(self, digest: str) -> None:
        self._holds.hold(digest)
        self._uploads[digest] += 1

    def _let_go(self, digest: str) -> None:
        self._uploads[digest] -= 1
        self._holds.let_go(digest)


def _owing(site: SiteId, answer: Trained | Summed) -> list[tuple[SiteId, TaskId]]:
    """Return whose tasks an answer answers."""
    if isinstance(answer, Trained):
        return [(site, answer.task)]
    return [(summand.site, summand.task) for summand in answer.summands]


def one_line(reason: str) -> str:
    """Return a site's words as one short line: they go to operators' terminals."""
    plain = "".join(letter if letter.isprintable() else " " for letter in reason)
    return " ".join(plain.split())[:_LONGEST_REASON]
