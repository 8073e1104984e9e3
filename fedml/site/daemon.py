"""The site daemon: keeps one stream to the coordinator open and does what it is asked, if it may.

It only dials out. What it decides it takes from `gate` and the ledger; what it finishes it keeps
on disk until told to forget, so an order that comes twice is answered with the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import secrets
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from fedml import __version__, durable, telemetry
from fedml.errors import FedmlError, Refused, TaskFailed, Unreachable, Untrusted
from fedml.learning.recipe import installed
from fedml.privacy.ledger import Ledger
from fedml.protocol.messages import (
    Accepted,
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    DatasetCard,
    Declined,
    Failed,
    Forget,
    Hello,
    RecipeId,
    ReleaseNotice,
    Scored,
    Serving,
    SiteEvent,
    TaskId,
    Trained,
    Welcome,
)
from fedml.site.foreman import Foreman
from fedml.site.gate import Permit, decide
from fedml.site.memory import Desk, Memory, Result
from fedml.site.policy import Policy
from fedml.site.settings import Settings
from fedml.transport.chunks import BlobStore
from fedml.transport.link import Link

_LARGEST_BLOB = 64 * 2**30  # bytes
_log = structlog.get_logger()
_FIRST_RETRY, _LAST_RETRY = 0.2, 30.0  # seconds; doubled in between, then jittered


class Endpoint(Protocol):
    """Whatever serves releases at this site; the daemon only tells it when to look."""

    async def update(self, model: str, link: Link) -> Serving:
        """Fetch, verify and activate the current release of `model`; say what is served now."""

    def serving(self) -> tuple[Serving, ...]:
        """Return what is served now."""


class Daemon:
    """One site. `run` returns only by cancellation, or raises `Refused` if it is shut out."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        policy: Policy,
        link: Link,
        endpoint: Endpoint | None = None,
    ) -> None:
        self._name, self._policy, self._link, self._endpoint = settings.name, policy, link, endpoint
        self._folder = folder
        self._memory = Memory(folder)
        self._blobs = BlobStore.in_transit(folder / "blobs", _LARGEST_BLOB)
        self._foreman = Foreman(policy)
        self._installed: tuple[RecipeId, ...] = installed(policy.recipe_files)
        self._ledgers = _open_ledgers(folder, policy)
        self._working: dict[TaskId, asyncio.Task[None]] = {}
        self._updating: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve the coordinator for ever: connect, obey, reconnect with backoff and jitter."""
        with durable.lock(self._folder, "a site daemon"):
            try:
                if self._policy.datasets:
                    await self._foreman.start()
                await self._keep_connected()
            finally:
                await self._stop_all()

    async def _keep_connected(self) -> None:
        wait = _FIRST_RETRY
        while True:
            try:
                await self._link.connect(await self._hello())
                wait = _FIRST_RETRY
                await self._converse()
            except Unreachable as error:
                _log.info("reconnecting", reason=str(error), seconds=round(wait, 1))
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(wait * 2, _LAST_RETRY)

    async def _converse(self) -> None:
        """Obey commands until the stream is down or silent; raises `Unreachable`."""
        patience = 30.0
        beats: asyncio.Task[None] | None = None
        try:
            while True:
                async with asyncio.timeout(patience):
                    command = await self._link.receive()
                if isinstance(command, Welcome):
                    _log.info("connected", site=self._name, coordinator_version=command.version)
                    patience = 3 * command.heartbeat
                    beats = beats or asyncio.create_task(self._beat(command.heartbeat))
                else:
                    self._obey(command)
        except TimeoutError as error:
            raise Unreachable(f"the coordinator was silent for {patience:.0f} s") from error
        finally:
            if beats is not None:
                beats.cancel()
            await self._link.close()

    async def _beat(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._tell(Beat())

    def _obey(self, command: Command) -> None:
        match command:
            case Assignment():
                if command.task not in self._working:
                    self._start(command.task, self._answer(command))
            case Cancel(task, reason):
                self._cancel(task, reason)
            case Forget(task, counted):
                self._cancel(task, "its round is over")
                self._forget(task, counted=counted)
            case ReleaseNotice(model):
                job = asyncio.create_task(self._update(model))
                self._updating.add(job)
                job.add_done_callback(self._updating.discard)
            case Welcome() | Beat():
                pass

    def _start(self, task: TaskId, work: Coroutine[None, None, None]) -> None:
        job = asyncio.create_task(work)
        self._working[task] = job
        job.add_done_callback(lambda _: self._working.pop(task, None))

    async def _answer(self, order: Assignment) -> None:
        """Answer an assignment with its result, or with the reason why there is none."""
        log = _log.bind(task=order.task, run=order.run, round=order.round)
        try:
            result = self._memory.result(order.task) or await self._do(order)
            await self._deliver(order, result)
            telemetry.TASKS.labels("delivered").inc()
        except Refused as error:
            log.warning("task refused", reason=str(error))
            telemetry.TASKS.labels("refused").inc()
            await self._tell(Declined(order.task, str(error)))
        except Unreachable as error:
            log.info("task waits for the coordinator", reason=str(error))
        except FedmlError as error:
            log.error("task failed", reason=str(error))
            telemetry.TASKS.labels("failed").inc()
            await self._tell(Failed(order.task, str(error)))

    async def _do(self, order: Assignment) -> Result:
        permit = decide(self._policy, order, self._installed)
        ledger = self._ledgers.get(order.dataset)
        desk = self._memory.accept(order)  # before the ledger: a reservation is never orphaned
        if ledger is not None and permit.event is not None:
            event = permit.event
            try:
                await asyncio.to_thread(ledger.reserve, order.task, order.run, permit.part, event)
            except Refused:
                self._memory.forget(order.task, counted=False)
                raise
        await self._tell(Accepted(order.task))
        try:
            if not desk.outcome.exists():  # else a crash came between work and charge
                await self._fetch_model(order, desk)
                await self._foreman.run(self._job(order, permit, desk), desk.outcome)
        except TaskFailed:
            if ledger is not None:
                ledger.void(order.task)
            raise
        epsilon = 0.0
        if ledger is not None and permit.event is not None:
            await asyncio.to_thread(ledger.charge, order.task)  # on disk before anything leaves
            epsilon = await asyncio.to_thread(lambda: ledger.spent(run=order.run))
            telemetry.EPSILON.labels(order.dataset).set(await asyncio.to_thread(ledger.spent))
        result = await asyncio.to_thread(_result, order, desk, epsilon)
        self._memory.finish(result)
        return result

    async def _fetch_model(self, order: Assignment, desk: Desk) -> None:
        """Give the task its own name for the blob: the store may drop it with an older task."""
        await self._link.download(order.model, self._blobs)
        desk.model.unlink(missing_ok=True)  # from before a power loss, perhaps half of it
        desk.model.hardlink_to(self._blobs.path(order.model.digest))

    def _job(self, order: Assignment, permit: Permit, desk: Desk) -> Mapping[str, object]:
        return {
            "folder": str(desk.folder),
            "site": self._name,
            "model": str(desk.model),
            "slots": str(self._memory.slots(order.run)),
            "rows": str(permit.rows),
            "public_rows": permit.dataset.rows,
            "device": self._policy.device,
            "threads": self._policy.threads,
            "recipe_files": dict(self._policy.recipe_files),
        }

    async def _deliver(self, order: Assignment, result: Result) -> None:
        if isinstance(result, Trained):
            path = self._memory.desk(order.task).update
            blob = await asyncio.to_thread(self._blobs.put_file, path)
            if blob != result.update:
                raise Untrusted(f"{path} changed after it was charged; refusing to send it")
            await self._link.upload(blob, self._blobs)
        await self._link.send(result)

    def _cancel(self, task: TaskId, reason: str) -> None:
        job = self._working.pop(task, None)
        if job is not None and not job.done():
            _log.info("task cancelled", task=task, reason=reason)
            job.cancel()

    def _forget(self, task: TaskId, *, counted: bool) -> None:
        order, result = self._memory.assignment(task), self._memory.result(task)
        self._memory.forget(task, counted=counted)
        if isinstance(result, Trained):
            self._blobs.delete(result.update.digest)
        if order is not None:
            self._blobs.delete(order.model.digest)
            ledger = self._ledgers.get(order.dataset)
            if ledger is not None:
                ledger.void(task)  # nothing happens if it was charged

    async def _update(self, model: str) -> None:
        if self._endpoint is None:
            return
        try:
            serving = await self._endpoint.update(model, self._link)
        except Unreachable as error:
            _log.info("release waits for the coordinator", model=model, reason=str(error))
            return
        except FedmlError as error:
            _log.error("release refused", model=model, reason=str(error))
            telemetry.RELEASES.labels("refused").inc()
            now = next((s for s in self._endpoint.serving() if s.model == model), None)
            version, digest = (now.version, now.digest) if now else (0, "")
            serving = Serving(model, version, digest, "refused", str(error))
        await self._tell(serving)

    async def _tell(self, event: SiteEvent) -> None:
        """Send if the stream is up; if not, the coordinator will ask again."""
        try:
            await self._link.send(event)
        except Unreachable:
            return

    async def _hello(self) -> Hello:
        return Hello(
            __version__,
            self._policy.device,
            self._installed,
            await asyncio.to_thread(_cards, self._folder, self._policy),
            self._endpoint.serving() if self._endpoint else (),
            self._memory.kept(),
        )

    async def _stop_all(self) -> None:
        jobs = [*self._working.values(), *self._updating]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._foreman.stop()
        await self._link.close()


def _result(order: Assignment, desk: Desk, epsilon: float) -> Result:
    outcome = durable.read_json(desk.outcome)
    if order.kind == "evaluate":
        return Scored(order.task, outcome["totals"], outcome["count"], epsilon)
    data = desk.update.read_bytes()
    blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
    return Trained(order.task, blob, outcome["weight"], outcome["metrics"], epsilon)


def _open_ledgers(folder: Path, policy: Policy) -> dict[str, Ledger]:
    return {
        name: Ledger(
            folder / "ledger" / f"{name}.jsonl",
            name=name,
            limit_epsilon=dataset.epsilon,
            delta=dataset.delta,
        )
        for name, dataset in policy.datasets.items()
        if dataset.epsilon > 0
    }


def _cards(folder: Path, policy: Policy) -> tuple[DatasetCard, ...]:
    key = _site_secret(folder)
    cards = []
    for name, dataset in policy.datasets.items():
        total = hmac.new(key, digestmod="sha256")
        for path in (dataset.train, dataset.held_out):
            if path is not None and path.exists():
                total.update(path.read_bytes())
        cards.append(DatasetCard(name, dataset.rows, total.hexdigest()))
    return tuple(cards)


def _site_secret(folder: Path) -> bytes:
    path = folder / "secret"
    if not path.exists():
        durable.replace(path, secrets.token_bytes(32), mode=0o600)
    return path.read_bytes()
