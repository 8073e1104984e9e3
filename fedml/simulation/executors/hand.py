"""One worker process of `Processes`, seen from both ends: `Hand` gives orders, `work` obeys.

A worker is forked, so it has the recipe and every site's rows as they are, shared and uncopied
until written to. It works with one thread: its siblings have the other cores. Orders and
replies are small and go through a socket; tensors lie in shared memory, see `sheets`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import torch

from fedml.lifeline import die_with_parent
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.rounds import SiteLost
from fedml.simulation.executors.base import Answer, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.machine import tune_allocator
from fedml.simulation.executors.sheets import Sheet, bytes_of
from fedml.simulation.marks import mark_of

_NONE = Params({})
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Place:
    """Where tensors lie: which sheet, how much of it is used; `size` if the sheet is a new one."""

    sheet: int
    length: int
    size: int = 0


@dataclass(frozen=True)
class Order:
    """A task without its tensors, and where those are; `freed` are sheets to write to again."""

    task: Task
    releases: dict[tuple[SiteId, str], int]
    board: Place
    slots: Place | None
    freed: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """An answer without its tensors; the same for what the site's rule keeps."""

    answer: Answer
    releases: dict[tuple[SiteId, str], int]
    delta: Place | None = None
    slots: Place | None = None
    kept: Place | None = None
    known: Mapping[str, dict[str, float | str]] = field(default_factory=dict)


@dataclass
class Job:
    """A task on its way through the executor; `tries` counts the workers it went to."""

    task: Task
    tries: int = 0


@dataclass
class Board:
    """A brief's tensors, written once for all workers."""

    number: int
    brief: Brief
    sheet: Sheet
    place: Place


def post(number: int, brief: Brief) -> Board:
    """Return `brief` on a board of its own."""
    parts = {"": brief.params, **brief.slots}
    sheet = Sheet.new(bytes_of(parts))
    return Board(number, brief, sheet, Place(number, sheet.write(parts), sheet.size))


# --- the executor's end ------------------------------------------------------------------------


class Hand:
    """A worker as its executor sees it; raises `EOFError` or `OSError` once it has died."""

    def __init__(self, inline: Inline, others: Iterable[Hand]) -> None:
        """Fork a worker that will do what `inline` does; it lets go of the `others`' sockets."""
        self.connection, end = _FORK.Pipe()
        strangers = [self.connection, *(other.connection for other in others)]
        self.process = _FORK.Process(
            target=work, args=(end, inline, strangers, os.getpid()), daemon=True
        )
        with warnings.catch_warnings():  # with one thread of its own, torch is safe after a fork
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=Warning)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:  # until it ignores Ctrl-C, the new process must not even see one
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end.close()
        self.jobs: deque[Job] = deque()
        self._board = -1
        self._sheets: dict[int, Sheet] = {}
        self._freed: list[int] = []

    def give(self, job: Job, board: Board, memory: Memory) -> None:
        """Hand over a job; the worker does one after the other."""
        self.jobs.append(job)
        job.tries += 1
        slots = memory.slots.get(job.task.site)
        inbox = Sheet.new(bytes_of(slots)) if slots else None
        place = Place(0, inbox.write(slots), inbox.size) if inbox and slots else None
        news = self._board != board.number
        order = Order(
            replace(job.task, brief=replace(board.brief, params=_NONE, slots={})),
            memory.releases,
            board.place if news else replace(board.place, size=0),
            place,
            tuple(self._freed.pop() for _ in range(len(self._freed))),
        )
        self.connection.send(order)
        for sheet in (board.sheet if news else None, inbox):
            if sheet is not None:
                send_handle(self.connection, sheet.descriptor, self.process.pid)
        if inbox is not None:
            inbox.close_descriptor()
        self._board = board.number

    def take(self) -> tuple[Answer, Memory]:
        """Return the answer to the first of the jobs, and what its site's memory has come to."""
        reply: Reply = self.connection.recv()
        delta, slots, kept = map(self._read, (reply.delta, reply.slots, reply.kept))
        task, answer = self.jobs.popleft().task, reply.answer
        if isinstance(answer, Update):
            for name, known in reply.known.items():
                (delta if name in delta else slots)[name].known.update(known)
            answer = replace(answer, delta=delta[""], slots=slots)
            return answer, Memory({task.site: kept}, reply.releases)
        return answer, Memory({}, reply.releases)

    def _read(self, place: Place | None) -> dict[str, Params]:
        if place is None:
            return {}
        if place.size:
            sheet = Sheet(recv_handle(self.connection), place.size)
            sheet.close_descriptor()
            self._sheets[place.sheet] = sheet
        number, freed = place.sheet, self._freed
        return self._sheets[number].read(place.length, lambda: freed.append(number))

    def dismiss(self) -> str:
        """End the worker at once, whatever it does; return how it ended."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        status = self.process.exitcode or 0
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


# --- the worker's end --------------------------------------------------------------------------


def work(orders: Connection, inline: Inline, strangers: list[Connection], parent: int) -> None:
    """Obey orders until there are no more, or `parent`, a process id, is gone."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in strangers:  # or no end of file would ever be heard
        connection.close()
    gc.freeze()  # a collection that looks at what is shared would copy it
    tune_allocator()
    torch.set_num_threads(1)
    desk = _Desk(orders, inline)
    try:
        while True:
            desk.serve(orders.recv())
    except (EOFError, ConnectionError):  # the parent has gone, or let go of us
        return


class _Desk:
    """Where a worker keeps the brief it works on, and the sheets for its answers.

    A task trains on the sheet that its delta will be read from, so it is never copied.
    """

    def __init__(self, orders: Connection, inline: Inline) -> None:
        self.orders, self.inline = orders, replace(inline, copy=self._lay)
        self.brief: dict[str, Params] = {}
        self.sheets: list[Sheet] = []
        self.free: set[int] = set()
        self.told: set[int] = set()  # sheets that the executor has the descriptors of
        self.laid: tuple[int, int, Params] | None = None  # sheet, length, what is on it

    def serve(self, order: Order) -> None:
        self.free.update(order.freed)
        self._clear()
        if order.board.size:
            self.brief = self._fetch(order.board)
        slots = self._fetch(order.slots) if order.slots else {}
        stripped = order.task.brief
        parts = dict(self.brief)
        brief = Brief(parts.pop(""), stripped.rule, stripped.settings, parts)
        task = replace(order.task, brief=brief)
        memory = Memory({task.site: slots} if slots else {}, order.releases)
        self._reply(self._do(task, memory), memory)

    def _do(self, task: Task, memory: Memory) -> Answer:
        self.inline.memory = memory
        try:
            (answer,) = self.inline.run([task])
        except Exception as error:  # noqa: BLE001 - the outermost loop of this process
            traceback.print_exc(file=sys.stderr)
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return SiteLost(task.site, line, False, task.id)
        return answer

    def _fetch(self, place: Place) -> dict[str, Params]:
        sheet = Sheet(recv_handle(self.orders), place.size)
        sheet.close_descriptor()
        return sheet.read(place.length)

    def _reply(self, answer: Answer, memory: Memory) -> None:
        if not isinstance(answer, Update):
            self.orders.send(Reply(answer, memory.releases))
            return
        mark_of(answer)  # here, where the values are still in this core's cache
        known = {name: part.known for name, part in (("", answer.delta), *answer.slots.items())}
        delta: Place | None
        if self.laid is not None and self.laid[2] is answer.delta:
            delta, self.laid = self._place(*self.laid[:2]), None
        else:
            delta = self._store({"": answer.delta})
        slots, kept = self._store(answer.slots), self._store(memory.slots.get(answer.site, {}))
        bare = replace(answer, delta=_NONE, slots={})
        self.orders.send(Reply(bare, memory.releases, delta, slots, kept, known))
        for place in (delta, slots, kept):
            if place is not None and place.size:
                sheet = self.sheets[place.sheet]
                send_handle(self.orders, sheet.descriptor, os.getppid())
                sheet.close_descriptor()

    def _lay(self, values: Params) -> Params:
        """Return a copy of `values` on a sheet, where what becomes of them is found."""
        self._clear()
        number, length = self._write({"": values})
        own = self.sheets[number].read(length)[""]
        self.laid = number, length, own
        return own

    def _clear(self) -> None:
        """Take back the sheet of a task that came to nothing, or left its delta elsewhere."""
        if self.laid is not None:
            self.free.add(self.laid[0])
            self.laid = None

    def _store(self, parts: Slots) -> Place | None:
        return self._place(*self._write(parts)) if parts else None

    def _place(self, number: int, length: int) -> Place:
        size = 0 if number in self.told else self.sheets[number].size
        self.told.add(number)
        return Place(number, length, size)

    def _write(self, parts: Slots) -> tuple[int, int]:
        """Copy `parts` to a sheet; return its number, and how much of it they take."""
        size = bytes_of(parts)
        for number in sorted(self.free):
            if self.sheets[number].size >= size:
                self.free.discard(number)
                return number, self.sheets[number].write(parts)
        sheet = Sheet.new(size)
        self.sheets.append(sheet)
        return len(self.sheets) - 1, sheet.write(parts)
