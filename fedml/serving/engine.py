"""The models a site serves: loaded, checked, batched, and switched without a missed answer.

The shelf says what is current; `refresh` follows it. A release that fails its check is refused
and the one before it goes on. Nothing here looks at signatures or dates: what is on the shelf
was verified when it came, and goes on serving with the coordinator gone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import structlog

from fedml.errors import ConfigError, TaskFailed, UnknownModel, Untrusted
from fedml.protocol.messages import Serving
from fedml.releases.manifest import GOLDEN
from fedml.releases.session import Session, Tensors, head, read_golden, rehearse
from fedml.releases.shelf import Kept, Shelf
from fedml.serving.batching import Batcher
from fedml.serving.oip import Answer, Card, Limits, Question, check
from fedml.serving.watch import Watch
from fedml.telemetry import RELEASES

_log = structlog.get_logger(__name__)
_SLOW = 0.05  # seconds a batch may take, lest a lone request wait for too long behind it


@dataclass(frozen=True)
class _Loaded:
    """A version ready to answer."""

    model: str
    kept: Kept
    session: Session
    batcher: Batcher

    @cached_property
    def card(self) -> Card:
        return Card(
            self.model, (str(self.kept.version),), self.session.inputs, self.session.outputs
        )


@dataclass
class _Model:
    live: _Loaded | None = None
    previous: _Loaded | None = None  # stays loaded, so that going back is instant
    refused: Serving | None = None

    def versions(self) -> Iterator[_Loaded]:
        yield from (loaded for loaded in (self.live, self.previous) if loaded)


class Engine:
    """Serves what a shelf holds. Lives on one event loop; computes in threads.

    `threads` is how many cores one batch of one model uses.
    """

    def __init__(self, shelf: Shelf, limits: Limits | None = None, threads: int = 1) -> None:
        self.limits, self.watch = limits or Limits(), Watch()
        self._shelf, self._threads = shelf, threads
        self._models: dict[str, _Model] = {}
        self._turn = asyncio.Lock()
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "inference")

    async def refresh(self) -> tuple[Serving, ...]:
        """Serve what the shelf now calls current; return what came of it.

        Requests in flight are answered by the version that took them. A release that cannot be
        loaded or fails its golden check is `refused`, and the one before goes on.
        """
        async with self._turn:
            names = await asyncio.to_thread(self._shelf.models)
            for name in sorted({*names, *self._models}):
                await self._follow(name)
        return self.serving()

    def serving(self) -> tuple[Serving, ...]:
        """Return each model's live version, and the release that was refused if one was."""
        found = []
        for name, model in sorted(self._models.items()):
            if model.live:
                kept = model.live.kept
                found.append(Serving(name, kept.version, kept.digest, "live"))
            if model.refused:
                found.append(model.refused)
        return tuple(found)

    def is_ready(self) -> bool:
        """True if there is a model to ask."""
        return any(model.live for model in self._models.values())

    def card(self, model: str, version: str = "") -> Card:
        """Describe a model; raises `UnknownModel` if it or the version is not served here."""
        loaded = self._find(model, version)
        versions = sorted(each.kept.version for each in self._models[model].versions())
        return Card(model, tuple(map(str, versions)), loaded.card.inputs, loaded.card.outputs)

    async def infer(self, question: Question) -> Answer:
        """Answer a question.

        Raises `UnknownModel`, `MalformedMessage` if it does not fit the model, `Refused` if it
        is too large, `Overloaded` if too many wait, `TaskFailed` if the model breaks on it.
        """
        start = time.perf_counter()
        loaded = self._find(question.model, question.version)
        rows = check(question, loaded.card, self.limits)
        outputs = await loaded.batcher.submit(question.inputs, rows)
        if question.outputs:
            outputs = {name: outputs[name] for name in question.outputs}
        version = str(loaded.kept.version)
        self.watch.record(question.model, version, rows, time.perf_counter() - start)
        return Answer(question.model, version, outputs, question.id)

    async def close(self) -> None:
        """Answer what waits, then stop; the engine is not to be used again."""
        async with self._turn:
            for model in self._models.values():
                for loaded in model.versions():
                    await loaded.batcher.drain()
            self._models.clear()
        self._pool.shutdown(wait=True)

    def _find(self, model: str, version: str) -> _Loaded:
        entry = self._models.get(model)
        if entry is None or entry.live is None:
            raise UnknownModel(f"model {model[:80]!r} is not served here")
        for loaded in entry.versions():
            if version in ("", str(loaded.kept.version)):
                return loaded
        have = sorted(loaded.kept.version for loaded in entry.versions())
        raise UnknownModel(f"model {model!r}: version {version[:20]!r} is not served, only {have}")

    async def _follow(self, name: str) -> None:
        model = self._models.setdefault(name, _Model())
        wanted: Kept | None = None
        try:
            pointer = await asyncio.to_thread(self._shelf.current, name)
            if pointer is None:
                del self._models[name]  # taken off the shelf; what waits is still answered
                return
            wanted = pointer.current
            loaded = next((each for each in model.versions() if each.kept == wanted), None)
            if loaded is None:
                loaded = await self._load(name, wanted)
        except (Untrusted, ConfigError) as error:
            self._refuse(model, name, wanted, error)
            return
        model.refused = None
        if loaded is not model.live:
            # one step, no await: a request meets the old version or the new one
            model.live, model.previous = loaded, model.live
            RELEASES.labels("live").inc()
            _log.info("release is live", model=name, version=wanted.version)

    def _refuse(self, model: _Model, name: str, kept: Kept | None, error: Exception) -> None:
        version, digest = (kept.version, kept.digest) if kept else (0, "")
        model.refused = Serving(name, version, digest, "refused", str(error))
        RELEASES.labels("refused").inc()
        _log.error("release refused", model=name, version=version, reason=str(error))

    async def _load(self, model: str, kept: Kept) -> _Loaded:
        session, most = await asyncio.to_thread(self._rehearse, model, kept)
        batcher = Batcher(session, self._pool, most=most, queue=self.limits.queue)
        return _Loaded(model, kept, session, batcher)

    def _rehearse(self, model: str, kept: Kept) -> tuple[Session, int]:
        bundle = self._shelf.bundle(model, kept.version)
        session = rehearse(bundle, kept.digest, self._threads)
        golden = read_golden(bundle / GOLDEN)
        inputs = {spec.name: golden[f"input:{spec.name}"] for spec in session.inputs}
        return session, best_batch(session, inputs, self.limits.batch)


def best_batch(session: Session, inputs: Tensors, most: int) -> int:
    """Return how many rows, at most `most`, this machine computes best together.

    Measured: doubled as long as a row gets cheaper by a tenth and a batch stays under 50 ms.
    """
    if not session.has_rows:
        return 1
    best, cost = 1, float("inf")
    rows = 1
    while rows <= most:
        batch = head(inputs, rows)
        try:
            seconds = min(_time(session, batch) for _ in range(3))
        except TaskFailed:
            break
        if rows > 1 and (seconds > _SLOW or seconds / rows > 0.9 * cost):
            break
        best, cost = rows, seconds / rows
        rows *= 2
    return best


def _time(session: Session, batch: Tensors) -> float:
    start = time.perf_counter()
    session.run(batch)
    return time.perf_counter() - start
