"""Reducers: the weighted mean, streamed, with the same bits whatever the order of arrival.

Floating point addition depends on order; addition of integers does not. So each weight * value
is computed in float64, rounded to a multiple of 2^-32 and summed in int64. The sum holds about
+-2e9 in units of weight * value; beyond that the update, or the round, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import MADV_DONTNEED, PAGESIZE, mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml import pages
from fedml.errors import MalformedUpdate
from fedml.params import Layout, Params
from fedml.protocol.tasks import Stack, Sum, Update
from fedml.stacked import Stacked
from fedml.strategies.base import Aggregate

GRID = 2.0**32  # steps per unit; a power of two, so scaling by it is exact
_CHUNK = 2**18  # elements of a stack, or of the sum, widened at a time, whatever the model
_CHUNK_THERE = 2**24  # the same on an accelerator, where each round trip costs more than the sum
_MANY = 2**20  # elements from which on a sum's memory becomes that of the mean
_TILE = 2**15  # elements of an update widened at a time, so that they stay in a core's cache
_INT64 = 2**63
# A float64 of at most 2^51, added to this, is rounded to a whole number, ties to even, which then
# stands in the sum's low bits: quicker than rounding and converting.
_LIFT = 1.5 * 2.0**52
_LIFTED = int(torch.tensor(_LIFT, dtype=torch.float64).view(torch.int64))
_LEAST, _MOST = 2.0**-8, 1e15  # of all weights together, so the grid stays fine; of each weight
_DELTA, _MOST_OF = "delta", "most"  # in the names of a sum's parts
_HUGE = 1e300  # of a metric times its weight: a sum of these cannot overflow


@dataclass(frozen=True)
class WeightedMean:
    """Mean of deltas and slots weighted by `Update.weight`, in memory of two float32 models.

    Integer buffers are never averaged into floats: their aggregate is the elementwise maximum,
    so a batch counter advances as far as the site that counted furthest. Metrics are weighted
    means over the updates that have them; values that are not finite, or absurd, are left out.
    """

    @property
    def linear(self) -> bool:
        """True: sums are all it needs."""
        return True

    @property
    def least(self) -> int:
        """One."""
        return 1

    def start(self) -> _RunningMean:
        """Begin with an empty sum."""
        return _RunningMean()


class _RunningMean:
    def __init__(self) -> None:
        self._parts: dict[str, _Sum] = {}
        self._weights: list[float] = []
        self._metrics: dict[str, list[tuple[float, float]]] = {}
        self._total: Aggregate | None = None  # nothing is added any more

    def add(self, update: Update) -> None:
        weight = update.weight
        check_weight(weight)
        parts = {"": update.delta, **update.slots}
        sums = self._sums_for(parts)
        peaks = {name: sums[name].measure(part, weight) for name, part in parts.items()}
        for name, part in parts.items():  # nothing can fail from here on
            sums[name].add(part, weight, peaks[name])
        self._parts = sums
        self._weights.append(weight)
        for name, value in update.metrics.items():
            if is_sane(value, weight):
                self._metrics.setdefault(name, []).append((value, weight))

    def add_stack(self, stack: Stack) -> Mapping[int, str]:
        refused: dict[int, str] = {}
        parts = {"": stack.delta, **stack.slots}
        peaks: dict[str, list[int]] = {name: [] for name in parts}
        if not all(0 < weight <= _MOST for weight in stack.weights):
            for row, weight in enumerate(stack.weights):
                try:
                    check_weight(weight)
                except MalformedUpdate as error:
                    refused[row] = str(error)
        try:
            sums = self._sums_for(parts)
            for name, part in parts.items():
                peaks[name] = sums[name].measure_rows(part, stack.weights, refused)
        except MalformedUpdate as error:
            return {**dict.fromkeys(range(len(stack)), str(error)), **refused}
        kept = [row for row in range(len(stack)) if row not in refused]
        if not kept:
            return refused
        sound = stack.take(kept)
        for name, part in {"": sound.delta, **sound.slots}.items():
            sums[name].add_rows(part, sound.weights, sum(peaks[name][row] for row in kept))
        self._parts = sums
        self._weights += sound.weights
        for name, values in sound.metrics.items():
            pairs = self._metrics.setdefault(name, [])
            pairs += [(v, w) for v, w in zip(values, sound.weights, strict=True) if is_sane(v, w)]
        self._metrics = {name: pairs for name, pairs in self._metrics.items() if pairs}
        return refused

    def _sums_for(self, parts: Mapping[str, Params]) -> dict[str, _Sum]:
        return self._sums_of({name: part.layout for name, part in parts.items()})

    def _sums_of(self, layouts: Mapping[str, Layout]) -> dict[str, _Sum]:
        if self._parts and layouts.keys() != self._parts.keys():
            names = sorted(layouts.keys() ^ self._parts.keys())
            raise MalformedUpdate(f"slots {names} are reported by some sites and not by others")
        return self._parts or {name: _Sum(layout) for name, layout in layouts.items()}

    def total(self) -> tuple[Mapping[str, Params], Mapping[str, int]]:
        for part in self._parts.values():
            part.check()
        named = {name or _DELTA: part for name, part in self._parts.items()}
        parts = {
            f"{kind}/{name}": values
            for name, part in named.items()
            for kind, values in part.exported().items()
        }
        return parts, {name: part.reach for name, part in named.items()}

    def add_sum(self, total: Sum, layouts: Mapping[str, Layout]) -> None:
        weights = [summand.weight for summand in total.summands]
        for weight in weights:
            check_weight(weight)
        sums = self._sums_of(layouts)
        more: dict[str, dict[str, Params]] = {name: {} for name in sums}
        for key, values in total.parts.items():
            kind, _, name = key.partition("/")
            if (name := "" if name == _DELTA else name) not in more:
                raise MalformedUpdate(f"a sum of {key!r:.70}, which sites do not report")
            more[name][kind] = values
        reach = {name: total.reach.get(name or _DELTA, -1) for name in sums}
        for name, part in sums.items():
            part.check_sums(more[name], reach[name])
        for name, part in sums.items():  # nothing can fail from here on
            part.add_sums(more[name], reach[name])
        self._parts = sums
        self._weights += weights
        for summand in total.summands:
            for metric, value in summand.metrics.items():
                if is_sane(value, summand.weight):
                    self._metrics.setdefault(metric, []).append((value, summand.weight))

    def result(self) -> Aggregate:
        if self._total is None:
            self._total = self._mean()
        return self._total

    def _mean(self) -> Aggregate:
        if not self._weights:
            raise MalformedUpdate("no update to average")
        weight = math.fsum(self._weights)
        if weight < _LEAST:
            raise MalformedUpdate(
                f"the weights add up to {weight:g}, too little for a sum in steps of 2^-32; "
                f"use weights that add up to {_LEAST:g} or more, such as row counts"
            )
        for part in self._parts.values():
            part.check()
        means = {name: part.mean(weight) for name, part in self._parts.items()}
        delta = means.pop("")
        metrics = {name: _mean(pairs) for name, pairs in sorted(self._metrics.items())}
        return Aggregate(delta, means, weight, len(self._weights), metrics)


def check_weight(weight: float) -> None:
    """Raise `MalformedUpdate` unless `weight` is a number that a site may claim."""
    if not 0 < weight <= _MOST:
        raise MalformedUpdate(f"weight {weight}: must be above 0 and at most {_MOST:g}")


def is_sane(value: float, weight: float) -> bool:
    """True if a metric's value, weighed, is a number that sums of such can hold."""
    return abs(value * weight) < _HUGE


def _mean(pairs: list[tuple[float, float]]) -> float:
    return math.fsum(v * w for v, w in pairs) / math.fsum(w for _, w in pairs)


def _reach(peak: float, weight: float) -> int:
    """Return the grid steps of |weight * value| at `peak`; raises if int64 cannot hold them."""
    scaled = peak * weight * GRID
    if not scaled < _INT64:
        raise MalformedUpdate(
            f"values up to {peak:g} at weight {weight:g} do not fit the sum, which holds "
            f"{_INT64 / GRID:.3g}; lower the learning rate or the weights"
        )
    return round(scaled)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values, out=values).astype(np.int64)


def _is_near(values: Tensor) -> bool:
    return values.device.type == "cpu"


class _Sum:
    """A fixed-point sum of weighted `Params`, with the running maximum of their integers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._sums: dict[torch.dtype, Tensor] = {}
        self._memory: dict[torch.dtype, mmap] = {}  # of long sums
        for dtype, size in layout.sizes.items():
            if dtype.is_floating_point and size >= _MANY:
                self._memory[dtype] = pages.large(size * 8)
                self._sums[dtype] = torch.frombuffer(self._memory[dtype], dtype=torch.int64)
            elif dtype.is_floating_point:
                self._sums[dtype] = torch.zeros(size, dtype=torch.int64)
        self._there: dict[torch.dtype, Tensor] = {}  # sums of what lies on an accelerator
        self._most: dict[torch.dtype, Tensor] = {}
        self.reach = 0  # sum of all peaks, in grid steps: no element's sum can be beyond it
        self._touched = False  # whether anything was added to the sums on the CPU
        self._lifts = 0  # how often the sums hold the bits of _LIFT, to be taken off at the end
        self._scratch: NDArray[np.float64] = np.empty(0)

    def measure(self, part: Params, weight: float) -> int:
        """Return the largest |weight * value| in grid steps; raises if int64 cannot hold it."""
        self._check_layout(part)
        return _reach(part.peak(), weight)

    def measure_rows(
        self, part: Stacked, weights: Sequence[float], refused: dict[int, str]
    ) -> list[int]:
        """Return what `measure` would for each row; rows that it refuses join `refused`."""
        self._check_layout(part)
        peaks = torch.zeros(part.rows, dtype=torch.float64)
        for dtype in self._sums:
            buffer = part.buffers[dtype]
            if buffer.numel():
                low, high = buffer.aminmax(dim=1)  # NaN spreads, also through maximum
                largest = torch.maximum(low.abs(), high.abs())
                peaks = torch.maximum(peaks, largest.to("cpu", torch.float64))
        scaled = peaks * torch.tensor(weights, dtype=torch.float64) * GRID
        if bool((scaled < _INT64).all()):
            return list(map(int, scaled.round().tolist()))
        reaches = []
        for row, (peak, weight) in enumerate(zip(peaks.tolist(), weights, strict=True)):
            try:
                reaches.append(0 if row in refused else _reach(peak, weight))
            except MalformedUpdate as error:
                refused[row] = str(error)
                reaches.append(0)
        return reaches

    def _check_layout(self, part: Params) -> None:
        if part.layout != self.layout:
            raise MalformedUpdate("its layout differs from the first update's")

    def add(self, part: Params, weight: float, peak: int) -> None:
        self.reach += peak
        self._touched = True
        lift = peak < 2**51
        self._lifts += lift
        for dtype, total in self._sums.items():
            sums = total.numpy()
            for start, piece in self._scaled(part, dtype, weight * GRID):
                whole = np.add(piece, _LIFT, out=piece).view(np.int64) if lift else _rounded(piece)
                sums[start : start + len(piece)] += whole  # may wrap, as may taking lifts off
        for dtype, values in part.buffers.items():
            if not dtype.is_floating_point:
                most = self._most.get(dtype)
                self._most[dtype] = values.clone() if most is None else torch.maximum(most, values)

    def _scaled(
        self, part: Params, dtype: torch.dtype, factor: float
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield where each tile of a buffer starts, and the tile times `factor`, in one scratch."""
        if not len(self._scratch):
            self._scratch = np.empty(_TILE)
        for first, values in part.windows(dtype):
            source = (values.float() if dtype == torch.bfloat16 else values).numpy()
            for start in range(0, len(source), _TILE):
                tile = source[start : start + _TILE]
                out = self._scratch[: len(tile)]
                yield first + start, np.multiply(tile, factor, out=out, dtype=np.float64)

    def add_rows(self, part: Stacked, weights: Sequence[float], peaks: int) -> None:
        """Add rows where they lie: neither they nor their sum comes to the CPU, but the mean."""
        self.reach += peaks
        for dtype in self._sums:
            values = part.buffers[dtype]
            near = _is_near(values)
            sums = self._sums[dtype] if near else self._sums_there(dtype, values.device)
            factors = torch.tensor(weights, dtype=torch.float64).mul_(GRID)[:, None]
            factors = factors.to(values.device)
            width = max(1, (_CHUNK if near else _CHUNK_THERE) // max(1, len(values)))
            for start in range(0, values.shape[1], width):
                piece = values[:, start : start + width].to(torch.float64, copy=True)
                piece.mul_(factors).round_()  # the same operations as in `add`, so the same bits
                sums[start : start + width].add_(piece.to(torch.int64).sum(0))
            self._touched |= near
        for dtype, values in part.buffers.items():
            if not dtype.is_floating_point:
                largest, most = values.amax(0).cpu(), self._most.get(dtype)
                self._most[dtype] = largest if most is None else torch.maximum(most, largest)

    def _sums_there(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype not in self._there:
            size = self.layout.sizes[dtype]
            self._there[dtype] = torch.zeros(size, dtype=torch.int64, device=device)
        return self._there[dtype]

    def check(self) -> None:
        """Raise unless the sum of all that was added surely fits."""
        if self.reach >= _INT64:
            raise MalformedUpdate(
                f"the updates add up to {self.reach / GRID:.3g}, the sum holds "
                f"{_INT64 / GRID:.3g}; lower the learning rate or the weights"
            )

    def _lifted(self) -> int:
        """Return what the lifts have added to every sum, as it wraps."""
        return (self._lifts * _LIFTED + _INT64) % 2**64 - _INT64

    def _kinds(self) -> dict[str, Layout]:
        """Return how the exported sum is laid out: the sums of each dtype, and the maxima."""
        fields, kinds = self.layout.fields, {}
        for dtype in self._sums:
            whole = ((name, torch.int64, shape) for name, d, shape in fields if d == dtype)
            kinds[f"sum.{dtype}"] = Layout(tuple(whole))
        if integers := tuple(field for field in fields if not field[1].is_floating_point):
            kinds[_MOST_OF] = Layout(integers)
        return kinds

    def exported(self) -> dict[str, Params]:
        """Return what was added, exactly and uncopied, each piece under the name of its kind."""
        assert not self._there, "sums on an accelerator stay there"
        lifts, kinds = self._lifted(), self._kinds()
        self._lifts = 0
        pieces = {}
        for dtype, sums in self._sums.items():
            exact = {torch.int64: sums.sub_(lifts)}
            pieces[f"sum.{dtype}"] = Params.over(kinds[f"sum.{dtype}"], exact)
        if _MOST_OF in kinds:
            pieces[_MOST_OF] = Params.over(kinds[_MOST_OF], self._most)
        return pieces

    def check_sums(self, pieces: Mapping[str, Params], reach: int) -> None:
        """Raise `MalformedUpdate` unless `add_sums` can take what another has exported."""
        if {kind: piece.layout for kind, piece in pieces.items()} != self._kinds():
            raise MalformedUpdate("a sum whose layout is not the model's")
        if not 0 <= reach < _INT64:
            raise MalformedUpdate(f"a sum that reaches {reach} steps")
        for kind, piece in pieces.items():
            if kind == _MOST_OF:
                continue
            for _, values in piece.windows(torch.int64):
                if values.numel():
                    low, high = (int(end) for end in values.aminmax())
                    if max(-low, high) > reach:
                        raise MalformedUpdate(f"a sum beyond the {reach} steps that it names")

    def add_sums(self, pieces: Mapping[str, Params], reach: int) -> None:
        """Add what another has exported; only `check_sums` says no."""
        self.reach += reach
        self._touched = True
        for dtype, sums in self._sums.items():
            for start, values in pieces[f"sum.{dtype}"].windows(torch.int64):
                sums[start : start + len(values)] += values
        if _MOST_OF in pieces:
            for dtype, values in pieces[_MOST_OF].buffers.items():
                most = self._most.get(dtype)
                self._most[dtype] = values.clone() if most is None else torch.maximum(most, values)

    def mean(self, weight: float) -> Params:
        """Return the mean. A long one takes the place of its sum, of which nothing is left."""
        lifts = self._lifted()
        buffers = dict(self._most)
        for dtype in list(self._sums):
            sums, memory = self._sums.pop(dtype), self._memory.pop(dtype, None)
            there = self._there.pop(dtype, None)
            if there is not None and not self._touched:
                mean = there.to(torch.float64).div_(GRID * weight).to(dtype)
                buffers[dtype] = mean.cpu()
                continue
            if there is not None:
                sums += there.cpu()
            if memory is None:
                mean = torch.empty(len(sums), dtype=dtype)
            else:
                mean = torch.frombuffer(memory, dtype=dtype, count=len(sums))
            tile = min(_TILE, len(sums))
            steps, scratch = (
                torch.empty(tile, dtype=torch.int64),
                torch.empty(tile, dtype=torch.float64),
            )
            for start in range(0, len(sums), _TILE):
                piece = sums[start : start + _TILE]
                exact = torch.sub(piece, lifts, out=steps[: len(piece)])
                values = scratch[: len(piece)].copy_(exact).div_(GRID * weight)
                mean[start : start + _TILE] = values  # no further than what was read
            if memory is not None:
                end = -(-mean.nbytes // PAGESIZE) * PAGESIZE
                if end < sums.nbytes:
                    memory.madvise(MADV_DONTNEED, end, sums.nbytes - end)
            buffers[dtype] = mean
        return Params.over(self.layout, buffers)
