"""Numbers as words of the ring 2^32, and masks over them, slice by slice over threads.

A vector is scaled to whole numbers so that the cohort's sum cannot leave the ring; a mask is an
AES-256-CTR key stream that is added word by word. All of it happens in tiles that stay in a
core's cache, so beside the vector itself nothing of its size is ever held.

Rounding is to the nearest, not random: the same update gives the same words, and the sum is as
exact as the ring allows. The error of a mean's element is at most n / 2 steps over the weights'
sum, a step being clip * n / 2^31: 2.3e-9 for ten sites of half weight and clip 0.5.

Whole numbers that sites drowned in shares of noise are summed as they are. A sum that leaves the
ring comes out wrong, and tells no more than the right one: it is that, modulo 2^32.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedml.errors import ConfigError, MalformedUpdate, RoundFailed
from fedml.protocol.secagg import Part

T = TypeVar("T")
Words = NDArray[np.uint32]
Floats = NDArray[np.float32] | NDArray[np.float64]

SLICE = 2**18  # words; what a thread takes at a time, and what is sent at a time: 1 MiB
_TILE = 2**15  # words; with its key stream and scratch it stays in the cache of a core
_BLOCK = 4  # words of one AES block
_ROUND = 1.5 * 2.0**52  # added to a float64, it leaves the nearest whole number in the low bits
_MOST_SITES = 2**12


@dataclass(frozen=True)
class Grid:
    """How the numbers of up to `sites` sites become words, with room for their sum.

    Plain parts come first, then the fine ones, and last the weight, which is fine too.
    """

    sites: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.sites <= _MOST_SITES:
            raise ConfigError(f"{self.sites} sites in a masked round: 1 to {_MOST_SITES}")
        if len({part.name for part in self.parts}) < len(self.parts):
            raise ConfigError("a part of the masked vector is named twice")

    @cached_property
    def top(self) -> int:
        """The largest whole number that one site may put into a word."""
        return (2**31 - 1 - self.sites) // self.sites

    @cached_property
    def low_bits(self) -> int:
        """How many low bits of a fine number are in its second word, whose sum must fit too."""
        return 32 - self.sites.bit_length()

    @cached_property
    def plain(self) -> tuple[Part, ...]:
        """The parts of one word a number, in order."""
        return tuple(part for part in self.parts if not part.fine)

    @cached_property
    def fine(self) -> tuple[Part, ...]:
        """The parts of two words a number, in order."""
        return tuple(part for part in self.parts if part.fine)

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """The first word of each part; that of the weight is `length` - 2."""
        starts, end = {}, 0
        for part in (*self.plain, *self.fine):
            starts[part.name] = end
            end += part.size * (2 if part.fine else 1)
        return starts

    @cached_property
    def length(self) -> int:
        """Words in a vector."""
        return sum(part.size * (2 if part.fine else 1) for part in self.parts) + 2

    def whole(self, value: float, clip: float) -> int:
        """Return `value` in steps of a fine part with that clip."""
        return round(max(-1.0, min(1.0, value / clip)) * (self.top << self.low_bits))

    def split(self, whole: int) -> tuple[int, int]:
        """Return the two words of a fine number."""
        return (whole >> self.low_bits) % 2**32, whole % 2**self.low_bits

    def join(self, high: int, low: int) -> int:
        """Return the fine number that two words of a sum make."""
        return ((high - 2**32 if high >= 2**31 else high) << self.low_bits) + low


@dataclass(frozen=True)
class _Span:
    start: int
    values: Floats
    clip: float
    factor: float


class Vector:
    """One site's numbers, times its weight: words are made of them when they are asked for."""

    def __init__(self, grid: Grid, values: Mapping[str, Floats], weight: float) -> None:
        """Take `values` by part, each 1-D and as long as its part; `weight` is in (0, 1].

        They must not change until all words were read.
        """
        if not 0 < weight <= 1:
            raise MalformedUpdate(f"weight {weight:g} of the cap: must be above 0 and at most 1")
        if values.keys() != grid.starts.keys():
            raise MalformedUpdate(f"parts {sorted(values)}, expected {sorted(grid.starts)}")
        self._grid = grid
        whole = grid.whole(weight, 1.0)
        weight = whole / (grid.top << grid.low_bits)  # exactly what the sum of weights will hold
        self._spans = []
        for part in grid.parts:
            array = values[part.name]
            if array.shape != (part.size,) or array.dtype not in (np.float32, np.float64):
                raise MalformedUpdate(
                    f"part {part.name!r}: {array.dtype} {array.shape}, expected ({part.size},)"
                )
            if part.whole:
                self._spans.append(_Span(grid.starts[part.name], array, math.inf, 1.0))
            elif not part.fine:
                factor = grid.top / part.clip * weight
                self._spans.append(_Span(grid.starts[part.name], array, part.clip, factor))
        last = np.array(self._grid.split(whole), dtype=np.uint32)
        self._tail = np.concatenate([*self._fine(values, weight), last])

    def _fine(self, values: Mapping[str, Floats], weight: float) -> Iterator[Words]:
        """Yield the words of each fine part, as `Grid.whole` and `Grid.split` make them."""
        grid = self._grid
        for part in grid.fine:
            found = values[part.name].astype(np.float64)
            if not np.isfinite(found).all():
                raise MalformedUpdate(f"part {part.name!r} holds {found[~np.isfinite(found)][0]}")
            shares = np.clip(found, -part.clip, part.clip) * weight / part.clip
            wholes = np.rint(shares * float(grid.top << grid.low_bits)).astype(np.int64)
            pairs = np.stack((wholes >> grid.low_bits, wholes & (2**grid.low_bits - 1)), 1)
            yield pairs.astype(np.uint32).reshape(-1)

    def read(self, start: int, out: Words, scratch: NDArray[np.float64]) -> None:
        """Write the words from `start` on into `out`, of at most a tile; `scratch` is as long.

        Raises `MalformedUpdate` at a number that is not finite.
        """
        end = start + len(out)
        for span in self._spans:
            first, last = max(start, span.start), min(end, span.start + len(span.values))
            if first < last:
                values = span.values[first - span.start : last - span.start]
                _round(values, span, out[first - start : last - start], scratch)
        tail = self._grid.length - len(self._tail)
        if end > tail:
            first = max(start, tail)
            out[first - start :] = self._tail[first - tail : end - tail]


def _round(values: Floats, span: _Span, out: Words, scratch: NDArray[np.float64]) -> None:
    low, high = float(values.min()), float(values.max())  # NaN spreads
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MalformedUpdate(f"the update holds {low if not math.isfinite(low) else high}")
    steps = scratch[: len(values)]
    if low < -span.clip or high > span.clip:
        np.clip(values, -span.clip, span.clip, out=steps, dtype=np.float64)
        steps *= span.factor
    else:
        np.multiply(values, span.factor, out=steps, dtype=np.float64)
    steps += _ROUND
    out[:] = steps.view(np.uint32)[::2]  # the low word, in two's complement


@dataclass(frozen=True)
class Mask:
    """A key stream to add, or to take off if `sign` is -1; its 32-byte key is used once."""

    key: bytes
    sign: int


class _Bench:
    """What a thread needs to mask a tile; handed on to the next slice, for pages cost."""

    def __init__(self) -> None:
        self.steps = np.empty(_TILE, np.float64)
        self.stream = bytearray(4 * _TILE + 16)  # a block more: OpenSSL's own rule
        self.words: Words = np.frombuffer(self.stream, np.uint32, _TILE)


_ZEROS = memoryview(bytes(4 * _TILE))


def _add_masks(words: Words, start: int, masks: Sequence[Mask], bench: _Bench) -> Iterator[Words]:
    """Yield each tile of `words` before its masks are added; the caller may fill it."""
    counter = modes.CTR((start // _BLOCK).to_bytes(16, "big"))
    streams = [(Cipher(algorithms.AES(m.key), counter).encryptor(), m.sign) for m in masks]
    for first in range(0, len(words), _TILE):
        tile = words[first : first + _TILE]
        yield tile
        zeros, stream = _ZEROS[: tile.nbytes], bench.words[: len(tile)]
        for cipher, sign in streams:
            cipher.update_into(zeros, bench.stream)
            (np.add if sign > 0 else np.subtract)(tile, stream, out=tile)


def mask(vector: Vector, grid: Grid, masks: Sequence[Mask], threads: int = 0) -> Iterator[Words]:
    """Yield the masked words, slice by slice in order, as soon as each is finished.

    `threads` 0 takes one for each core. What was yielded is the reader's own.
    """
    benches: list[_Bench] = []

    def one(start: int) -> Words:
        bench = benches.pop() if benches else _Bench()
        words = np.empty(min(SLICE, grid.length - start), np.uint32)
        for number, tile in enumerate(_add_masks(words, start, masks, bench)):
            vector.read(start + number * _TILE, tile, bench.steps)
        benches.append(bench)
        return words

    yield from _in_order(one, range(0, grid.length, SLICE), threads)


class Total:
    """The running sum of masked vectors, which unmasking turns into the sum of the vectors."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._words: Words = np.zeros(grid.length, np.uint32)

    def add(self, words: Words, threads: int = 0) -> None:
        """Add one site's masked vector."""
        if words.dtype != np.uint32 or words.shape != self._words.shape:
            raise MalformedUpdate(
                f"a masked vector of {words.shape} {words.dtype}, expected "
                f"{self._words.shape} uint32"
            )

        def one(start: int) -> None:
            self._words[start : start + SLICE] += words[start : start + SLICE]

        deque(_in_order(one, range(0, len(words), SLICE), threads), maxlen=0)

    def unmask(self, masks: Sequence[Mask], threads: int = 0) -> None:
        """Add `masks`, which are those that the sum still holds, with the sign turned."""
        benches: list[_Bench] = []

        def one(start: int) -> None:
            bench = benches.pop() if benches else _Bench()
            deque(_add_masks(self._words[start : start + SLICE], start, masks, bench), maxlen=0)
            benches.append(bench)

        deque(_in_order(one, range(0, len(self._words), SLICE), threads), maxlen=0)

    @property
    def weight(self) -> float:
        """The sum of the weights, in shares of the cap; raises `RoundFailed` if there is none."""
        high, low = self._words[-2:].tolist()
        whole, most = self._grid.join(high, low), self._grid.top << self._grid.low_bits
        if not 0 < whole <= self._grid.sites * most:
            raise RoundFailed(f"the sum of weights is {whole / most:g}: no mean can be taken")
        return whole / most

    def mean(self, name: str) -> NDArray[np.float64]:
        """Return the weighted mean of a fine part."""
        part = next(part for part in self._grid.fine if part.name == name)
        start, weight = self._grid.starts[name], self.weight
        step = part.clip / (self._grid.top << self._grid.low_bits) / weight
        high, low = self._words[start : start + 2 * part.size].reshape(-1, 2).astype(np.int64).T
        joined = ((high - (high >= 2**31) * 2**32) << self._grid.low_bits) + low
        return np.asarray(joined * step, np.float64)

    def mean_into(self, name: str, out: Floats, threads: int = 0) -> None:
        """Write the weighted mean of a plain part to `out`; of a whole one the sum over weights."""
        part = next(part for part in self._grid.plain if part.name == name)
        start = self._grid.starts[name]
        steps = self._words[start : start + part.size].view(np.int32)
        step = (1.0 if part.whole else part.clip / self._grid.top) / self.weight

        def one(first: int) -> None:
            for tile in range(first, min(first + SLICE, len(steps)), _TILE):
                end = min(tile + _TILE, first + SLICE)
                np.multiply(steps[tile:end], step, out=out[tile:end], casting="same_kind")

        deque(_in_order(one, range(0, len(steps), SLICE), threads), maxlen=0)


def _in_order(work: Callable[[int], T], starts: range, threads: int) -> Iterator[T]:
    """Yield `work(start)` for each of `starts`, in order, on so many threads, few ahead."""
    threads = min(threads or os.cpu_count() or 1, len(starts))
    if threads <= 1:
        yield from map(work, starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        for start in starts:
            ahead.append(pool.submit(work, start))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
