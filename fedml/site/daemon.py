"""The site daemon: keeps one stream to the coordinator open and does what it is asked, if it may.

It only dials out. Orders go to the `clerk`; here is what keeps the conversation alive.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import random
import secrets
import time
from pathlib import Path
from typing import Protocol

import structlog

from fedml import __version__, durable, pages, telemetry
from fedml.errors import FedmlError, NoRoom, Unreachable, Untrusted
from fedml.identity.clocks import difference
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Cancel,
    Command,
    DatasetCard,
    Forget,
    Hello,
    ReleaseNotice,
    RunId,
    SecaggTold,
    Serving,
    SiteEvent,
    Welcome,
)
from fedml.site.backoff import Backoff
from fedml.site.clerk import Clerk, open_ledgers
from fedml.site.policy import Policy
from fedml.site.settings import Settings
from fedml.transport.link import SILENCE, Link

_PIECE = 2**20  # bytes of a data file hashed at a time
_SILENT_BEATS = 3  # heartbeats without a sign of life after which the coordinator is called anew
_KEPT, _HEAPS = 2**24, 2  # freed bytes that each heap keeps for the chunks to come; heaps
_log = structlog.get_logger()


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
        backoff: Backoff | None = None,
    ) -> None:
        self._name, self._policy, self._link, self._endpoint = settings.name, policy, link, endpoint
        self._folder, self._backoff = folder, backoff or Backoff()
        self._drain = settings.drain
        self._clerk: Clerk | None = None
        self._draining = False
        self._updating: set[asyncio.Task[None]] = set()
        self._most = math.inf  # seconds between dials, less the jitter of `Backoff`
        self._proven_at = math.inf  # loop time; from then on the connection was worth dialling

    async def run(self) -> None:
        """Serve the coordinator for ever: connect, obey, reconnect with backoff and jitter.

        Raises `ConfigError` if another daemon has the folder, `Corrupt` if a ledger is damaged.
        """
        pages.keep_freed(_KEPT, arenas=_HEAPS)
        with (
            durable.lock(self._folder, "a site daemon"),
            open_ledgers(self._folder, self._policy) as ledgers,
        ):
            clerk = Clerk(
                self._folder,
                self._name,
                self._policy,
                ledgers,
                self._link,
                self._tell,
                self._backoff,
            )
            try:
                await clerk.start()
                self._clerk = clerk
                await self._keep_connected(clerk)
            finally:
                await self._stop(clerk)

    async def drain(self) -> None:
        """Take no further order, and end those under way or leave them on the disk, in time."""
        self._draining = True
        if self._clerk is not None:
            await self._clerk.drain(self._drain)

    def unready(self) -> str:
        """Say why no further order is taken; "" while orders are."""
        if self._draining:
            return "the site is going down"
        return "" if self._clerk is not None else "the site is starting"

    async def _keep_connected(self, clerk: Clerk) -> None:
        loop, waits = asyncio.get_running_loop(), iter(self._backoff)
        while True:
            self._proven_at, answered = math.inf, clerk.answered
            try:
                await self._link.connect(await self._hello(clerk))
                await self._converse(clerk)
            except (Unreachable, Untrusted) as error:
                # a coordinator that dies as often as it starts is no conversation either
                if loop.time() >= self._proven_at or clerk.answered > answered:
                    waits = iter(self._backoff)
                wait = min(next(waits), self._most * random.uniform(0.5, 1.0))
                # what may not be trusted is an alarm, but no reason to leave the ward without us
                log = _log.error if isinstance(error, Untrusted) else _log.info
                log("reconnecting", reason=str(error), seconds=round(wait, 1))
            await asyncio.sleep(wait)

    async def _converse(self, clerk: Clerk) -> None:
        """Obey commands until the stream is down or silent; raises `Unreachable`."""
        silence = SILENCE
        beats: asyncio.Task[None] | None = None
        try:
            while True:
                command = await self._link.receive(silence)
                if isinstance(command, Welcome):
                    self._welcome(command)
                    silence = _SILENT_BEATS * command.heartbeat
                    # it asks for a word as often, so it stands half as many dials
                    self._most = max(2 * command.heartbeat, self._backoff.first)
                    self._proven_at = asyncio.get_running_loop().time() + command.heartbeat
                    beats = beats or asyncio.create_task(self._beat(command.heartbeat))
                else:
                    self._obey(command, clerk)
        finally:
            if beats is not None:
                beats.cancel()
            await self._link.close()

    def _welcome(self, command: Welcome) -> None:
        _log.info("connected", coordinator_version=command.version)
        if command.now and (off := difference(time.time() - command.now)):
            _log.warning(f"{off}; nothing of a run depends on it, certificates and releases do")

    async def _beat(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._tell(Beat())

    def _obey(self, command: Command, clerk: Clerk) -> None:
        match command:
            case Assignment():
                clerk.take(command)
            case Cancel(task, reason):
                clerk.drop(task, reason)
            case SecaggTold():
                clerk.hear(command)
            case Forget(task, counted, run):
                clerk.forget(task, counted=counted)
                if run:
                    clerk.conclude(RunId(run))
            case ReleaseNotice(model):
                job = asyncio.create_task(self._update(model))
                self._updating.add(job)
                job.add_done_callback(self._updating.discard)
            case Welcome() | Beat():
                pass

    async def _update(self, model: str) -> None:
        if self._endpoint is None:
            return
        try:
            serving = await self._endpoint.update(model, self._link)
        except FedmlError as error:
            if isinstance(error, Unreachable) and not isinstance(error, NoRoom):
                _log.info("release waits for the coordinator", model=model, reason=str(error))
                return
            _log.error("release refused", model=model, reason=str(error))
            telemetry.RELEASES.labels("refused").inc()
            now = next((s for s in self._endpoint.serving() if s.model == model), None)
            version, digest = (now.version, now.digest) if now else (0, "")
            serving = Serving(model, version, digest, "refused", str(error))
        await self._tell(serving)

    async def _tell(self, event: SiteEvent) -> None:
        """Send if the stream is up; if not, `_converse` hears why and we are asked again."""
        try:
            await self._link.send(event)
        except FedmlError as error:
            _log.debug("not sent", what=type(event).__name__, reason=str(error))

    async def _hello(self, clerk: Clerk) -> Hello:
        return Hello(
            __version__,
            self._policy.device,
            clerk.installed,
            await asyncio.to_thread(_cards, self._folder, self._policy),
            self._endpoint.serving() if self._endpoint else (),
            clerk.kept(),
            clerk.runs(),
            self._policy.runs_at_once,
            clerk.roster,
        )

    async def _stop(self, clerk: Clerk) -> None:
        for job in self._updating:
            job.cancel()
        await asyncio.gather(*self._updating, return_exceptions=True)
        await clerk.stop()
        await self._link.close()


def _cards(folder: Path, policy: Policy) -> tuple[DatasetCard, ...]:
    key = _site_secret(folder)
    cards = []
    for name, dataset in policy.datasets.items():
        total = hmac.new(key, digestmod="sha256")
        for path in (dataset.train, dataset.held_out):
            if path is not None:
                _add_file(total, path)
        cards.append(DatasetCard(name, dataset.rows, total.hexdigest()))
    return tuple(cards)


def _add_file(total: hmac.HMAC, path: Path) -> None:
    """Hash a data file; one that cannot be read is told when a task needs it."""
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                total.update(piece)
    except OSError as error:
        _log.warning("data file cannot be read", path=str(path), reason=error.strerror)


def _site_secret(folder: Path) -> bytes:
    path = folder / "secret"
    if not path.exists():
        durable.replace(path, secrets.token_bytes(32), mode=0o600)
    return path.read_bytes()
