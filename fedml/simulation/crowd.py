"""A crowd: sites that are described and not listed, so that a million cost no more than a hundred.

Nothing is kept for a site. Its name is its number, its rows are made when asked for and the same
each time, and a cohort is drawn without looking at those who are not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.learning.rowstack import RowStack
from fedml.protocol.messages import SiteId
from fedml.rounds import Muster, Plan, Selection
from fedml.rounds.selection import NOBODY, Reasons
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from fedml.strategies import in_turn

_PREFIX = "user-"
_MOST = 10**9


class Source(Protocol):
    """Where a crowd's rows come from."""

    def rows(self, users: npt.NDArray[np.uint64], first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [users, count, ...] of each user's rows from `first` on."""


@dataclass(frozen=True)
class Heap:
    """Users hold rows of one heap, each drawn with replacement, by hash of user and place."""

    heap: Rows
    seed: int = 0

    def rows(self, users: npt.NDArray[np.uint64], first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` rows of the heap for each user."""
        drawn = hashes(self.seed, users, first, count) % np.uint64(len(self.heap))
        places = torch.from_numpy(drawn.astype(np.int64))
        return self.heap.x[places], self.heap.y[places]


@dataclass(frozen=True)
class Made:
    """Users hold rows made of nothing but a hash: no two users share one.

    Features are even over [-1, 1] in steps of 2^-15; the label, of 0 and 1, says whether their
    mean, moved by a tenth of the same hash, is above 0.
    """

    features: int
    seed: int = 0

    def rows(self, users: npt.NDArray[np.uint64], first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` rows for each user, in float32."""
        lanes = self.features // 4 + 1  # four features a hash, and one more for the label
        words = hashes(self.seed, users, first * lanes, count * lanes)
        values = words.view(np.int16).reshape(len(users), count, 4 * lanes)
        x = torch.from_numpy(values).float().mul_(2.0**-15)
        own, noise = x[:, :, : self.features], x[:, :, -1]
        return own.contiguous(), (own.mean(2) + 0.1 * noise > 0).long()


def hashes(
    seed: int, users: npt.NDArray[np.uint64], first: int, count: int
) -> npt.NDArray[np.uint64]:
    """Return [users, count] numbers of 64 even bits: those at `first` and after of each user.

    Source: Steele, Lea & Flood 2014, SplitMix64, as a function of a counter.
    """
    places = np.arange(first, first + count, dtype=np.uint64)
    key = _mix(_mix(np.array([seed], np.uint64)) + users)
    return _mix(key[:, None] + places * np.uint64(0x9E3779B97F4A7C15))


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def lots(text: str, total: int, size: int) -> list[int]:
    """Return `size` different numbers below `total`, in the order drawn; `text` decides which.

    The work is that of `size`, however large `total` is.
    """
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    nobody = np.zeros(1, np.uint64)
    if 2 * size >= total:
        everyone = hashes(seed, nobody, 0, total)[0].argsort(kind="stable")
        return everyone[:size].tolist()  # type: ignore[no-any-return]
    draws = size + size // 4 + 16
    while True:
        drawn = hashes(seed, nobody, 0, draws)[0] % np.uint64(total)
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= size:
            return drawn[np.sort(first)][:size].tolist()  # type: ignore[no-any-return]
        draws *= 2


class Users(Mapping[SiteId, Holding]):
    """`size` sites of `train` rows and `held_out` rows each; also the pool they are drawn from."""

    def __init__(self, source: Source, size: int, train: int, held_out: int = 0) -> None:
        if not 1 <= size <= _MOST:
            raise ConfigError(f"population.sites {size}: use 1 to {_MOST}")
        if train < 1 or held_out < 0:
            raise ConfigError(
                f"population.rows: {train} to train on, {held_out} held out; use more"
            )
        self._source, self._size, self._train, self._held_out = source, size, train, held_out
        self._width = len(str(size - 1))

    def name(self, number: int) -> SiteId:
        """Return the name of a site by its number, from 0."""
        return SiteId(f"{_PREFIX}{number:0{self._width}d}")

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[SiteId]:
        return (self.name(number) for number in range(self._size))

    def __contains__(self, site: object) -> bool:
        return isinstance(site, str) and self._number(site) is not None

    def __getitem__(self, site: SiteId) -> Holding:
        if site not in self:
            raise KeyError(f"no site {site!r} in a crowd of {self._size}")
        users, kept = self._users([site]), self._held_out
        x, y = self._source.rows(users, 0, kept + self._train)
        return Holding(Rows(x[0, kept:], y[0, kept:]), Rows(x[0, :kept], y[0, :kept]))

    def counts(self, sites: Sequence[SiteId]) -> Sequence[int]:
        """Return the number of training rows of each of `sites`: all have as many."""
        return [self._train] * len(sites)

    def stack(self, sites: Sequence[SiteId]) -> RowStack:
        """Make the training rows of `sites` at once."""
        x, y = self._source.rows(self._users(sites), self._held_out, self._train)
        return RowStack(x, y, (self._train,) * len(sites))

    def muster(self, plan: Plan, barred: Reasons) -> Muster:
        """Return all sites as ready but those that are `barred`."""
        if plan.cohort.sites:
            raise ConfigError("cohort.sites lists sites, and a crowd has none to list: set size")
        if not plan.cohort.size:
            raise ConfigError(f"cohort.size 0 asks all {self._size} sites of a crowd: set a number")
        if in_turn(plan.strategy):
            name = type(plan.strategy).__name__
            raise ConfigError(
                f"strategy {name}: a crowd's sites are drawn, and take no turns; set population=iid"
            )
        return _Crowded(self, plan, barred)

    def _users(self, sites: Sequence[SiteId]) -> npt.NDArray[np.uint64]:
        return np.array([int(site[len(_PREFIX) :]) for site in sites], np.uint64)

    def _number(self, site: str) -> int | None:
        digits = site.removeprefix(_PREFIX)
        if not digits.isdecimal() or self.name(int(digits)) != site or int(digits) >= self._size:
            return None
        return int(digits)


@dataclass(frozen=True)
class _Crowded:
    """A crowd at one moment; those left out are counted in one line, not listed."""

    users: Users
    plan: Plan
    barred: Reasons

    @property
    def ready(self) -> int:
        return len(self.users) - len(self.barred)

    @property
    def willing(self) -> int:
        return self.ready

    @property
    def left_out(self) -> Reasons:
        return dict(self.barred)

    def cohort(self, number: int, busy: Reasons = NOBODY) -> Selection:
        return self._draw(f"cohort.{self.plan.seed}.{number}", busy)

    def scorers(self, number: int) -> Selection:
        """Return as many as train in a round, drawn anew: nobody waits for a million scores."""
        return self._draw(f"scorers.{self.plan.seed}.{number}")

    def _draw(self, lot: str, busy: Reasons = NOBODY) -> Selection:
        """Return sites drawn without replacement, in memory of the cohort and the barred."""
        total, ready = len(self.users), self.ready - len(busy)
        size = max(0, min(self.plan.cohort.size - len(busy), ready))
        numbers = lots(lot, total, min(total, size + len(self.barred) + len(busy)))
        names = map(self.users.name, numbers)
        asked = [name for name in names if name not in self.barred and name not in busy][:size]
        others = ready - len(asked)
        reason = f"not drawn: {len(asked)} of {self.ready} sites are asked in a round"
        spared = {f"({others} others)": reason} if others else {}
        return Selection(tuple(sorted(asked)), {**self.barred, **spared})


@dataclass(frozen=True)
class Crowd:
    """`sites` users of `rows` rows each, drawn from one dataset; `held_out` is the scored share."""

    sites: int
    rows: int
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Describe the crowd; its users' rows are taken from `data` as they are asked for."""
        if data is None:
            raise ConfigError("a crowd draws from one dataset: set data")
        if not 0 <= self.held_out < 1:
            raise ConfigError(
                f"population.held_out {self.held_out}: a share of each site's rows, below 1"
            )
        if self.rows < 1:
            raise ConfigError(f"population.rows {self.rows}: a user has at least one")
        kept = min(round(self.rows * self.held_out), self.rows - 1)
        return Users(Heap(data.rows(recipe), self.seed), self.sites, self.rows - kept, kept)
