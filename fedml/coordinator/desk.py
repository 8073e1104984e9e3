"""The desk: which sites are here, what each was told, and what has not been answered.

An assignment stays outstanding until its round takes it back, so a site that was away, or a
coordinator that was, finds it again when the stream is back. A leaf, which is a site behind a
region, has a seat like any other; its door is its region's stream (`branches`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import structlog
from structlog.contextvars import bind_contextvars

from fedml import __version__, failpoints, telemetry
from fedml.coordinator.sizes import beside, largest_update
from fedml.coordinator.turns import Turns
from fedml.errors import Unreachable
from fedml.protocol.messages import (
    Accepted,
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    Declined,
    Failed,
    Forget,
    Hello,
    Leaf,
    RecipeId,
    Relayed,
    ReleaseNotice,
    Roster,
    RunId,
    Scored,
    SecaggSaid,
    SecaggTold,
    Serving,
    SiteEvent,
    SiteId,
    Summed,
    TaskId,
    Trained,
    Welcome,
)
from fedml.protocol.operations import SiteInfo
from fedml.rounds.selection import SiteStatus
from fedml.transport.desks import Send
from fedml.transport.pulse import Pulse

Answer = Declined | Failed | Trained | Scored | Summed | SecaggSaid
Hear = Callable[[SiteEvent], None]
_OFFERS = 3  # updates that a site may offer for a task: one, and two more after a mishap
_BEATS_IN_ONE_GO = 100  # a few milliseconds, then others have their turn
_SILENT_BEATS = 3  # heartbeats without a word after which a stream counts as dead
_WIDEST = 8  # bytes of a sum's element, over the least that one of the model has, times slots
_log = structlog.get_logger()


@dataclass
class _Offers:
    """What a site would hand in, or did, for one task: digests of updates, good or not."""

    run: RunId
    digests: set[str] = field(default_factory=set)


@dataclass
class _Seat:
    """One site's place at the desk."""

    send: Send | None = None  # None while the site, or its region, is away
    via: str = ""  # the region of a leaf
    absent: bool = False  # a leaf that is not connected to its region, which is here
    is_region: bool = False
    hello: Hello | None = None
    seen: float = 0.0
    outstanding: dict[TaskId, Assignment] = field(default_factory=dict)
    settled: set[TaskId] = field(default_factory=set)  # answered, and the answer was taken in
    told: dict[TaskId, SecaggTold] = field(default_factory=dict)  # the last word on its masking
    offers: dict[TaskId, _Offers] = field(default_factory=dict)
    farewell: asyncio.TimerHandle | None = None
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def here(self) -> bool:
        """True if the site is connected, to us or to its region."""
        return self.send is not None and not self.absent


class Desk:
    """All sites of a coordinator. Its owner is told of answers, losses and changes."""

    def __init__(  # noqa: PLR0913 - what it must ask and tell, each by its name
        self,
        *,
        heartbeat: float,
        grace: float,
        answered: Callable[[SiteId, Assignment, Answer], None],
        lost: Callable[[SiteId, str], None],
        changed: Callable[[], None],
        was_counted: Callable[[TaskId], bool],
        models: Callable[[], list[str]],
        is_over: Callable[[RunId], bool] = lambda _: False,
        is_open: Callable[[TaskId], bool] = lambda _: False,
        roster: str = "",
    ) -> None:
        self._heartbeat, self._grace = heartbeat, grace
        self._answered, self._lost, self._changed = answered, lost, changed
        self._was_counted, self._models = was_counted, models
        self._is_over, self._is_open, self._roster = is_over, is_open, roster
        self._seats: dict[SiteId, _Seat] = {}
        self._here = 0  # how many seats have a stream
        self._beats: asyncio.Task[None] | None = None
        self.turns = Turns()

    # --- what the hosts of runs do ------------------------------------------------------------

    def assign(self, site: SiteId, assignment: Assignment) -> None:
        """Give `site` a task, now or when it is back."""
        seat = self._seat(site)
        seat.outstanding[assignment.task] = assignment
        seat.settled.discard(assignment.task)
        self._push(seat, assignment)
        failpoints.reach("task.assigned")

    def tell(self, site: SiteId, told: SecaggTold) -> None:
        """Say what masking a task's round needs next, now or when the site is back."""
        seat = self._seat(site)
        if told.task in seat.outstanding:
            seat.told[told.task] = told
            self._push(seat, told)

    def cancel(self, site: SiteId, task: TaskId, reason: str) -> None:
        """Take a task back."""
        seat = self._seat(site)
        seat.settled.discard(task)
        seat.told.pop(task, None)
        if seat.outstanding.pop(task, None):
            self._push(seat, Cancel(task, reason))

    def forget(self, site: SiteId, task: TaskId, *, counted: bool, run: str = "") -> None:
        """Tell `site` that a task's round is over, and `run` too unless it is empty."""
        seat = self._seat(site)
        seat.outstanding.pop(task, None)
        seat.settled.discard(task)
        seat.told.pop(task, None)
        self._push(seat, Forget(task, counted, run))
        failpoints.reach("task.forgotten")

    def dismiss(self, leaf: SiteId, run: RunId, task: TaskId | None) -> None:
        """A run has given up on a leaf's task, on all if it is None: its region shall know.

        What a site that dials us itself still says of it does no harm, but what is in a sum cannot
        be taken out of it.
        """
        seat = self._seat(leaf)
        for order in [*seat.outstanding.values()] if seat.via else ():
            if order.run == run and task in (None, order.task):
                self.cancel(leaf, order.task, "it is no longer waited for")

    def remind(self, site: SiteId, task: TaskId) -> None:
        """Ask for a task again, if it is asked for at all."""
        seat = self._seat(site)
        if task in seat.outstanding:
            self._push(seat, seat.outstanding[task])

    def settle(self, site: SiteId, task: TaskId) -> None:
        """The answer to a task was taken in: the site keeps it, and is not asked for it again."""
        seat = self._seat(site)
        if task in seat.outstanding:
            seat.settled.add(task)

    def abandon(self, run: RunId, reason: str) -> list[tuple[SiteId, str]]:
        """Take all tasks of a run back; it is over in a way that left no receipt.

        Returns what was offered for them, by whom.
        """
        offered: list[tuple[SiteId, str]] = []
        for site, seat in self._seats.items():
            for order in list(seat.outstanding.values()):
                if order.run == run:
                    self.cancel(site, order.task, reason)
                    self._push(seat, Forget(order.task, False))
            for task in [task for task, offers in seat.offers.items() if offers.run == run]:
                offered += [(self.door(site), it) for it in self.leftovers(site, task)]
        return offered

    def conclude(self, run: RunId) -> None:
        """Tell every site that is here that a run is over; others hear it on return."""
        for seat in self._seats.values():
            self._push(seat, _over(run))

    def turn_over(self) -> None:
        """Some sites are free for other runs than before."""
        self._changed()

    def announce(self, model: str) -> None:
        """Tell every site that is here to look at a model's channel; others hear it on return."""
        for seat in self._seats.values():
            self._push(seat, ReleaseNotice(model))

    def statuses(self) -> tuple[SiteStatus, ...]:
        """What selection needs to know of every site seen so far."""
        return tuple(
            SiteStatus(
                site,
                seat.here,
                seat.hello.recipes if seat.hello else (),
                seat.hello.datasets if seat.hello else (),
                seat.hello.runs_at_once if seat.hello else 0,
                region=seat.via,
                can_mask=self._can_mask(seat),
            )
            for site, seat in sorted(self._seats.items())
            if not seat.is_region
        )

    def _can_mask(self, seat: _Seat) -> bool:
        """True if a site accepted our roster; a region carries no messages of masked rounds."""
        accepted = seat.hello.roster if seat.hello and not seat.via else ""
        return bool(self._roster) and accepted == self._roster

    def sites(self) -> tuple[SiteInfo, ...]:
        """What operators see of every site seen so far."""
        infos = []
        for site, seat in sorted(self._seats.items()):
            info = SiteInfo(site, seat.here, seat.seen, region=seat.via)
            if seat.hello is not None:
                hello = seat.hello
                info = replace(
                    info,
                    device=hello.device,
                    version=hello.version,
                    datasets=hello.datasets,
                    serving=hello.serving,
                )
            infos.append(info)
        return tuple(infos)

    def owes(self, site: SiteId, task: TaskId) -> bool:
        """True while a task of `site` is wanted, answered or not."""
        return task in self._seat(site).outstanding

    def running(self, app: RecipeId) -> tuple[SiteId, ...]:
        """Return the sites that are here and run a Flower app; regions carry no messages of one."""
        return tuple(
            site
            for site, seat in sorted(self._seats.items())
            if seat.here and not seat.via and seat.hello and app in seat.hello.apps
        )

    def roster(self) -> tuple[Leaf, ...]:
        """Return who was here so far, as a region tells it to its parent."""
        return tuple(
            Leaf(site, seat.here, seat.hello)
            for site, seat in self._seats.items()
            if seat.hello is not None
        )

    def door(self, site: SiteId) -> SiteId:
        """Return by whose stream and uploads a site is reached: its own, or its region's."""
        return SiteId(self._seat(site).via or site)

    def whose(self, door: SiteId, task: TaskId) -> SiteId:
        """Return the leaf of region `door` that was given a task; the caller if there is none."""
        if not self._seat(door).is_region:
            return door
        seats = self._seats.items()
        found = (site for site, seat in seats if seat.via == door and task in seat.outstanding)
        return next(found, door)

    def owed(self, door: SiteId) -> list[tuple[SiteId, Assignment]]:
        """Return all that the leaves of a region are asked for and have not answered."""
        return [
            (site, order)
            for site, seat in self._seats.items()
            if seat.via == door
            for task, order in seat.outstanding.items()
            if task not in seat.settled
        ]

    def order(self, site: SiteId, task: TaskId) -> Assignment | None:
        """Return what a task was that is not over yet."""
        return self._seat(site).outstanding.get(task)

    def model_of(self, door: SiteId, digest: str) -> bool:
        """True if an outstanding task of the site, or of a region's leaf, names this blob.

        As its model, or as a parcel of it.
        """
        seats = [self._seat(door)]
        if seats[0].is_region:
            seats += [seat for seat in self._seats.values() if seat.via == door]
        orders = (order for seat in seats for order in seat.outstanding.values())
        blobs = (b for a in orders for b in (a.model, *(parcel.blob for parcel in a.parcels)))
        return any(blob.digest == digest for blob in blobs)

    def objection(self, site: SiteId, task: TaskId, blob: Blob) -> str:
        """Say why `site` may not hand in this blob for a task; "" if it may.

        It may have as many bytes as `largest_update` says; a region's sum more, for it is wider,
        as int64 is than float16. A task has one update, so few are taken; each has its own
        count, so that no other task, of this run or another, ever stands in its way.
        """
        seat = self._seat(site)
        order = seat.outstanding.get(task)
        if order is None or (order.kind != "train" and not order.masking):
            return "no update is expected"
        summed = _WIDEST * order.model.size + beside(order)
        if blob.size > (most := summed if seat.via else largest_update(order)):
            return f"at most {most} bytes are expected"
        offers = seat.offers.setdefault(task, _Offers(order.run)).digests
        if blob.digest not in offers and len(offers) >= _OFFERS:
            return f"it has offered {len(offers)} others for this task"
        offers.add(blob.digest)
        return ""

    def is_settled(self, site: SiteId, task: TaskId) -> bool:
        """True if the answer to a task was taken in, and its round is not over yet."""
        return task in self._seat(site).settled

    def leftovers(self, site: SiteId, task: TaskId) -> set[str]:
        """Return, once, what `site` offered for a task that is over now."""
        offers = self._seat(site).offers.pop(task, None)
        return offers.digests if offers else set()

    def pulse(self, site: SiteId) -> Pulse:
        """Return what heeds what comes of a site's uploads; each stream has its own."""
        return self._seat(site).pulse

    # --- one site's stream --------------------------------------------------------------------

    async def attend(
        self,
        site: SiteId,
        hello: Hello,
        events: AsyncIterator[SiteEvent],
        send: Send,
        region: Hear | None = None,
    ) -> None:
        """Serve one stream until its events end or it falls silent. A newer stream wins.

        A region's events are for `region`.
        """
        bind_contextvars(site=site)
        self.sit(Leaf(site, True, hello), send)
        seat = self._seat(site)
        seat.is_region = region is not None
        pulse = seat.pulse = Pulse()
        try:
            while True:
                event = await pulse.next(anext(events), _SILENT_BEATS * self._heartbeat)
                seat.seen = time.time()
                region(event) if region else self._hear(site, seat, event)
        except TimeoutError:
            _log.warning("site silent", seconds=round(pulse.silence, 1))
        except (StopAsyncIteration, Unreachable):
            pass
        finally:
            self.leave(site, send, f"away for more than {self._grace:g} s")

    async def _beat(self) -> None:
        """Speak to all sites, many in one go: waking up for each costs more than its beat."""
        while True:
            await asyncio.sleep(self._heartbeat)
            for place, seat in enumerate(list(self._seats.values()), 1):
                if not seat.via:
                    self._push(seat, Beat())
                if place % _BEATS_IN_ONE_GO == 0:
                    await asyncio.sleep(0)

    def sit(self, leaf: Leaf, send: Send, via: str = "") -> bool:
        """Take a site in, and tell it all it has to know; False if it is here by another door."""
        site, hello, seat = leaf.site, leaf.hello, self._seat(leaf.site)
        if via and (seat.is_region or (seat.send is not None and seat.via != via)):
            return False
        if seat.farewell is not None:
            seat.farewell.cancel()
        before, known = seat.here, bool(via) and seat.send is send
        seat.send, seat.via, seat.absent, seat.farewell = send, via, not leaf.here, None
        self._count(seat.here - before)
        if leaf.hello.version:  # else its region has not heard of it either since it started
            seat.hello, seat.seen = hello, time.time()
        self._welcome(seat, hello, send, known=known)
        if seat.here and not (via and before):
            _log.info("site connected", version=hello.version, **({"leaf": site} if via else {}))
        self._changed()
        return True

    def _welcome(self, seat: _Seat, hello: Hello, send: Send, *, known: bool) -> None:
        """Tell a site what it has to know; its orders are `known` at a region that was here."""
        send(Welcome(__version__, self._heartbeat, time.time()))
        for task in hello.kept:
            if task not in seat.outstanding and not self._is_open(task):  # else asked for soon
                send(Forget(task, self._was_counted(task)))
        for run in hello.runs:
            if self._is_over(run):
                send(_over(run))
        for task, assignment in seat.outstanding.items():
            if task not in seat.settled and not known:
                send(assignment)
            if task in seat.told:
                send(seat.told[task])
        for model in self._models():
            send(ReleaseNotice(model))

    def hear(self, leaf: SiteId, event: SiteEvent) -> None:
        """Take in what a leaf has said to its region."""
        seat = self._seat(leaf)
        seat.seen = time.time()
        self._hear(leaf, seat, event)

    def summed(self, door: SiteId, event: Summed) -> None:
        """Take in a region's sum, unless it holds what is not asked for: then ask for the rest."""
        orders = [
            self.order(s.site, s.task) if self._seat(s.site).via == door else None
            for s in event.summands
        ]
        asked = [order for order in orders if order is not None]
        if asked and len(asked) == len(orders) and len({(o.run, o.round) for o in asked}) == 1:
            self._answered(door, asked[0], event)
        else:
            for summand, order in zip(event.summands, orders, strict=True):
                if order is not None:
                    self.remind(summand.site, summand.task)

    def _hear(self, site: SiteId, seat: _Seat, event: SiteEvent) -> None:
        match event:
            case Declined(task) | Failed(task) | Trained(task) | Scored(task) | SecaggSaid(task):
                if task in seat.outstanding:  # else a stranger's task, or one long over
                    self._answered(site, seat.outstanding[task], event)
            case Accepted(task):
                _log.debug("task accepted", task=task)
            case Serving():
                if seat.hello is not None:
                    others = tuple(s for s in seat.hello.serving if s.model != event.model)
                    seat.hello = replace(seat.hello, serving=(*others, event))
                    self._changed()  # a region's parent hears of it too
                log = _log.info if event.state == "live" else _log.warning
                log("release at site", model=event.model, version=event.version,
                    state=event.state, detail=event.detail)  # fmt: skip
            case Hello() | Beat() | Roster() | Relayed() | Summed():
                pass

    def leave(self, site: SiteId, send: Send, reason: str) -> None:
        """A stream has ended; if the site is not back in time its tasks are lost for `reason`."""
        seat = self._seat(site)
        if seat.send is not send:
            return  # a newer stream has the seat
        self._count(-seat.here)
        seat.send = None
        _log.info("site disconnected", **({"leaf": site} if seat.via else {}))
        self._watch(site, seat, reason)
        self._changed()

    def expect(self, site: SiteId) -> None:
        """Have a site's tasks count as lost if it is not here in time."""
        seat = self._seat(site)
        if not seat.here and seat.farewell is None:
            self._watch(site, seat, f"away for more than {self._grace:g} s")

    def _watch(self, site: SiteId, seat: _Seat, reason: str) -> None:
        def gone() -> None:
            seat.farewell = None
            self._lost(site, reason)

        seat.farewell = asyncio.get_running_loop().call_later(self._grace, gone)

    def _seat(self, site: SiteId) -> _Seat:
        return self._seats.setdefault(site, _Seat())

    def _push(self, seat: _Seat, command: Command) -> None:
        if seat.send is not None:
            seat.send(command)

    def _count(self, more: int) -> None:
        self._here += more  # and no look at every seat, each time that one changes
        telemetry.SITES.set(self._here)
        if self._here and self._beats is None:
            self._beats = asyncio.create_task(self._beat())
        elif not self._here and self._beats is not None:
            self._beats.cancel()
            self._beats = None


def _over(run: RunId) -> Forget:
    """Sites of a version that knows no runs here forget a task that never was."""
    return Forget(TaskId(f"{run}.over"), False, run)
