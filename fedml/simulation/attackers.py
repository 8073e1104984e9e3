"""Sites that do not play fair: what they do to their rows, and to what they send.

Attackers wrap any executor, so they look the same to every strategy: `take_over` returns a maker
of executors in which a share of the sites attacks. Strategies meet them as production would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Stack, Task, Update
from fedml.rounds import Plan
from fedml.simulation.conditions import draw
from fedml.simulation.executors.base import Answer, Executor, Holding, MakeExecutor, Memory


class Attack(Protocol):
    """What an attacker does: before training to its rows, after it to what it sends."""

    def poison(self, rows: Rows, labels: int) -> Rows:
        """Return the rows it trains on; `labels` is how many labels the recipe knows."""

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return what it sends in place of `sent`, its delta or one of its slots."""


@runtime_checkable
class Collusion(Protocol):
    """What attackers do who know all: an `Attack` may offer this too, see `collusion.py`."""

    def conspire(self, honest: Sequence[Params]) -> Params:
        """Return what each attacker sends, given what the honest send, in the order of names."""


class _Update:
    """An attack that leaves rows alone."""

    def poison(self, rows: Rows, labels: int) -> Rows:
        """Return `rows`."""
        return rows


@dataclass(frozen=True)
class SignFlip(_Update):
    """Sends the opposite of its update, `scale` times as long.

    Source: Li et al. 2019 (RSA), arXiv:1811.03761, section 6.
    """

    scale: float = 1.0

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return -scale * sent."""
        return sent * -self.scale


@dataclass(frozen=True)
class Boost(_Update):
    """Sends its update `scale` times as long, so that it outweighs the others.

    Source: model replacement, Bagdasaryan et al. 2020, arXiv:1807.00459, section 4.2; with
    `scale` the number of sites asked it puts its own model in place of the mean.
    """

    scale: float = 10.0

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return scale * sent."""
        return sent * self.scale


@dataclass(frozen=True)
class GaussianNoise(_Update):
    """Sends noise of standard deviation `std` in place of its update.

    Source: Blanchard et al. 2017 (Krum), arXiv:1703.02757, section 5, where it is 200.
    """

    std: float = 1.0

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return noise alone."""
        return sent.map(
            lambda b: self.std * torch.randn(b.shape, generator=random, dtype=torch.float64).to(b)
        )


@dataclass(frozen=True)
class FreeRide(_Update):
    """Sends zeros: it takes the model and gives nothing.

    Source: Lin, Du & Liu 2019, arXiv:1911.12560; Fraboni et al. 2021, arXiv:2006.11901.
    """

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return zeros."""
        return sent.zeros()


@dataclass(frozen=True)
class NotANumber(_Update):
    """Sends NaN, as broken sites do: one such update would undo a plain mean."""

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return NaN in every place."""
        return sent.map(lambda buffer: torch.full_like(buffer, torch.nan))


@dataclass(frozen=True)
class LabelFlip:
    """Trains on wrong labels: of C labels, c becomes C - 1 - c. Held-out rows stay right.

    Source: Fang et al. 2020, arXiv:1911.11815, section 5.1; Tolpekin et al. 2020,
    arXiv:2007.08432.
    """

    def poison(self, rows: Rows, labels: int) -> Rows:
        """Return `rows` with their labels turned round; raises `ConfigError` if y is none."""
        last, y = max(labels, 2) - 1, rows.y
        if len(y) and (bool((y != y.round()).any()) or not 0 <= y.min() <= y.max() <= last):
            raise ConfigError(
                f"attackers flip labels, and targets are not whole numbers of 0 to {last}; "
                "choose another attack"
            )
        return Rows(rows.x, last - y)

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return `sent`, which is honest work on wrong rows."""
        return sent


@dataclass(frozen=True)
class Attackers:
    """A `share` of all sites, or the `sites` listed, attacks in every round."""

    attack: Attack
    share: float = 0.2
    sites: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        if not 0 <= self.share <= 1:
            raise ConfigError(f"attackers.share {self.share}: a share of the sites, in [0, 1]")

    def among(self, sites: Iterable[SiteId]) -> frozenset[SiteId]:
        """Return who attacks: the sites listed, else round(share * n) of `sites`, by lot."""
        known = list(sites)
        if self.sites:
            if strangers := sorted(set(self.sites) - set(known)):
                raise ConfigError(
                    f"attackers.sites: there is no {', '.join(strangers)}; "
                    f"sites are called {', '.join(known[:3])} and so on"
                )
            return frozenset(SiteId(site) for site in self.sites)
        known.sort(key=lambda site: draw(self.seed, "attacks", site))
        return frozenset(known[: round(self.share * len(known))])

    def take_over(self, make: MakeExecutor) -> MakeExecutor:
        """Return `make` with these attackers among the sites.

        What it returns raises `ConfigError` for sites that do not exist and unfit rows.
        """

        def corrupted(
            plan: Plan, recipe: Recipe, holdings: Mapping[SiteId, Holding], memory: Memory
        ) -> Executor:
            who = self.among(holdings)
            poisoned = _Poisoned(holdings, who, self.attack, len(recipe.labels))
            for site in sorted(who)[:1]:
                poisoned[site]  # rows unfit for the attack are found now, not in each round
            return _Corrupted(make(plan, recipe, poisoned, memory), self, who)

        return corrupted


@dataclass(frozen=True)
class _Poisoned(Mapping[SiteId, Holding]):
    """Holdings whose attackers' training rows are poisoned when they are asked for."""

    honest: Mapping[SiteId, Holding]
    who: frozenset[SiteId]
    attack: Attack
    labels: int

    def __getitem__(self, site: SiteId) -> Holding:
        holding = self.honest[site]
        if site not in self.who:
            return holding
        return replace(holding, train=self.attack.poison(holding.train, self.labels))

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self.honest)

    def __len__(self) -> int:
        return len(self.honest)


@dataclass(frozen=True)
class _Corrupted:
    """An executor whose attackers' updates are bent on their way."""

    executor: Executor
    attackers: Attackers
    who: frozenset[SiteId]

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield what the executor answers, bent where a site attacks."""
        if isinstance(self.attackers.attack, Collusion):
            yield from self._conspire(self.attackers.attack, tasks)
            return
        for answer in self.executor.run(tasks):
            if isinstance(answer, Stack):
                yield from self._part(answer)
            elif isinstance(answer, Update) and answer.site in self.who:
                yield self._bend(answer)
            else:
                yield answer

    def _conspire(self, attack: Collusion, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield the honest answers as they come, kept in memory, and then the attackers'."""
        honest: dict[SiteId, Update] = {}
        waiting: list[Update] = []
        for answer in self.executor.run(tasks):
            stack = answer if isinstance(answer, Stack) else None
            singles = [stack.update(row) for row in range(len(stack))] if stack else [answer]
            for one in singles:
                if not isinstance(one, Update):
                    yield one
                elif one.site in self.who:
                    waiting.append(_copied(one))
                else:
                    honest[one.site] = _copied(one)
                    yield one
        known = [honest[site] for site in sorted(honest)]
        for update in waiting if known else ():
            delta = attack.conspire([one.delta for one in known])
            slots = {name: attack.conspire([one.slots[name] for one in known])
                     for name in update.slots}  # fmt: skip
            yield replace(update, delta=delta, slots=slots)
        yield from () if known else waiting

    def _part(self, stack: Stack) -> Iterator[Answer]:
        """Yield a stack's honest rows as they are, and each attacker's update bent."""
        honest = [row for row, site in enumerate(stack.sites) if site not in self.who]
        if honest:
            yield stack.take(honest)
        for row, site in enumerate(stack.sites):
            if site in self.who:
                yield self._bend(stack.update(row))

    def _bend(self, update: Update) -> Update:
        place = draw(self.attackers.seed, "bends", update.round, update.site)
        random = torch.Generator().manual_seed(int(place * 2**48))
        bend = self.attackers.attack.bend
        slots = {name: bend(slot, random) for name, slot in sorted(update.slots.items())}
        return replace(update, delta=bend(update.delta, random), slots=slots)


def _copied(update: Update) -> Update:
    """Return an update in memory of its own: executors use theirs again."""
    slots = {name: slot.clone() for name, slot in update.slots.items()}
    return replace(update, delta=update.delta.clone(), slots=slots)
