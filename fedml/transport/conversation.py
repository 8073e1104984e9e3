"""A conversation with a coordinator that is kept up for ever: a site's, or a region's.

It only dials out: connect, obey, beat, and dial again with backoff and jitter.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from fedml.errors import FedmlError, Unreachable, Untrusted
from fedml.identity.clocks import difference
from fedml.protocol.messages import Beat, Command, Hello, SiteEvent, Welcome
from fedml.transport.backoff import Backoff
from fedml.transport.link import SILENCE, Link

_SILENT_BEATS = 3  # heartbeats without a sign of life after which the coordinator is called anew
_log = structlog.get_logger()


class Conversation:
    """Keeps one stream open. `hello` begins each, `obey` hears every command.

    `progress` counts what the conversation was good for: one that was good for nothing is no
    reason to dial again at once.
    """

    def __init__(
        self,
        link: Link,
        backoff: Backoff,
        *,
        hello: Callable[[], Awaitable[Hello]],
        obey: Callable[[Command], None],
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        self._link, self._backoff = link, backoff
        self._hello, self._obey, self._progress = hello, obey, progress
        self.is_open = False
        self._most = math.inf  # seconds between dials, less the jitter of `Backoff`
        self._proven_at = math.inf  # loop time; from then on the connection was worth dialling

    async def keep(self) -> None:
        """Obey for ever; raises `Refused` if we are shut out."""
        loop, waits = asyncio.get_running_loop(), iter(self._backoff)
        while True:
            self._proven_at, before = math.inf, self._progress()
            try:
                await self._link.connect(await self._hello())
                await self._converse()
            except (Unreachable, Untrusted) as error:
                # a coordinator that dies as often as it starts is no conversation either
                if loop.time() >= self._proven_at or self._progress() > before:
                    waits = iter(self._backoff)
                wait = min(next(waits), self._most * random.uniform(0.5, 1.0))
                # what may not be trusted is an alarm, but no reason to leave the ward without us
                log = _log.error if isinstance(error, Untrusted) else _log.info
                log("reconnecting", reason=str(error), seconds=round(wait, 1))
            await asyncio.sleep(wait)

    async def tell(self, event: SiteEvent) -> None:
        """Send if the stream is up; if not, `keep` hears why and we are asked again."""
        try:
            await self._link.send(event)
        except FedmlError as error:
            _log.debug("not sent", what=type(event).__name__, reason=str(error))

    async def _converse(self) -> None:
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
                self._obey(command)
        finally:
            self.is_open = False
            if beats is not None:
                beats.cancel()
            await self._link.close()

    def _welcome(self, command: Welcome) -> None:
        self.is_open = True
        _log.info("connected", coordinator_version=command.version)
        if command.now and (off := difference(time.time() - command.now)):
            _log.warning(f"{off}; nothing of a run depends on it, certificates and releases do")

    async def _beat(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.tell(Beat())
