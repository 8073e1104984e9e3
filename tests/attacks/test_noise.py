"""Attacks on the noise and on the sums it is added to, over sites, rounds and engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml.learning.recipe import Rows
from fedml.protocol.messages import Privacy, SiteId, Training
from fedml.protocol.tasks import Update
from fedml.recipes.breast_cancer import BreastCancer
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from tests.attacks.recording import released
from tests.attacks.sabotage import scale

torch.set_num_threads(1)

SITES, ROUNDS = 4, 3
PRIVATE = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=ROUNDS)
ENGINES: list[MakeExecutor] = [Inline, Vectorised, Processes]


class Blank(BreastCancer):
    """A recipe whose loss has no gradient: what a site releases is its noise, and nothing else."""

    def build(self) -> nn.Module:
        wide = nn.Linear(30, 1000)
        nn.init.zeros_(wide.weight)
        nn.init.zeros_(wide.bias)
        return wide

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) * 0

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 30, generator=torch.Generator().manual_seed(0))

    def read(self, path: Path) -> Rows:
        raise NotImplementedError


def releases(
    make: MakeExecutor, privacy: Privacy = PRIVATE, *, rows: int = 40, batch: int = 0
) -> list[Update]:
    """Return what all sites of a run release, round after round."""
    recipe = Blank()
    some = Rows(recipe.example(rows), torch.zeros(rows, dtype=torch.long))
    holdings = {SiteId(f"s{number}"): Holding(some, some.take([])) for number in range(SITES)}
    training = Training(lr=1.0, steps=2, batch_size=batch)
    return released(make, recipe, holdings, training, privacy)


def flat(found: Sequence[Update]) -> Tensor:
    """Return all releases [updates, parameters]."""
    return torch.stack([update.delta.buffers[torch.float32].double() for update in found])


def correlation(found: Sequence[Update]) -> float:
    """Return by how many deviations the most alike two releases are off independence."""
    noise = flat(found)
    pairs = torch.corrcoef(noise) - torch.eye(len(noise), dtype=torch.float64)
    return float(pairs.abs().max()) * math.sqrt(noise.shape[1])


@pytest.mark.parametrize("make", ENGINES)
def test_noise_of_any_two_sites_and_rounds_is_independent(make: MakeExecutor) -> None:
    found = releases(make)
    assert len(found) == SITES * ROUNDS
    assert correlation(found) < 6  # of 66 pairs: one in ten million by chance


def key_from(seed: Callable[[], bytes], patch: pytest.MonkeyPatch) -> None:
    """Let all noise come of a key that is made of `seed`, where the system's entropy should be."""
    patch.setattr("fedml.privacy.noise.os.urandom", lambda count: (seed() * count)[:count])


def test_noise_seeded_from_the_experiment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed for each site and round: the fault that an audit by canaries does not see."""
    key_from(lambda: b"\x07", monkeypatch)
    assert correlation(releases(Inline)) > 100


def test_noise_seeded_by_the_round_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that share a seed: subtracting two updates of a round would remove it."""
    calls = iter(range(10_000))
    key_from(lambda: bytes([(next(calls) // (2 * SITES)) % 256]), monkeypatch)
    assert correlation(releases(Inline)) > 100


def test_subtracting_two_sites_updates_leaves_the_noise_of_both() -> None:
    found = flat(releases(Inline))
    one, two, difference = found[0], found[1], found[0] - found[1]
    assert float(difference.square().mean() / (one.square().mean() + two.square().mean())) > 0.9


@pytest.mark.parametrize("batch", [0, 10])
@pytest.mark.parametrize("make", ENGINES)
def test_released_noise_has_the_deviation_that_its_event_says(
    make: MakeExecutor, batch: int
) -> None:
    """Chi-square over the releases of a model that no row can move."""
    found = releases(make, batch=batch)
    told = {update.metrics["noise_multiplier"] for update in found}
    assert len(told) == 1
    expected_rows = batch or 40
    std = told.pop() * PRIVATE.clip / expected_rows * math.sqrt(2)  # of two steps
    values = flat(found)
    squares = float((values / std).square().sum())
    assert abs(squares - values.numel()) < 6 * math.sqrt(2 * values.numel())


def test_noise_that_is_too_small_by_a_hundredth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scale(monkeypatch, noise=0.99)
    with pytest.raises(AssertionError):
        test_released_noise_has_the_deviation_that_its_event_says(Inline, 0)


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_an_empty_batch_is_a_step_of_noise_like_any_other(make: MakeExecutor) -> None:
    """A step that was skipped for want of rows would tell that there were none."""
    found = releases(make, rows=2, batch=1)  # a quarter of the samples are empty
    assert {update.metrics["steps"] for update in found} == {2.0}
    std = found[0].metrics["noise_multiplier"] * PRIVATE.clip * math.sqrt(2)
    ratios = flat(found).square().mean(dim=1).sqrt() / std
    assert float((ratios - 1).abs().max()) < 0.05
