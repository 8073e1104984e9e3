"""One heap of rows, dealt out to sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding

Indices = npt.NDArray[np.int64]
_MOST_KEPT = 4096  # holdings made and kept; they are views, a few hundred bytes each


class Split(Mapping[SiteId, Holding]):
    """Rows in one heap, site after site; a holding is a view of it, made when asked for.

    So 100,000 sites hold their rows once. `parts` are each site's rows by index; `names` are the
    sites' names, or they are numbered. Of each site's rows the share `held_out` is kept to score
    models, drawn by `seed`. `shift` changes a site's inputs: from its number and [n, ...] to the
    same shape. `notes` say what a person should know of how rows were dealt. Raises
    `ConfigError` if a site is left with no row to train on.
    """

    def __init__(
        self,
        rows: Rows,
        parts: Sequence[Indices],
        *,
        held_out: float,
        seed: int,
        names: Sequence[str] = (),
        shift: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if not 0 <= held_out < 1:
            raise ConfigError(
                f"population.held_out {held_out}: a share of each site's rows, below 1"
            )
        width = len(str(len(parts) - 1))
        numbered = (f"site-{k:0{width}d}" for k in range(len(parts)))
        self._numbers = {SiteId(name): k for k, name in enumerate(names or numbered)}
        sizes = np.array([len(part) for part in parts], dtype=np.int64)
        kept = np.round(sizes * held_out).astype(np.int64)
        self._check(sizes, kept, held_out)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._trained = sizes - kept
        order = [_divide(part, int(k), seed, n) for n, (part, k) in enumerate(zip(parts, kept))]  # noqa: B905
        heap = rows.take(torch.from_numpy(np.concatenate(order)))
        if shift is not None:
            for number, (start, end) in enumerate(zip(self._starts, self._starts[1:])):  # noqa: B905
                heap.x[start:end] = shift(number, heap.x[start:end])
        self._heap = Rows(heap.x, heap.y)
        self.notes = tuple(notes)
        self._made: dict[SiteId, Holding] = {}

    def __getitem__(self, site: SiteId) -> Holding:
        if site not in self._made:
            if len(self._made) >= _MOST_KEPT:
                self._made.clear()
            number = self._numbers[site]
            start, end = int(self._starts[number]), int(self._starts[number + 1])
            middle = start + int(self._trained[number])
            self._made[site] = Holding(self._rows(start, middle), self._rows(middle, end))
        return self._made[site]

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, site: object) -> bool:
        return site in self._numbers

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": {}}

    def _rows(self, start: int, end: int) -> Rows:
        return Rows(self._heap.x[start:end], self._heap.y[start:end])

    def _check(self, sizes: Indices, kept: Indices, held_out: float) -> None:
        bare = np.flatnonzero(kept >= sizes)
        if len(bare):
            first = int(bare[0])
            raise ConfigError(
                f"{[*self._numbers][first]} has {sizes[first]} rows, {kept[first]} of them held "
                f"out, and none to train on (population.held_out {held_out}); "
                "lower held_out or the number of sites"
            )


def _divide(part: Indices, kept: int, seed: int, number: int) -> Indices:
    """Return `part` with the rows to train on first and the `kept` ones behind."""
    order = np.random.default_rng([seed, number]).permutation(len(part))
    return np.concatenate([part[np.sort(order[kept:])], part[np.sort(order[:kept])]])


@dataclass(frozen=True)
class SiteRows:
    """What a site holds, in numbers: rows, and each label's share of the rows it trains on."""

    site: SiteId
    train: int
    held_out: int
    labels: Mapping[int, float]


def describe(holdings: Mapping[SiteId, Holding]) -> Iterator[SiteRows]:
    """Yield each site's numbers; targets that are no labels (not whole) have no shares."""
    for site, holding in holdings.items():
        y = holding.train.y.reshape(len(holding.train), -1)[:, 0]
        shares: dict[int, float] = {}
        if bool((y == y.round()).all()):
            values, counts = y.long().unique(return_counts=True)
            shares = {int(v): int(n) / len(y) for v, n in zip(values, counts, strict=True)}
        yield SiteRows(site, len(holding.train), len(holding.held_out), shares)
