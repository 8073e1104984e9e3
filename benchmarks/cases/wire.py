"""What each way to travel saves in bytes and costs in time, on models that were really trained."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks import learned
from benchmarks.catalogue import Reading, Say, benchmark
from fedml.params import Params, encode, pieces
from fedml.protocol.messages import Blob
from fedml.protocol.parcels import form_of, is_coarse, pack, rounded, unpack
from fedml.rounds.plan import Wire
from fedml.transport.chunks import BlobStore

T = TypeVar("T")

_MB = 10**6
_PER = 100 * _MB  # bytes that figures are for
DOWN = ("exact", "zstd", "delta", "bf16", "bf16+zstd", "bf16+delta")
UP = ("exact", "zstd", "bf16", "bf16+zstd")
assert all(Wire(down=word) for word in DOWN)  # type: ignore[arg-type]
assert all(Wire(up=word) for word in UP)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cost:
    """Of 100 MB as they were: megabytes on the way, CPU seconds at the sender and the receiver."""

    megabytes: float
    sending: float
    taking: float

    @property
    def seconds(self) -> float:
        """Both ends together."""
        return self.sending + self.taking

    def even(self, exact: Cost) -> float:
        """Return the megabits a second of a line below which it is sooner there than whole.

        Both ends have a core for it, and nothing of it is done while bytes are on their way.
        """
        return 8 * (exact.megabytes - self.megabytes) / max(self.seconds - exact.seconds, 1e-9)


@benchmark("wire/encodings", "s")
def encodings(quick: bool, say: Say) -> Reading:
    """Measure both ends' work on an update as bf16+zstd, in CPU seconds; the limit is a copy in
    memory.
    """
    torch.set_num_threads(1)
    before, after, delta = learned.models(128 if quick else 1984)
    say(f"  a network of {before.layout.bytes / _MB:.0f} MB; figures are for 100 MB of it")
    times, extra = 2 if quick else 3, dict[str, float]()
    for way, words, params in (("down", DOWN, after), ("up", UP, delta)):
        costs = {word: _cost(word, params, before, times) for word in words}
        for word, cost in costs.items():
            even = (
                "" if word == "exact" else f", sooner below {cost.even(costs['exact']):.0f} Mbit/s"
            )
            say(
                f"  {way:4} {word:10} {cost.megabytes:6.1f} MB, {cost.sending:.3f} s to send and "
                f"{cost.taking:.3f} s to take in{even}"
            )
            extra |= {f"{way} {word} MB": cost.megabytes, f"{way} {word} s": cost.seconds}
    copied = _copied(delta, times)
    say(f"  a copy in memory: {copied:.3f} s")
    return Reading(extra["up bf16+zstd s"], copied, extra)


def _cost(word: str, params: Params, before: Params, times: int) -> Cost:
    """Measure a word of a plan's wire, without the line: from values to a file, and from a file.

    Each end hashes and writes what it has, whole or packed, as it does in a run.
    """
    sending, taking, scale = list[float](), list[float](), _PER / params.layout.bytes
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        with base.open("wb") as file:
            file.writelines(encode({"": rounded(before) if is_coarse(word) else before}))
        for time_ in range(times):
            ours, theirs = (
                BlobStore.in_transit(Path(name) / f"{who}{time_}", 2**40) for who in ("a", "b")
            )
            seconds, (whole, sent) = _seconds(partial(_send, ours, word, params, base))
            sending.append(seconds)
            data = ours.path(sent.digest).read_bytes()
            seconds, place = _seconds(partial(_take, theirs, word, data, whole, base))
            taking.append(seconds)
            assert place.read_bytes() == ours.path(whole.digest).read_bytes()
            ours.sweep(())
            theirs.sweep(())
    middle = statistics.median
    return Cost(sent.size * scale / _MB, middle(sending) * scale, middle(taking) * scale)


def _send(store: BlobStore, word: str, params: Params, base: Path) -> tuple[Blob, Blob]:
    """Return the blob of the whole, and what goes over the wire for it."""
    params = rounded(params) if is_coarse(word) else params
    whole = store.put_pieces(pieces({"": params}))
    form = form_of(word)
    if not form:
        return whole, whole
    path = store.path(whole.digest)
    return whole, store.put_pieces(pack(path, form, base if form == "delta" else None))


def _take(store: BlobStore, word: str, data: bytes, whole: Blob, base: Path) -> Path:
    """Return the file of the whole, made of what came."""
    form, came = form_of(word), store.put_bytes(data)
    if not form:
        return store.path(came.digest)
    place = store.folder / "whole"
    unpack(store.path(came.digest), form, whole, place, base if form == "delta" else None)
    return place


def _copied(params: Params, times: int) -> float:
    source = params.buffers[torch.float32].numpy()
    target = np.empty_like(source)
    np.copyto(target, source)  # its pages are new the first time
    copies = [_seconds(partial(np.copyto, target, source))[0] for _ in range(times)]
    return statistics.median(copies) * _PER / params.layout.bytes


def _seconds(act: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = act()
    return time.process_time() - start, result
