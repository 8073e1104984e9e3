"""A cohort's updates side by side, held until the last has come and gone over window by window.

Updates that are mapped from files stay there: of all of them together a few megabytes are in
memory at a time, however many there are. Each is taken as one vector of all its floating
numbers, those of its slots too. Sites stand in the order of their names, so that nothing depends
on the order of arrival, and ties are decided alike.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedml.errors import MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import Scores, SiteId
from fedml.protocol.tasks import Update
from fedml.strategies.base import Aggregate
from fedml.strategies.reducers import check_weight, is_sane

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
_ELEMENTS = 2**18  # of all updates together that are widened to float64 at a time
_MOST = 1e100  # of a value: the squares of a billion such add up to a float64


class Cohort:
    """Updates by site; each site counts once."""

    def __init__(self) -> None:
        self._updates: dict[SiteId, Update] = {}

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, update: Update) -> None:
        """Hold an update; raises `MalformedUpdate`, and stays as it was, if it is not sound."""
        check_weight(update.weight)
        if update.site in self._updates:
            raise MalformedUpdate(f"{update.site} has an update in this round already")
        parts = _parts(update)
        for part in parts.values():
            if not part.peak() <= _MOST:  # NaN is not
                raise MalformedUpdate(
                    f"values up to {part.peak():g}: robust rules hold {_MOST:g}; training diverged"
                )
        for other in list(self._updates.values())[:1]:
            _check_alike(parts, _parts(other))
        slots = {name: _held(slot) for name, slot in update.slots.items()}
        self._updates[update.site] = replace(update, delta=_held(update.delta), slots=slots)

    @property
    def sites(self) -> tuple[SiteId, ...]:
        """Who is in it, in the order of the rows below."""
        return tuple(sorted(self._updates))

    @property
    def weights(self) -> Vector:
        """What each site says that it weighs."""
        return np.array([update.weight for update in self._rows()])

    def gram(self) -> Matrix:
        """Return the inner products of all updates with each other."""
        total = np.zeros((len(self), len(self)))
        for _, _, _, rows in self._windows():
            total += rows @ rows.T
        lower: Matrix = np.tril(total)
        return lower + np.tril(total, -1).T  # symmetric to the bit

    def squares(self) -> Vector:
        """Return the squared norms, which are the diagonal of `gram`."""
        total = np.zeros(len(self))
        for _, _, _, rows in self._windows():
            total += np.einsum("ij,ij->i", rows, rows)
        return total

    def against(self, place: int) -> tuple[Vector, Vector]:
        """Return all updates' inner products with the one at `place`, and the squared norms."""
        along, squares = np.zeros(len(self)), np.zeros(len(self))
        for _, _, _, rows in self._windows():
            along += rows @ rows[place]
            squares += np.einsum("ij,ij->i", rows, rows)
        return along, squares

    def fold(
        self, make: Callable[[Matrix], Vector], counted_by: SiteId | None = None
    ) -> dict[str, Params]:
        """Return delta, under "", and slots, of which each window is what `make` makes of all.

        Integers are those of `counted_by`, or else their elements' lower medians: what a site
        sends, and never a mean.
        """
        first = _parts(self._rows()[0])
        buffers = {
            name: {d: torch.empty(size, dtype=d) for d, size in part.layout.sizes.items()}
            for name, part in first.items()
        }
        for name, dtype, start, rows in self._windows():
            values = torch.from_numpy(make(rows))
            buffers[name][dtype][start : start + len(values)] = values
        for name in first:
            self._count(name, buffers[name], (counted_by,) if counted_by else self.sites)
        return {name: Params.over(part.layout, buffers[name]) for name, part in first.items()}

    def metrics(self) -> Scores:
        """Return each metric's median: its mean would be at the mercy of a single site."""
        found: dict[str, list[float]] = {}
        for update in self._rows():
            for name, value in update.metrics.items():
                if is_sane(value, update.weight):
                    found.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in sorted(found.items())}

    def _rows(self) -> list[Update]:
        return [self._updates[site] for site in self.sites]

    def _windows(self) -> Iterator[tuple[str, torch.dtype, int, Matrix]]:
        """Yield part, dtype, first element and the updates' values from there, a row each.

        The matrix is used again for the next window.
        """
        rows = [_parts(update) for update in self._rows()]
        width = max(1, _ELEMENTS // len(rows))
        scratch = np.empty((len(rows), width))
        tensors = torch.from_numpy(scratch)
        for name, part in rows[0].items():
            for dtype, size in part.layout.sizes.items():
                buffers = [_array(parts[name].buffers[dtype]) for parts in rows]
                for start in range(0, size if dtype.is_floating_point else 0, width):
                    end = min(start + width, size)
                    for place, (buffer, parts) in enumerate(zip(buffers, rows, strict=True)):
                        if isinstance(buffer, np.ndarray):  # quicker
                            scratch[place, : end - start] = buffer[start:end]
                        else:
                            tensors[place, : end - start] = buffer[start:end]
                        parts[name].let_go()
                    yield name, dtype, start, scratch[:, : end - start]

    def _count(
        self, name: str, buffers: Mapping[torch.dtype, torch.Tensor], sites: Sequence[SiteId]
    ) -> None:
        """Fill the integer buffers of one part with the medians of these sites'."""
        rows = [_parts(self._updates[site])[name] for site in sites]
        width = max(1, _ELEMENTS // len(rows))
        for dtype, target in buffers.items():
            for start in range(0, 0 if dtype.is_floating_point else len(target), width):
                window = [row.buffers[dtype][start : start + width].cpu() for row in rows]
                whole = torch.stack(window).to(torch.int64).sort(0).values
                target[start : start + width] = whole[(len(rows) - 1) // 2]
                for row in rows:
                    row.let_go()


def _parts(update: Update) -> dict[str, Params]:
    return {"": update.delta, **dict(sorted(update.slots.items()))}


def _array(buffer: torch.Tensor) -> torch.Tensor | NDArray[Any]:
    """Return the same memory as an array, if NumPy knows its numbers."""
    return buffer if buffer.dtype == torch.bfloat16 else buffer.numpy()


def _held(part: Params) -> Params:
    """Return a part that nobody changes or waits for: a mapped file, or memory of its own."""
    return part if part.is_mapped else part.to("cpu").clone()


def _check_alike(parts: Mapping[str, Params], others: Mapping[str, Params]) -> None:
    if parts.keys() != others.keys():
        names = sorted(parts.keys() ^ others.keys())
        raise MalformedUpdate(f"slots {names} are reported by some sites and not by others")
    if any(part.layout != others[name].layout for name, part in parts.items()):
        raise MalformedUpdate("its layout differs from the first update's")


class Held:
    """A reduction that holds its cohort until the result is asked for."""

    def __init__(self) -> None:
        self._cohort = Cohort()
        self._total: Aggregate | None = None

    def add(self, update: Update) -> None:
        """Take one update in, or raise `MalformedUpdate` and stay as it was."""
        self._cohort.add(update)

    def result(self) -> Aggregate:
        """Return the aggregate; raises `MalformedUpdate` if this cohort has none."""
        if self._total is None:
            self._total = self._reduce()
            self._cohort = Cohort()
        return self._total

    @abstractmethod
    def _reduce(self) -> Aggregate:
        """Return what the cohort comes to."""
