"""The host of a region's share of one round: real leaves, a folder that survives, the parent.

Orders and sealed sums lie in the folder until the parent lets the last task be forgotten. What
was not sealed when the region died is asked for again: the leaves keep their updates.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from fedml import durable, failpoints
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.holds import Holds
from fedml.coordinator.intake import Intake
from fedml.coordinator.patience import insist
from fedml.errors import FedmlError, MalformedMessage, Refused, TaskFailed, Unreachable
from fedml.params import pieces, read
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Declined,
    Failed,
    Lot,
    Orders,
    Relayed,
    Scored,
    SiteEvent,
    SiteId,
    Summed,
    TaskId,
)
from fedml.protocol.parcels import is_coarse
from fedml.protocol.tasks import Brief, Sum
from fedml.rounds.hosting import Event
from fedml.rounds.round import DeadlinePassed, ReportArrived, SiteLost, UpdateArrived
from fedml.rounds.share import (
    Ask,
    Deliver,
    Discard,
    Lose,
    Pass,
    Scoring,
    Seal,
    Share,
    Step,
    Summing,
)
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import transit_blob
from fedml.transport.link import Link

_IN_TIME = 0.8  # of a round's deadline, after which what there is is summed and sent up
_ORDERS, _SUMMED, _SUM = "orders", ".summed", ".safetensors"
_log = structlog.get_logger()


@dataclass(frozen=True)
class _Back:
    """The parent waits for these tasks no longer."""

    tasks: tuple[TaskId, ...]


@dataclass
class _Sealed:
    """A sum on the disk, and the job that hands it in."""

    path: Path
    summed: Summed
    job: asyncio.Task[None] | None = None


class ShareHost:
    """Plays one share until all its tasks are forgotten. `tell` sends an event up if it can."""

    def __init__(
        self,
        folder: Path,
        orders: Orders,
        *,
        desk: Desk,
        holds: Holds,
        link: Link,
        tell: Callable[[SiteEvent], None],
        backoff: Backoff,
    ) -> None:
        self._folder, self._order = folder, orders.order
        self.lots = {lot.task: lot for lot in orders.lots}  # that are not forgotten
        self._desk, self._holds, self._link = desk, holds, link
        self._tell, self._backoff = tell, backoff
        self._inbox: asyncio.Queue[Event | DeadlinePassed | _Back | Orders] = asyncio.Queue()
        self._intake = Intake(desk, holds, self._inbox.put_nowait, _waits)
        self._sealed: dict[frozenset[TaskId], _Sealed] = {}
        self._count = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._work: asyncio.Task[None] | None = None

    @staticmethod
    def kept(folder: Path) -> Orders | None:
        """Return the orders that lie in a share's folder, None if they do not read."""
        try:
            return codec.decode(Orders, (folder / _ORDERS).read_bytes())
        except (OSError, MalformedMessage):
            return None

    def take(self, orders: Orders) -> None:
        """Begin with orders, or hear of more, or again of those that are open.

        Others under the same ids, as from a parent whose folder was made anew, are not taken:
        what is kept for these must never answer those.
        """
        if orders.order != self._order:
            reason = "its region keeps another order under this id; a next attempt has another"
            for lot in orders.lots:
                self._relay(lot, Failed(lot.task, reason))
            return
        self.lots.update({lot.task: lot for lot in orders.lots})
        self._inbox.put_nowait(orders)
        if self._work is None:
            self._work = asyncio.create_task(self._play())
            self._work.add_done_callback(partial(_tell_bug, orders.order.task))

    async def answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        """Take in a leaf's answer."""
        await self._intake.answered(site, order, answer)

    def lost(self, site: SiteId, reason: str) -> None:
        """A leaf is away for longer than it may be."""
        self._inbox.put_nowait(SiteLost(site, reason))

    def take_back(self, tasks: Sequence[TaskId]) -> None:
        """The parent waits for these no longer."""
        self._inbox.put_nowait(_Back(tuple(tasks)))

    async def stop(self) -> None:
        """Let go of everything but the folder."""
        works = [s.job for s in self._sealed.values() if s.job is not None]
        works += [self._work] if self._work is not None else []
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        if self._deadline is not None:
            self._deadline.cancel()
        self._intake.close()
        for sealed in self._sealed.values():
            self._holds.let_go(sealed.summed.total.digest)

    async def conclude(self) -> None:
        """All is forgotten, and so is the folder."""
        await self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- the work -----------------------------------------------------------------------------

    async def _play(self) -> None:
        for path, summed in await asyncio.to_thread(self._found):
            self._keep(path, summed)
        held = self._order.model.digest
        self._holds.hold(held)
        try:
            share = await self._begin()
            while True:
                item = await self._inbox.get()
                for step in await self._decide(share, item):
                    await insist(partial(self._carry_out, step), _waits)
                self._intake.taken(item)
                del item  # or an update would stay mapped while we wait
        except FedmlError as error:
            _log.error("a round cannot be shared", reason=str(error), task=self._order.task)
            for lot in self.lots.values():
                self._relay(lot, Failed(lot.task, str(error)))
            await self._fail(str(error))
        finally:
            self._holds.let_go(held)

    async def _fail(self, reason: str) -> None:
        """Say of each task that nothing will come of it, whenever it is asked for."""
        while True:
            item = await self._inbox.get()
            if isinstance(item, Orders):
                for lot in item.lots:
                    self._relay(lot, Failed(lot.task, reason))

    async def _begin(self) -> Share:
        """Fetch the model, and make of it what the leaves' updates are held against."""
        order, store = self._order, self._holds.store
        try:
            await insist(lambda: self._link.download(order.model, store), _waits)
        except Refused as error:
            raise TaskFailed(f"the parent withholds the model: {error}") from error
        if order.kind == "evaluate":
            return Scoring()
        parts = await asyncio.to_thread(read, store.path(order.model.digest))
        if "" not in parts:
            raise MalformedMessage("a model without parameters")
        brief = Brief(parts.pop(""), order.rule, order.settings, parts)
        lots, coarse = [*self.lots.values()], is_coarse(order.up)
        return Summing(order.round, brief, lots, [*self._sealed], coarse=coarse)

    async def _decide(
        self, share: Share, item: Event | DeadlinePassed | _Back | Orders
    ) -> list[Step]:
        """Let the share take something in; an update is megabytes to add, so not on the loop."""
        match item:
            case Orders():
                await insist(partial(asyncio.to_thread, self._note), _waits)
                failpoints.reach("orders.noted")
                self._wake()
                return share.ask([lot for lot in item.lots if lot.task in self.lots])
            case _Back(tasks):
                return share.take_back(tasks)
            case UpdateArrived() | ReportArrived() | SiteLost() | DeadlinePassed():
                return await asyncio.to_thread(share.handle, item)
            case _:
                raise AssertionError(f"{type(item).__name__} is nothing that leaves cause")

    async def _carry_out(self, step: Step) -> None:
        match step:
            case Ask(lot):
                whole = replace(self._order, task=lot.task, seed=lot.seed, parcels=())
                self._desk.assign(lot.site, whole)
                self._desk.expect(lot.site)
            case Lose(lot, reason, final):
                said = Declined(lot.task, reason) if final else Failed(lot.task, reason)
                self._relay(lot, said)
            case Pass(report):
                scored = Scored(report.task, report.totals, report.count, report.epsilon)
                self._relay(self.lots.get(report.task), scored)
            case Seal(total):
                await self._seal(total)
            case Deliver(tasks):
                self._deliver(self._sealed[tasks])
            case Discard(tasks):
                self._discard(tasks)

    def _relay(self, lot: Lot | None, event: SiteEvent) -> None:
        if lot is not None:  # else it was forgotten meanwhile
            self._tell(Relayed(lot.site, codec.encode_event(event)))

    def _wake(self) -> None:
        """Have the deadline run from now on, as the parent's does when it asks."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(
            _IN_TIME * self._order.deadline, self._inbox.put_nowait, DeadlinePassed()
        )

    # --- what lies in the folder --------------------------------------------------------------

    def _note(self) -> None:
        orders = Orders(self._order, tuple(self.lots.values()))
        durable.replace(self._folder / _ORDERS, codec.encode(orders))

    def _found(self) -> list[tuple[Path, Summed]]:
        """Return the sums that were sealed before a restart, and are whole."""
        found = []
        for path in sorted(self._folder.glob(f"*{_SUMMED}")):
            total = path.with_suffix(_SUM)
            self._count = max(self._count, int(path.stem))
            with suppress(OSError, MalformedMessage):
                summed = codec.decode(Summed, path.read_bytes())
                if transit_blob(total) == summed.total:
                    found.append((total, summed))
        return found

    def _keep(self, path: Path, summed: Summed) -> _Sealed:
        sealed = _Sealed(path, summed)
        self._sealed[frozenset(s.task for s in summed.summands)] = sealed
        self._holds.hold(summed.total.digest)
        return sealed

    async def _seal(self, total: Sum) -> None:
        self._count += 1
        path = self._folder / f"{self._count}{_SUM}"

        def write() -> Summed:
            durable.replace(path, *pieces(total.parts))
            summed = Summed(transit_blob(path), total.summands, total.reach)
            durable.replace(path.with_suffix(_SUMMED), codec.encode(summed))
            return summed

        summed = await asyncio.to_thread(write)
        failpoints.reach("sum.kept")
        _log.info("sum kept", task=self._order.task, sites=len(total.summands))
        self._deliver(self._keep(path, summed))

    def _discard(self, tasks: frozenset[TaskId]) -> None:
        sealed = self._sealed.pop(tasks)
        if sealed.job is not None:
            sealed.job.cancel()
        self._holds.let_go(sealed.summed.total.digest)
        sealed.path.with_suffix(_SUMMED).unlink(missing_ok=True)
        sealed.path.unlink(missing_ok=True)

    def _deliver(self, sealed: _Sealed) -> None:
        if sealed.job is None or sealed.job.done():
            sealed.job = asyncio.create_task(self._hand_in(sealed))

    async def _hand_in(self, sealed: _Sealed) -> None:
        """Upload a sum and announce it; the orders come again if the parent did not hear of it."""
        summed, store, waits = sealed.summed, self._holds.store, iter(self._backoff)
        while True:
            try:
                await asyncio.to_thread(store.put_link, sealed.path, summed.total)
                await self._link.upload(summed.total, store, summed.summands[0].task)
                failpoints.reach("sum.uploaded")
                return self._tell(summed)
            except Unreachable as error:
                _log.info("a sum waits", reason=str(error), task=self._order.task)
                await asyncio.sleep(next(waits))
            except FedmlError as error:  # its round is over, or what it would not take
                _log.warning("a sum was not taken", reason=str(error), task=self._order.task)
                reason = f"the parent does not take its region's sum: {error}"
                for summand in summed.summands:
                    self._relay(self.lots.get(summand.task), Failed(summand.task, reason))
                return


def _tell_bug(task: TaskId, work: asyncio.Task[None]) -> None:
    if not work.cancelled() and (error := work.exception()):
        _log.error("a bug ended a region's share of a round", task=task, exc_info=error)


def _waits(reason: str) -> None:
    if reason:
        _log.warning("a region waits", reason=reason)
