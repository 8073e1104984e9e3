"""The regions of a coordinator: each is one stream, and brings a seat at the desk per leaf.

A region is a coordinator of its own to its leaves, and trusted to speak for them. Whatever the
desk tells a leaf goes down its region's stream, tasks of one round together; whatever a leaf says
comes up it, but for updates, of which the region hands in the sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

import structlog

from fedml.coordinator.desk import Desk
from fedml.errors import MalformedMessage
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Cancel,
    Command,
    Declined,
    Errand,
    Errands,
    Failed,
    Forget,
    Hello,
    Leaf,
    Lot,
    Orders,
    Relayed,
    ReleaseNotice,
    Roster,
    Scored,
    SecaggTold,
    SiteEvent,
    SiteId,
    Summed,
    TaskId,
    Welcome,
)
from fedml.transport.desks import Send

T = TypeVar("T")
_MOST = 2000  # errands in one message, which are some hundred bytes each
_log = structlog.get_logger()


class Branches:
    """Attends to regions as a desk does to sites."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def attend(
        self, region: SiteId, hello: Hello, events: AsyncIterator[SiteEvent], send: Send
    ) -> None:
        """Serve one region's stream until it ends."""
        branch = _Branch(self._desk, region, send)
        try:
            await self._desk.attend(region, hello, events, send, branch.hear)
        finally:
            branch.leave()


class _Branch:
    def __init__(self, desk: Desk, region: SiteId, send: Send) -> None:
        self._desk, self._region, self._send = desk, region, send
        self._doors: dict[SiteId, Send] = {}  # of its leaves
        self._refused: set[SiteId] = set()
        self._asked: set[TaskId] = set()  # rounds of which the region shall hear
        self._errands: list[Errand] = []
        self._flushing = False

    def hear(self, event: SiteEvent) -> None:
        """Take in what the region says; raises `MalformedMessage` on what it may not say."""
        match event:
            case Roster(leaves):
                for leaf in leaves:
                    self._seat(leaf)
            case Relayed(site, data):
                said = codec.decode_event(data)
                if not isinstance(said, Declined | Failed | Scored):
                    raise MalformedMessage(f"{self._region} relays a {type(said).__name__}")
                if site in self._doors:
                    self._desk.hear(site, said)
            case Summed():
                self._desk.summed(self._region, event)
            case _:
                pass

    def leave(self) -> None:
        """The region is away, and with it its leaves."""
        for site, door in self._doors.items():
            self._desk.leave(site, door, f"its region {self._region} is away for too long")

    def _seat(self, leaf: Leaf) -> None:
        door = self._doors.get(leaf.site) or partial(self._tell, leaf.site)
        if self._desk.sit(leaf, door, self._region):
            self._doors[leaf.site] = door
        elif leaf.site not in self._refused:
            self._refused.add(leaf.site)
            _log.error("a site is here already and comes through a region too: names must differ",
                       leaf=leaf.site, region=self._region)  # fmt: skip

    def _tell(self, site: SiteId, command: Command) -> None:
        match command:
            case Assignment(task):
                self._asked.add(_round(task, site))
            case Cancel() | Forget():
                self._errands.append(Errand(site, codec.encode_command(command)))
            case Welcome() | Beat() | ReleaseNotice() | Orders() | Errands() | SecaggTold():
                return  # the region's own, or not for leaves
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what was said to all leaves in one go, and of a round all that is open."""
        self._flushing, errands, asked = False, self._errands, self._asked
        self._errands, self._asked = [], set()
        for some in _few(errands):
            self._send(Errands(some))
        owed: dict[TaskId, list[tuple[SiteId, Assignment]]] = {}
        for site, order in self._desk.owed(self._region) if asked else ():
            owed.setdefault(_round(order.task, site), []).append((site, order))
        for task in sorted(asked & owed.keys()):
            self._send(_orders(task, owed[task]))


def _orders(task: TaskId, orders: Sequence[tuple[SiteId, Assignment]]) -> Orders:
    lots = tuple(Lot(site, order.task, order.seed) for site, order in orders)
    return Orders(replace(orders[0][1], task=task, seed=0), lots)


def _round(task: TaskId, site: SiteId) -> TaskId:
    """Return what the ids of a round's tasks have in common; see `Opening.task_id`."""
    return TaskId(task.removesuffix(f".{site}"))


def _few(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Yield the items in bundles."""
    rest = iter(items)
    while bundle := tuple(islice(rest, _MOST)):
        yield bundle
