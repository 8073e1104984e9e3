"""The site daemon: keeps one stream to the coordinator open and does what it is asked, if it may.

It only dials out. Orders go to the `clerk`; `transport.conversation` keeps the stream alive.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from pathlib import Path
from typing import Protocol

import structlog

from fedml import __version__, durable, pages, telemetry
from fedml.errors import FedmlError, NoRoom, Unreachable
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Cancel,
    Command,
    DatasetCard,
    Errands,
    Forget,
    Hello,
    Orders,
    RecipeId,
    ReleaseNotice,
    RunId,
    SecaggTold,
    Serving,
    Welcome,
)
from fedml.site.clerk import Clerk
from fedml.site.door import open_ledgers
from fedml.site.policy import Policy
from fedml.site.settings import Settings
from fedml.transport.backoff import Backoff
from fedml.transport.conversation import Conversation
from fedml.transport.link import Link

_PIECE = 2**20  # bytes of a data file hashed at a time
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
        self._conversation = Conversation(
            link,
            self._backoff,
            hello=self._hello,
            obey=self._obey,
            progress=lambda: self._clerk.answered if self._clerk else 0,
        )

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
                self._conversation.tell,
                self._backoff,
            )
            try:
                await clerk.start()
                self._clerk = clerk
                await self._conversation.keep()
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

    def _obey(self, command: Command) -> None:
        clerk = self._at_work()
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
            case Welcome() | Beat() | Orders() | Errands():
                pass  # the last two are for regions

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
        await self._conversation.tell(serving)

    def _at_work(self) -> Clerk:
        assert self._clerk is not None, "nobody is spoken to before the clerk is there"
        return self._clerk

    async def _hello(self) -> Hello:
        clerk = self._at_work()
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
            tuple(RecipeId(name, app.digest) for name, app in self._policy.apps.items()),
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
