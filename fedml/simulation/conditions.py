"""What a world is made of: pace, stragglers, lost sites, hours. Each part is its own setting.

Every draw is a pure function of a seed and of names, so that no other draw can move it.

Sources: speeds vary by orders of magnitude, and devices come and go with the day: Bonawitz et al.
2019, arXiv:1902.01046, section 9; Lai et al. 2022, arXiv:2105.11367.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Protocol

from fedml.errors import ConfigError
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Task
from fedml.rounds import Plan
from fedml.simulation.executors.base import steps_of


@dataclass(frozen=True)
class Pace:
    """How fast sites are; each one's speeds are drawn once, log-normal around these medians.

    `spread` and `link_spread` are standard deviations of the natural logarithm: 0 and all are
    alike, 1 and one site in six is more than 2.7 times slower than the median. `slow` names sites
    that take so many times as long as they would.
    """

    rows_per_second: float
    bytes_per_second: float = math.inf
    spread: float = 1.0
    link_spread: float = 1.0
    slow: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not min(self.rows_per_second, self.bytes_per_second) > 0:
            raise ConfigError(
                f"world.pace: rows_per_second {self.rows_per_second}, bytes_per_second "
                f"{self.bytes_per_second}: both must be above 0"
            )
        if not (0 <= self.spread < math.inf and 0 <= self.link_spread < math.inf):
            raise ConfigError(
                f"world.pace: spread {self.spread}, link_spread {self.link_spread}: "
                "use 0 (all alike) or more"
            )
        for site, times in self.slow.items():
            if not 0 < times < math.inf:
                raise ConfigError(
                    f"world.pace.slow {site}: {times}: how many times as long it takes"
                )

    def computing(self, site: SiteId, rows: int, seed: int) -> float:
        """Return the seconds that `site` takes to go through `rows`."""
        seconds = rows / (self.rows_per_second * _log_normal(self.spread, seed, "speed", site))
        return seconds * self.slow.get(site, 1.0)

    def carrying(self, site: SiteId, size: int, seed: int) -> float:
        """Return the seconds that `size` bytes take to `site` and the answer back."""
        speed = self.bytes_per_second * _log_normal(self.link_spread, seed, "link", site)
        return 2 * size / speed * self.slow.get(site, 1.0)


@dataclass(frozen=True)
class Stragglers:
    """A `share` of each cohort, drawn anew in each round, has time for a part of its training.

    With E local epochs that part is uniform in 1 .. E - 1 epochs; with steps, or one epoch, as
    many steps. Exactly round(share * cohort) sites straggle, as in FedProx's own experiments;
    whether their part is taken or dropped is `Heterogeneous.partial`.
    Source: Li et al. 2020, arXiv:1812.06127, section 5.2.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("world.stragglers.share", self.share)

    def choose(self, tasks: Sequence[Task], seed: int) -> frozenset[SiteId]:
        """Return who straggles among those asked together."""
        ranked = sorted(tasks, key=lambda task: draw(seed, "straggles", _name(task)))
        return frozenset(task.site for task in ranked[: round(self.share * len(tasks))])

    def part(self, task: Task, plan: Plan, rows: int, seed: int) -> float:
        """Return the share of its steps that a straggler gets done; 0 if it cannot be parted."""
        units = plan.training.epochs if plan.training.epochs > 1 else steps_of(plan.training, rows)
        done = 1 + math.floor(draw(seed, "part", _name(task)) * (units - 1))
        return done / units if done < units else 0.0


@dataclass(frozen=True)
class Dropout:
    """A `share` of all tasks is never answered: the site is lost somewhere on the way."""

    share: float

    def __post_init__(self) -> None:
        _check_share("world.dropout.share", self.share)

    def moment(self, task: Task, seed: int) -> float | None:
        """Return after which share of its time `task` is lost, uniform in (0, 1); None if not."""
        if draw(seed, "drops", _name(task)) >= self.share:
            return None
        return draw(seed, "moment", _name(task))


class Availability(Protocol):
    """When sites are connected."""

    def back(self, site: SiteId, now: float, seed: int) -> float:
        """Return the moment from which `site` is connected: `now` itself if it is."""


@dataclass(frozen=True)
class Diurnal:
    """Each site is there for the first `share` of its day of `period` seconds.

    Days begin at moments uniform over the first `offset` of a period: 1 for sites all around the
    globe, 0 for one time zone.
    """

    share: float = 0.5
    period: float = 86400.0
    offset: float = 1.0

    def __post_init__(self) -> None:
        _check_share("world.availability.share", self.share, nobody=False)
        _check_share("world.availability.offset", self.offset)
        _check_period(self.period)

    def back(self, site: SiteId, now: float, seed: int) -> float:
        """Return when the site's next day begins, or `now` within its hours."""
        start = draw(seed, "day", site) * self.offset * self.period
        into = (now - start) % self.period
        return now if into < self.share * self.period else now + self.period - into


@dataclass(frozen=True)
class Intermittent:
    """In each `period` of so many seconds a site is there with probability `share`, by chance."""

    share: float = 0.5
    period: float = 600.0

    def __post_init__(self) -> None:
        _check_share("world.availability.share", self.share, nobody=False)
        _check_period(self.period)

    def back(self, site: SiteId, now: float, seed: int) -> float:
        """Return when the site's next good period begins, or `now` within one."""
        number = math.floor(now / self.period)
        if self._is_good(site, number, seed):
            return now
        while not self._is_good(site, number, seed):
            number += 1
        return number * self.period

    def _is_good(self, site: SiteId, number: int, seed: int) -> bool:
        return draw(seed, "there", site, number) < self.share


def _name(task: Task) -> str:
    """Return what tells a task apart, whatever its run is called: round, attempt, kind, site."""
    return task.id.removeprefix(f"{task.run}.")


def draw(seed: int, *names: object) -> float:
    """Return a number uniform in (0, 1), for these names alone."""
    digest = hashlib.sha256(".".join(map(str, ("world", seed, *names))).encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def _log_normal(spread: float, seed: int, *names: object) -> float:
    return math.exp(spread * NormalDist().inv_cdf(draw(seed, *names)))


def _check_share(what: str, share: float, *, nobody: bool = True) -> None:
    if not (0 <= share <= 1 and (nobody or share > 0)):
        raise ConfigError(f"{what} {share}: a share lies in {'[0, 1]' if nobody else '(0, 1]'}")


def _check_period(period: float) -> None:
    if not 0 < period < math.inf:
        raise ConfigError(f"world.availability.period {period}: give seconds, above 0")
