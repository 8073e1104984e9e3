"""The clerk: takes orders, has them done, and hands in what came of each, once.

What may be done it takes from `gate`, and what may leave from `door`. What is finished lies on the
disk until it is told to forget, so an order that comes twice is answered with the same bytes; what
was answered and forgotten is never done again, for that would be a second release.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from fedml import durable, failpoints, telemetry
from fedml.errors import Busy, FedmlError, Refused, TaskFailed, Unreachable, Untrusted
from fedml.learning.recipe import installed
from fedml.protocol.messages import (
    FORMS,
    Accepted,
    Assignment,
    Blob,
    Declined,
    Failed,
    Parcel,
    RecipeId,
    RunId,
    SecaggTold,
    SiteEvent,
    TaskId,
    Trained,
)
from fedml.secagg.terms import LEAST_COHORT, Demands
from fedml.site.door import Door, Ledgers
from fedml.site.foreman import Foreman
from fedml.site.gate import Permit, check_room, decide
from fedml.site.masks import Masks
from fedml.site.memory import Desk, Memory, Result
from fedml.site.policy import AllowedApp, Policy
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore, transit_blob
from fedml.transport.link import Link

_LARGEST_BLOB = 64 * 2**30  # bytes
_PLAYER = "fedml.flower.hand"  # a program beside us: we never import an app, nor Flower
_log = structlog.get_logger()

Tell = Callable[[SiteEvent], Awaitable[None]]


@dataclass
class _Job:
    """An order that is being answered; `again` is set when the coordinator asks once more."""

    order: Assignment
    work: asyncio.Task[None]
    again: asyncio.Event = field(default_factory=asyncio.Event)


class Clerk:
    """Answers the orders of one site. `link` hands blobs over, `tell` sends an event if it can."""

    def __init__(
        self,
        folder: Path,
        site: str,
        policy: Policy,
        ledgers: Ledgers,
        link: Link,
        tell: Tell,
        backoff: Backoff,
    ) -> None:
        self._site, self._policy = site, policy
        self._link, self._tell, self._backoff = link, tell, backoff
        self.installed: tuple[RecipeId, ...] = installed(policy.recipe_files)
        self._memory = Memory(folder)
        self._door = Door(ledgers, self._memory)
        # what a task needs lies in its own folder
        self._blobs = BlobStore.in_transit(folder / "blobs", _LARGEST_BLOB)
        self._foreman = Foreman(policy)
        self._player = Foreman(policy, _PLAYER)
        demands = Demands(max(LEAST_COHORT, policy.minimum_cohort), policy.colluders)
        self._masks = Masks(folder, site, demands, tell)
        self._chores: set[asyncio.Task[None]] = set()
        self._jobs: dict[TaskId, _Job] = {}
        self._draining = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._told: set[TaskId] = set()  # their answers were handed in, and not forgotten since
        self.answered = 0  # answers handed in, not counting again what was asked for again

    async def start(self) -> None:
        """Start the worker ahead of the first order; give back what is reserved for no order."""
        await self._door.give_back_orphans()
        if self._policy.datasets:
            await self._foreman.start()
        if self._policy.apps:
            await self._player.start()

    async def drain(self, seconds: float) -> None:
        """Take no further order, and wait at most `seconds` for those that are being answered.

        The others lie on the disk: the next clerk is asked for them again, and takes them up.
        """
        self._draining = True
        works = [job.work for job in self._jobs.values()]
        _log.info("draining", tasks=len(works), seconds=seconds)
        if works:
            await asyncio.wait(works, timeout=seconds)
        for job in self._jobs.values():
            _about(job.order).info("task parked; it is taken up at the next start")

    async def stop(self) -> None:
        """Stop working at once; what is on the disk is taken up again by the next clerk."""
        jobs = [*(job.work for job in self._jobs.values()), *self._leaving, *self._chores]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._foreman.stop()
        await self._player.stop()

    def kept(self) -> tuple[TaskId, ...]:
        """Return the tasks whose orders or results are on the disk."""
        return self._memory.kept()

    def runs(self) -> tuple[RunId, ...]:
        """Return the runs whose algorithm's own state is on the disk."""
        return self._memory.runs()

    def conclude(self, run: RunId) -> None:
        """Delete an algorithm's own state: its run is over."""
        _guarded(run, lambda: self._memory.conclude(run))

    @property
    def roster(self) -> str:
        """The digest of the roster of masked rounds that was accepted here."""
        return self._masks.roster

    def hear(self, told: SecaggTold) -> None:
        """Do what the coordinator says of a masked round."""
        self._chore(self._masks.hear(told))

    def _chore(self, work: Coroutine[None, None, None]) -> None:
        chore = asyncio.create_task(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    def take(self, order: Assignment) -> None:
        """Begin with an order; the same one while it is being answered is a reminder."""
        if self._draining:
            return  # it is sent again when we are back
        if job := self._jobs.get(order.task):
            job.again.set()
            if order.masking:  # perhaps our keys were lost on the way
                self._chore(self._masks.advertise(order))
            return
        job = _Job(order, asyncio.create_task(self._answer(order)))
        self._jobs[order.task] = job

        def done(work: asyncio.Task[None]) -> None:
            del self._jobs[order.task]
            if not work.cancelled() and (error := work.exception()):
                _about(order).error("a bug in the clerk", exc_info=error)

        job.work.add_done_callback(done)

    def drop(self, task: TaskId, reason: str) -> None:
        """Stop working on a task. What it would have cost is free again, unless it is charged."""

        def clear() -> None:
            if self._memory.result(task) is None:  # what is charged waits to be forgotten
                self._clear(task)

        self._after(task, reason, clear)

    def forget(self, task: TaskId, *, counted: bool) -> None:
        """Delete what is kept of a task, whose round is over."""
        reason = "its round is over"
        self._after(task, reason, lambda: self._clear(task, counted=counted))

    def _after(self, task: TaskId, reason: str, act: Callable[[], None]) -> None:
        """Do `act` once nobody works on `task`, which is at once if nobody does."""
        job = self._jobs.get(task)
        if job is None:
            _guarded(task, act)
            return
        if not job.work.cancelling():
            _about(job.order).info("task cancelled", reason=reason)
            job.work.cancel()
        leave = asyncio.create_task(self._leave(job, lambda: _guarded(task, act)))
        self._leaving.add(leave)
        leave.add_done_callback(self._leaving.discard)

    @staticmethod
    async def _leave(job: _Job, act: Callable[[], None]) -> None:
        await asyncio.wait([job.work])
        act()

    def _clear(self, task: TaskId, *, counted: bool = False) -> None:
        order, result = self._memory.assignment(task), self._memory.result(task)
        self._door.forget(task, counted=counted)
        self._told.discard(task)
        self._masks.drop(task)
        if isinstance(result, Trained):
            self._blobs.delete(result.sent.digest)
        if order is not None:
            self._blobs.delete(order.model.digest)

    # --- one order ----------------------------------------------------------------------------

    async def _answer(self, order: Assignment) -> None:
        """Answer an order with its result, or with the reason why there is none."""
        log, waits = _about(order), iter(self._backoff)
        while True:
            try:
                result = await self._result(order)
                await self._deliver(order, result)
                self._note_answer(order.task)
                return telemetry.TASKS.labels("delivered").inc()
            except Refused as error:
                log.warning("task refused", reason=str(error))
                telemetry.TASKS.labels("refused").inc()
                for_now = isinstance(error, Busy)
                return await self._tell(Declined(order.task, str(error), for_now))
            except Unreachable as error:
                log.info("task waits", reason=str(error))
                await self._pause(order.task, next(waits))
            except FedmlError as error:
                log.error("task failed", reason=str(error))
                telemetry.TASKS.labels("failed").inc()
                return await self._tell(Failed(order.task, str(error)))
            except Exception as error:  # the outermost loop of a task
                log.exception("a bug ended a task")
                telemetry.TASKS.labels("failed").inc()
                text = f"a bug at the site, {type(error).__name__}"
                return await self._tell(Failed(order.task, text))

    def _note_answer(self, task: TaskId) -> None:
        self.answered += task not in self._told
        self._told.add(task)

    async def _pause(self, task: TaskId, seconds: float) -> None:
        """Wait, but no longer than until the coordinator asks again."""
        again = self._jobs[task].again
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await again.wait()
        again.clear()

    async def _result(self, order: Assignment) -> Result:
        """Return the kept result, or do the work; it is charged when this returns."""
        if kept := self._door.released(order):
            return kept
        known = self._memory.assignment(order.task) == order
        # finding the noise takes seconds: the stream must beat meanwhile
        permit = await asyncio.to_thread(decide, self._policy, order, self.installed)
        if order.masking:
            self._masks.open(order, known=known)
        check_room(self._policy, self._others(order))  # no await until it is ours: no two fit in
        desk = await self._door.admit(order, permit)
        await self._tell(Accepted(order.task))
        if order.masking:
            await self._masks.advertise(order)
        try:
            await self._work(order, permit, desk)
        except TaskFailed:
            await self._door.give_back(order)
            raise
        failpoints.reach("work.done")
        return await self._door.release(order, permit, desk, self._mask)

    async def _mask(self, order: Assignment, desk: Desk, weight: float) -> None:
        """Put the masked words where the update would be, once the others' shares are here."""
        parts = durable.read_json(desk.outcome)["parts"]
        path = await self._masks.mask(order, desk.folder, parts, weight)
        path.replace(desk.update)

    def _others(self, order: Assignment) -> set[RunId]:
        """Return the other runs that we hold tasks of, but for those being dropped just now."""
        kept = (t for t in self._memory.kept() if not self._is_leaving(t))
        orders = (self._memory.assignment(task) for task in kept)
        return {other.run for other in orders if other is not None} - {order.run}

    def _is_leaving(self, task: TaskId) -> bool:
        job = self._jobs.get(task)
        return job is not None and job.work.cancelling() > 0

    async def _work(self, order: Assignment, permit: Permit, desk: Desk) -> None:
        """Have the outcome on the disk, unless a crash came between work and charge."""
        if desk.outcome.exists():
            return
        await self._fetch_model(order, desk)
        if order.keep_model:
            keep = self._memory.keep_model
            try:
                await asyncio.to_thread(keep, order.run, order.model.digest, desk.model)
            except OSError as error:  # the next one comes whole
                _about(order).warning("model not kept", reason=str(error))
        failpoints.reach("model.fetched")
        if permit.app is not None:
            await self._player.run(self._message(order, permit.app, desk), desk.outcome)
        else:
            await self._foreman.run(self._job(order, permit, desk), desk.outcome)

    async def _fetch_model(self, order: Assignment, desk: Desk) -> None:
        """Have the model on the desk: it is there already, or comes in a parcel, or whole."""
        desk.model.unlink(missing_ok=True)  # from before a power loss, perhaps half of it
        if await asyncio.to_thread(self._has_model, order, desk):
            return
        for parcel in order.parcels:
            base = self._memory.model(order.run, parcel.base) if parcel.base else None
            if parcel.form in FORMS and (base is not None or not parcel.base):
                try:
                    return await self._unpack(order, desk, parcel, base)
                except (Refused, Untrusted, TaskFailed) as error:  # whole is always right
                    _about(order).warning("parcel of no use", form=parcel.form, reason=str(error))
        try:
            await self._link.download(order.model, self._blobs)
        except Refused as error:
            raise TaskFailed(f"the coordinator withholds the model: {error}") from error
        self._lay(order.model, desk.model)

    def _has_model(self, order: Assignment, desk: Desk) -> bool:
        """Lay the run's last model on the desk, if this is the same."""
        try:
            last = self._memory.model(order.run, order.model.digest)
            if last is None or transit_blob(last) != order.model:
                return False
            desk.model.hardlink_to(last)
        except OSError:  # another task of the run has the next one
            return False
        return True

    async def _unpack(
        self, order: Assignment, desk: Desk, parcel: Parcel, base: Path | None
    ) -> None:
        """Fetch a parcel and have the worker unpack it, for the daemon looks into no tensor."""
        await self._link.download(parcel.blob, self._blobs)
        try:
            desk.model_parcel.unlink(missing_ok=True)
            self._lay(parcel.blob, desk.model_parcel)
            job = {
                "folder": str(desk.folder),
                "parcel": str(desk.model_parcel),
                "form": parcel.form,
                "base": str(base) if base else "",
                "model": str(desk.model),
                "private": False,
                "threads": self._policy.threads,
            }
            await self._foreman.run(job, desk.unpacked)
        finally:
            desk.model_parcel.unlink(missing_ok=True)
            self._blobs.delete(parcel.blob.digest)

    def _lay(self, blob: Blob, place: Path) -> None:
        """Give the task its own name for a blob: the store may drop it with an older task."""
        try:
            place.hardlink_to(self._blobs.path(blob.digest))
        except (Refused, FileNotFoundError) as error:
            raise Unreachable("the model left with another task; fetching it again") from error

    def _job(self, order: Assignment, permit: Permit, desk: Desk) -> Mapping[str, object]:
        return {
            "folder": str(desk.folder),
            "site": self._site,
            "model": str(desk.model),
            "slots": str(self._memory.slots(order.run)),
            "private": order.privacy.mode != "none",
            "rows": str(permit.rows),
            "public_rows": permit.dataset.units,
            "train": str(permit.dataset.train),
            "held_out": str(permit.dataset.held_out or ""),
            "device": self._policy.device,
            "threads": self._policy.threads,
            "recipe_files": dict(self._policy.recipe_files),
        }

    def _message(self, order: Assignment, app: AllowedApp, desk: Desk) -> Mapping[str, object]:
        """Return what the program of Flower apps is told of a message to one."""
        files = dict[str, str]()
        for name in app.datasets:
            dataset = self._policy.datasets[name]
            files[f"{name}.train"] = str(dataset.train)
            if dataset.held_out is not None:
                files[f"{name}.held-out"] = str(dataset.held_out)
        return {
            "folder": str(desk.folder),
            "app": str(app.folder),
            "model": str(desk.model),
            "slots": str(self._memory.slots(order.run)),
            "seeded": app.seeded,
            "node_config": {**files, **app.node_config},
            "threads": self._policy.threads,
        }

    async def _deliver(self, order: Assignment, result: Result) -> None:
        if isinstance(result, Trained):
            desk = self._memory.desk(order.task)
            path = desk.update_parcel if result.parcels else desk.update
            await asyncio.to_thread(self._blobs.put_link, path, result.sent)
            try:
                await self._link.upload(result.sent, self._blobs, order.task)
            except Refused as error:  # its word, not ours: we do not decline
                raise TaskFailed(f"the coordinator does not take the update: {error}") from error
            failpoints.reach("update.uploaded")
        await self._link.send(result)
        failpoints.reach("update.announced")


def _about(order: Assignment) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose lines name a task, its run and its round."""
    log: structlog.typing.FilteringBoundLogger = _log.bind(
        task=order.task, run=order.run, round=order.round
    )
    return log


def _guarded(id: TaskId | RunId, act: Callable[[], None]) -> None:
    """Do what a peer asked for a task or run; an id that is none is its fault, not our end."""
    try:
        act()
    except FedmlError as error:
        _log.error("not forgotten", id=id[:70], reason=str(error))
