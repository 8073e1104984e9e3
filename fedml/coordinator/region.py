"""A regional coordinator: to its leaves a coordinator, to its parent a site that speaks for them.

It decides nothing of a run. The parent's orders go to the leaves as they are, under the task ids
and seeds that they would get from it directly, and the exact sum of what they answer goes up. What
the leaves are told besides (cancel, forget) comes from the parent too, who keeps the journal.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path

import structlog

from fedml import __version__
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.holds import Holds
from fedml.coordinator.mirror import Mirror
from fedml.coordinator.shares import ShareHost
from fedml.errors import ConfigError, FedmlError, MalformedMessage, Unreachable, Untrusted
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Cancel,
    Command,
    Errand,
    Errands,
    Forget,
    Hello,
    Leaf,
    Orders,
    ReleaseNotice,
    Roster,
    SecaggTold,
    SiteEvent,
    SiteId,
    TaskId,
    Welcome,
    check_id,
)
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore
from fedml.transport.conversation import Conversation
from fedml.transport.link import Link

_LOOK = 0.05  # seconds in which leaves that come and go are told of together
_RENEWAL = 3600.0  # seconds between looks at the parent's release metadata
_MOST = 2000  # leaves in one message
_UNHEARD = Hello("", "")  # of a leaf that was not here since we started
_log = structlog.get_logger()


class Region:
    """One region, over `folder` for what must survive and `blobs` for what is on its way."""

    def __init__(
        self,
        folder: Path,
        link: Link,
        blobs: BlobStore,
        mirror: Mirror,
        *,
        heartbeat: float,
        grace: float,
        backoff: Backoff | None = None,
    ) -> None:
        self._folder, self._link, self._holds = folder, link, Holds(blobs)
        self.mirror = mirror
        self._backoff = backoff or Backoff()
        self.desk = Desk(
            heartbeat=heartbeat,
            grace=grace,
            answered=self._answered,
            lost=self._lost,
            changed=self._look_soon,
            was_counted=lambda _: False,
            models=mirror.models,
            is_over=lambda _: False,
            is_open=lambda _: True,  # what may be forgotten is for the parent to say
        )
        self._conversation = Conversation(link, self._backoff, hello=self._hello, obey=self._obey)
        self._shares: dict[TaskId, ShareHost] = {}
        self._told: dict[SiteId, tuple[bool, Hello]] = {}  # of its leaves, what the parent knows
        self._outbox: asyncio.Queue[SiteEvent] = asyncio.Queue()
        self._looking: asyncio.TimerHandle | None = None
        self._chores: set[asyncio.Task[object]] = set()

    def unready(self) -> str:
        """Say why no orders are taken; "" while they are."""
        return "" if self._conversation.is_open else "the parent is not reached"

    async def run(self) -> None:
        """Serve parent and leaves until cancelled; raises `Refused` if the parent shuts us out."""
        folder = self._folder
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        for place in sorted(folder.iterdir()):
            orders = ShareHost.kept(place)
            if orders is None:  # they come again, or their round is over and nobody asks
                _log.warning("orders do not read and are thrown away", folder=str(place))
                await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
            else:
                self._shares[orders.order.task] = self._host(orders)
        sending = asyncio.create_task(self._send())
        self._chore(self._keep_fresh())
        try:
            await self._conversation.keep()
        finally:
            sending.cancel()
            if self._looking is not None:
                self._looking.cancel()
            for chore in self._chores:
                chore.cancel()
            await asyncio.gather(sending, *self._chores, return_exceptions=True)
            for share in self._shares.values():
                await share.stop()
            await self._link.close()

    # --- up -----------------------------------------------------------------------------------

    async def _hello(self) -> Hello:
        return Hello(__version__, "")

    async def _send(self) -> None:
        while True:
            await self._conversation.tell(await self._outbox.get())

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Tell the parent of the leaves that it knows otherwise."""
        self._looking = None
        kept: dict[SiteId, set[TaskId]] = {}
        for share in self._shares.values():
            for lot in share.lots.values():
                kept.setdefault(lot.site, set()).add(lot.task)
        here = {leaf.site: (leaf.here, leaf.hello) for leaf in self.desk.roster()}
        now = {site: (False, _UNHEARD) for site in kept} | here
        news = [site for site, known in now.items() if self._told.get(site) != known]
        self._told.update({site: now[site] for site in news})
        leaves = [_leaf(site, *now[site], kept.get(site, set())) for site in news]
        for start in range(0, len(leaves), _MOST):
            self._outbox.put_nowait(Roster(tuple(leaves[start : start + _MOST])))

    # --- down ---------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Welcome():
                self._told = {}
                self._look()
                self._chore(self._renew())
            case Orders(order):
                if order.task not in self._shares:
                    self._shares[order.task] = self._host(command)
                self._shares[order.task].take(command)
            case Errands(errands):
                self._run(errands)
            case ReleaseNotice(model):
                self._chore(self._pass_on(model))
            case Assignment() | Cancel() | Forget() | Beat() | SecaggTold():
                pass  # for those that have rows, and serve

    async def _pass_on(self, model: str) -> None:
        """Fetch what the parent has released, and have leaves look at it."""
        if await self._renew(model):
            self.desk.announce(model)

    async def _renew(self, model: str = "") -> bool:
        try:
            await self.mirror.follow(model)
        except Unreachable as error:  # NoRoom too: once there is room, the next notice or hour
            _log.warning("releases wait", model=model, reason=str(error))
        except FedmlError as error:
            _log.error("release refused, leaves keep theirs", model=model, reason=str(error))
        else:
            return True
        return False

    async def _keep_fresh(self) -> None:
        """Have the parent's newest signatures, which leaves take for some days only."""
        while True:
            await asyncio.sleep(_RENEWAL)
            if self._conversation.is_open:
                await self._renew()

    def _run(self, errands: tuple[Errand, ...]) -> None:
        """Tell leaves what the parent has for them; a round's are taken back in one go."""
        back: dict[TaskId, list[TaskId]] = {}
        for errand in errands:
            command = codec.decode_command(errand.command)
            site = errand.site
            match command:
                case Cancel(task, reason):
                    self.desk.cancel(site, task, reason)
                case Forget(task, counted, run):
                    self.desk.forget(site, task, counted=counted, run=run)
                    for digest in self.desk.leftovers(site, task):
                        self._holds.store.abandon(digest, site)
                        self._holds.discard(digest)
                case _:
                    raise MalformedMessage(f"an errand to {site} with a {type(command).__name__}")
            found = [key for key, share in self._shares.items() if task in share.lots]
            for key in found:
                back.setdefault(key, []).append(task)
                if isinstance(command, Forget):
                    del self._shares[key].lots[task]
        for key, tasks in back.items():
            if self._shares[key].lots:
                self._shares[key].take_back(tasks)
            else:
                self._chore(self._shares.pop(key).conclude())

    def _host(self, orders: Orders) -> ShareHost:
        try:
            folder = self._folder / check_id("task", orders.order.task)
        except ConfigError as error:
            raise Untrusted(str(error)) from error
        return ShareHost(
            folder,
            orders,
            desk=self.desk,
            holds=self._holds,
            link=self._link,
            tell=self._outbox.put_nowait,
            backoff=self._backoff,
        )

    # --- what leaves do -----------------------------------------------------------------------

    def _answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        for share in self._shares.values():
            if order.task in share.lots:
                self._chore(share.answered(site, order, answer))

    def _lost(self, site: SiteId, reason: str) -> None:
        for share in self._shares.values():
            share.lost(site, reason)

    def _chore(self, work: Coroutine[object, object, object]) -> None:
        chore = asyncio.create_task(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        chore.add_done_callback(_tell_bug)


def _leaf(site: SiteId, here: bool, hello: Hello, kept: set[TaskId]) -> Leaf:
    return Leaf(site, here, replace(hello, kept=tuple(sorted({*hello.kept, *kept}))))


def _tell_bug(task: asyncio.Task[object]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a bug ended what a region was at", exc_info=error)
