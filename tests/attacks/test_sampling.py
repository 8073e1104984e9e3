"""Who joins a step, in each engine as it runs; and samplers that would be no Poisson's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedml.learning.recipe import Rows
from fedml.privacy.noise import SecureNoise
from fedml.privacy.sampling import PoissonSampler
from fedml.protocol.messages import Privacy, SiteId, Training
from fedml.recipes.breast_cancer import BreastCancer
from fedml.simulation.canaries import Planted
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from tests.attacks.recording import released
from tests.attacks.sabotage import scale

torch.set_num_threads(1)

ROWS, RATE, ROUNDS, SITES = 40, 0.3, 100, 2
ENGINES: list[MakeExecutor] = [Inline, Vectorised]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the noise away, so that sums show who is in them."""
    scale(monkeypatch, noise=0.0)


def joined(make: MakeExecutor) -> Tensor:
    """Return who joined [steps, rows]: each row is a canary that moves a weight of its own."""
    recipe = Planted(BreastCancer(), ROWS)
    rows = Rows(recipe.planted(torch.arange(ROWS)), torch.zeros(ROWS, dtype=torch.long))
    holdings = {SiteId(f"s{n}"): Holding(rows, rows.take([])) for n in range(SITES)}
    training = Training(lr=1.0, steps=1, batch_size=int(ROWS * RATE))
    asked = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=ROUNDS)
    found = released(make, recipe, holdings, training, asked)
    assert len(found) == SITES * ROUNDS
    moved = torch.stack([update.delta["canaries.weight"][1:, 0] for update in found])
    return (moved > 1e-4).double()


def faults(told: Tensor) -> list[str]:
    """Return what is wrong with a sample that should be Poisson's, at six deviations."""
    steps, rows = told.shape
    found = []
    spread = math.sqrt(RATE * (1 - RATE) / steps)
    off = abs(float(told.mean()) - RATE) * math.sqrt(rows)
    if max(off, float((told.mean(0) - RATE).abs().max())) > 6 * spread:
        found.append("rate")
    alike = torch.corrcoef(told.T) - torch.eye(rows, dtype=torch.float64)
    if not float(alike.nan_to_num(1.0).abs().max()) < 6 / math.sqrt(steps):
        found.append("rows together")
    later = ((told[SITES:] - RATE) * (told[:-SITES] - RATE)).mean() / (RATE * (1 - RATE))
    if abs(float(later)) > 6 / math.sqrt(steps * rows):
        found.append("steps together")
    ratio = float(told.sum(1).var()) / (rows * RATE * (1 - RATE))
    if abs(ratio - 1) > 6 * math.sqrt(2 / steps):
        found.append("size")
    return found


@pytest.mark.parametrize("make", ENGINES)
def test_rows_join_each_engine_s_steps_at_the_public_rate_and_by_themselves(
    make: MakeExecutor, silent: None
) -> None:
    assert not faults(joined(make))


def shuffled(self: PoissonSampler, noise: SecureNoise) -> Tensor:
    """Take a batch of fixed size, as a data loader does: what accounting does not hold for."""
    return torch.randperm(self.rows)[: round(self.rows * self.probability)].sort().values


def eager(self: PoissonSampler, noise: SecureNoise) -> Tensor:
    return (torch.rand(self.rows) < 1.3 * self.probability).nonzero()[:, 0]


def in_pairs(self: PoissonSampler, noise: SecureNoise) -> Tensor:
    joined = torch.rand(self.rows // 2) < self.probability
    return joined.repeat_interleave(2).nonzero()[:, 0]


def frozen(self: PoissonSampler, noise: SecureNoise) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(self.rows, generator=generator) < self.probability).nonzero()[:, 0]


@pytest.mark.parametrize(
    ("sampler", "fault"),
    [(shuffled, "size"), (eager, "rate"), (in_pairs, "rows together"), (frozen, "steps together")],
)
def test_a_sampler_that_is_not_poisson_s_is_seen(
    sampler: object, fault: str, silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoissonSampler, "sample", sampler)
    assert fault in faults(joined(Inline))
