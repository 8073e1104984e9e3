"""Dynamic batching: while one batch is computed, what arrives queues up to be the next.

Nobody waits for company: an idle model takes a lone request at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from fedml.errors import Overloaded, TaskFailed
from fedml.releases.session import Array, Session, Tensors

_Outcome = dict[str, Array] | TaskFailed


@dataclass(frozen=True)
class _Job:
    inputs: Tensors
    rows: int
    kind: tuple[tuple[int, ...], ...]  # shapes without the rows: only equals share a batch
    outcome: asyncio.Future[dict[str, Array]]


class Batcher:
    """Feeds one session, one batch at a time, in order of arrival; lives on one event loop.

    `most` bounds the rows of a batch, `queue` the requests that wait.
    """

    def __init__(self, session: Session, pool: Executor, *, most: int, queue: int) -> None:
        self._session, self._pool, self._queue = session, pool, queue
        self._most = most if session.has_rows else 1
        self._waiting: deque[_Job] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, inputs: Tensors, rows: int) -> asyncio.Future[dict[str, Array]]:
        """Queue a request; the future gives its outputs or `TaskFailed`.

        Raises `Overloaded` at once if too many wait. A cancelled future is not computed.
        """
        if len(self._waiting) >= self._queue:
            raise Overloaded(f"{len(self._waiting)} requests wait already; try again later")
        outcome = asyncio.get_running_loop().create_future()
        kind = tuple(array.shape[1:] for array in inputs.values())
        self._waiting.append(_Job(inputs, rows, kind, outcome))
        if self._idle.is_set():
            self._start()
        return outcome

    async def drain(self) -> None:
        """Wait until all that was submitted is answered."""
        await self._idle.wait()

    def _start(self) -> None:
        batch = self._take()
        if not batch:
            self._idle.set()
            return
        self._idle.clear()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._pool, _compute, self._session, batch)
        running.add_done_callback(lambda done: self._finish(batch, done))

    def _take(self) -> list[_Job]:
        batch: list[_Job] = []
        rows = 0
        while self._waiting:
            job = self._waiting[0]
            fits = not batch or (job.kind == batch[0].kind and rows + job.rows <= self._most)
            if not fits and not job.outcome.done():
                break
            self._waiting.popleft()
            if not job.outcome.done():
                batch.append(job)
                rows += job.rows
        return batch

    def _finish(self, batch: list[_Job], done: asyncio.Future[list[_Outcome]]) -> None:
        error = done.exception()
        outcomes = [TaskFailed(f"{error}")] * len(batch) if error else done.result()
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.outcome.done():
                continue
            if isinstance(outcome, TaskFailed):
                job.outcome.set_exception(outcome)
            else:
                job.outcome.set_result(outcome)
        self._start()


def _compute(session: Session, batch: list[_Job]) -> list[_Outcome]:
    if len(batch) == 1:
        return [_alone(session, batch[0])]
    names = batch[0].inputs.keys()
    try:
        joined = {name: np.concatenate([job.inputs[name] for job in batch]) for name in names}
        outputs = session.run(joined)
    except TaskFailed:  # someone's input did it; the others shall not suffer
        return [_alone(session, job) for job in batch]
    total = sum(job.rows for job in batch)
    if any(len(array) != total for array in outputs.values()):
        return [_alone(session, job) for job in batch]
    found: list[_Outcome] = []
    start = 0
    for job in batch:
        found.append({name: array[start : start + job.rows] for name, array in outputs.items()})
        start += job.rows
    return found


def _alone(session: Session, job: _Job) -> _Outcome:
    try:
        return session.run(job.inputs)
    except TaskFailed as error:
        return error
