"""An audit of the private training that sites run: a federation in which some rows are canaries.

A canary's gradient, clipped, is one whole clipping norm along a coordinate that no other row
touches: the most that a row can do, and all that an attacker could wish for. Everything else is
what production runs: rounds, trainer, clipping, noise. Whoever reads the coordinate reads one
draw of the Gaussian mechanism, with the canary in it or not (see `privacy.audit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedml.errors import ConfigError, TaskFailed
from fedml.learning.recipe import Recipe, Rows
from fedml.params import Params
from fedml.privacy.audit import Scores
from fedml.protocol.messages import Privacy, RecipeId, RunId, SiteId, Training
from fedml.protocol.tasks import Report, Stack, Task, Update
from fedml.rounds import Cohort, Evaluation, Plan, Run, SiteLost
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Answer, Executor, Holding, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.strategies import FedAvg

_STEEP = 1e4  # the gradient of a canary before it is clipped, in parameters' units
_NAME = "canaries.weight"
_LEAST_CLIP, _LR = 1e-3, 1.0


@dataclass(frozen=True)
class Audit:
    """What is audited: `recipe`'s model trained under `privacy`, with `canaries` among its rows.

    `rows` made-up ones of the recipe's own and the canaries are dealt out to `sites`, which take
    `steps` steps over all of their rows in each of the privacy's rounds. `make` is the executor.
    """

    recipe: Recipe
    privacy: Privacy
    canaries: int = 2000
    sites: int = 5
    steps: int = 5
    rows: int = 200
    make: MakeExecutor = field(default=Inline)

    def __post_init__(self) -> None:
        if self.privacy.mode == "none":
            raise ConfigError("privacy.mode none claims nothing to audit; use record")
        if self.sites < 1 or self.canaries < 1 or self.steps < 1 or self.rows < self.sites:
            raise ConfigError(
                f"{self.canaries} canaries, {self.sites} sites, {self.steps} steps, {self.rows} "
                "rows: 1 or more of each, and a row for each site"
            )
        if not _LEAST_CLIP <= self.privacy.clip <= _STEEP / 10:
            raise ConfigError(
                f"privacy.clip {self.privacy.clip}: an audit's canaries are clipped to between "
                f"{_LEAST_CLIP} and {_STEEP / 10:g}"
            )

    def play(self, seed: int) -> Scores:
        """Return what an attacker sees of each canary over a whole run, clipping norms counted.

        `seed` tosses the coins and draws the model; noise comes, as ever, from the system.
        Raises `TaskFailed` if a site fails.
        """
        random = np.random.default_rng(seed)
        included = random.random(self.canaries) < 0.5
        owners = random.integers(0, self.sites, self.canaries)
        recipe = Planted(self.recipe, self.canaries)
        sites = [SiteId(f"site-{number}") for number in range(self.sites)]
        holdings = self._deal(recipe, sites, included, owners, random)
        plan = self._plan()
        listening = _Listening(self.make(plan, recipe, holdings, Memory()), sites, self.canaries)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            params = Params(recipe.build().state_dict())
        run = Run.begin(RunId("audit"), plan, params)
        outcome = Engine(run, listening, statuses(plan, sites)).play()
        if outcome.end.state != "done":
            raise TaskFailed(f"the audited run ended {outcome.end.state}: {outcome.end.detail}")
        seen = listening.heard / (_LR * self.privacy.clip)
        if self.privacy.mode == "record_distributed":
            return Scores(seen.sum(axis=0), included)  # all that anyone but the sites may see
        return Scores(seen[owners, np.arange(self.canaries)], included)

    def _deal(
        self,
        recipe: Planted,
        sites: Sequence[SiteId],
        included: NDArray[np.bool_],
        owners: NDArray[np.int64],
        random: np.random.Generator,
    ) -> Mapping[SiteId, Holding]:
        rows, classes = recipe.ordinary(self.rows), max(2, len(recipe.labels))
        y = torch.from_numpy(random.integers(0, classes, self.rows))
        holdings = {}
        for number, site in enumerate(sites):
            own = torch.arange(number, self.rows, self.sites)
            planted = np.flatnonzero(included & (owners == number))
            x = torch.cat([rows[own], recipe.planted(torch.from_numpy(planted))])
            targets = torch.cat([y[own], torch.zeros(len(planted), dtype=y.dtype)])
            everything = Rows(x, targets)
            holdings[site] = Holding(everything, everything.take([]))
        return holdings

    def _plan(self) -> Plan:
        return Plan(
            model="audit",
            recipe=RecipeId("audit", "0" * 64),
            dataset="canaries",
            strategy=FedAvg(),
            training=Training(lr=_LR, steps=self.steps),
            cohort=Cohort(quorum=self.sites, deadline=3600.0),
            rounds=self.privacy.rounds,
            privacy=self.privacy,
            evaluation=Evaluation(at_end=False),
        )


@dataclass(frozen=True)
class Planted:
    """A recipe whose model has, beside `inner`'s, one weight for each of `count` canaries.

    A row is the inner one's numbers and, last, its canary's number, 0 for none. An output is the
    inner one's numbers, the canary's weight, and whether the row is a canary.
    """

    inner: Recipe
    count: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The inner recipe's."""
        return self.inner.labels

    def build(self) -> nn.Module:
        """Return the inner model beside the canaries' weights, which start at zero."""
        return _Beside(self.inner.build(), self.inner.example(1), self.count)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the inner loss where no row is a canary; a canary's pulls at its own weight."""
        inner, weight, is_canary = output[:, :-2], output[:, -2], output[:, -1]
        pulled = (-_STEEP * weight * is_canary).mean()
        return self.inner.loss(inner, target) * (1 - is_canary.mean()) + pulled

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return nothing: an audit scores no model."""
        return {}

    def read(self, path: Path) -> Rows:
        """Raise `ConfigError`: an audit reads no file."""
        raise ConfigError(f"{path}: an audit makes its own rows")

    def example(self, rows: int) -> Tensor:
        """Return ordinary rows."""
        return self.ordinary(rows)

    def ordinary(self, rows: int) -> Tensor:
        """Return the inner recipe's made-up rows, as rows that are no canaries."""
        x = self.inner.example(rows).flatten(1).double()
        return torch.cat([x, torch.zeros(rows, 1, dtype=x.dtype)], dim=1)

    def planted(self, numbers: Tensor) -> Tensor:
        """Return the rows of the canaries of these `numbers`, counted from 0."""
        x = self.inner.example(1).flatten(1).double().expand(len(numbers), -1)
        return torch.cat([x, numbers[:, None].double() + 1], dim=1)


class _Beside(nn.Module):
    def __init__(self, inner: nn.Module, example: Tensor, count: int) -> None:
        super().__init__()
        self.inner, self.canaries = inner, nn.Embedding(count + 1, 1)
        nn.init.zeros_(self.canaries.weight)
        self._shape, self._dtype = example.shape[1:], example.dtype

    def forward(self, x: Tensor) -> Tensor:
        number = x[:, -1].long()
        own = self.inner(x[:, :-1].to(self._dtype).reshape(-1, *self._shape)).flatten(1)
        is_canary = (number > 0).to(own.dtype)[:, None]
        return torch.cat([own, self.canaries(number), is_canary], dim=1)


@dataclass
class _Listening:
    """An executor that lets another one work and adds up what leaves each site.

    `heard` is the sum of each canary's noisy gradients, a row a site.
    """

    executor: Executor
    sites: Sequence[SiteId]
    canaries: int

    def __post_init__(self) -> None:
        self.heard = np.zeros((len(self.sites), self.canaries))

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield what the executor yields; raises `TaskFailed` for a site that is lost."""
        for answer in self.executor.run(tasks):
            match answer:
                case Update():
                    self._hear(answer)
                case Stack():
                    for row in range(len(answer)):
                        self._hear(answer.update(row))
                case SiteLost():
                    raise TaskFailed(f"{answer.site} fails in the audit: {answer.reason}")
                case Report():
                    pass  # no model is scored
            yield answer

    def _hear(self, update: Update) -> None:
        weights = update.delta[_NAME][1:, 0].double() * update.weight
        self.heard[self.sites.index(update.site)] += weights.numpy()
