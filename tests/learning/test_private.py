from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.descent import Descent
from fedml.learning.private import PrivateGradient
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.privacy.accounting import SampledGaussian, training_event
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update

torch.set_num_threads(1)

SILENT = 1e-12  # noise so small that only the clipped sum is left


@dataclass(frozen=True)
class Given:
    """A recipe of two classes around a model and a loss that the test gives."""

    model: Callable[[], nn.Module]
    reduction: str = "mean"
    scale: float = 1.0
    labels: tuple[str, ...] = ("no", "yes")

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(output, target, reduction=self.reduction)
        return loss * self.scale

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def read(self, path: Path) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def some_rows(count: int = 40) -> Rows:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return Rows(x, (x[:, 0] > 0).long())


def gradient_of(
    recipe: Given,
    rows: Rows,
    *,
    event: SampledGaussian | None = None,
    clip: float = 0.7,
    public_rows: int = 40,
) -> tuple[PrivateGradient, Descent]:
    model = recipe.build()
    brief = Brief(Params(model.state_dict()))
    descent = Descent(model, brief, {}, Training(lr=1.0, steps=1))
    event = event or SampledGaussian(1.0, SILENT, 1)
    made = PrivateGradient(recipe, descent, rows, event=event, clip=clip, public_rows=public_rows)
    return made, descent


def summed(recipe: Given, rows: Rows, public_rows: int = 40) -> Tensor:
    """Return one step's noiseless sum of clipped gradients, as one vector."""
    gradient, descent = gradient_of(recipe, rows, public_rows=public_rows)
    gradient.fill()
    return torch.cat([g.flatten() for g in descent.gradients.values()]).double() * public_rows


def without(rows: Rows, gone: int) -> Rows:
    return rows.take([place for place in range(len(rows)) if place != gone])


def private(
    training: Training, recipe: Given, rows: Rows, *, seed: int = 0, public_rows: int = 40
) -> Update:
    params = Params(recipe.build().state_dict())
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("north"), "train", Brief(params))
    asked = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=4)
    trainer = Trainer(recipe, training, asked)
    return trainer.train(task, rows, {}, seed=seed, public_rows=public_rows)[0]


@pytest.mark.parametrize("blow", [1.0, 1e4, 1e18])
def test_removing_a_record_moves_the_sum_by_at_most_the_clip(blow: float) -> None:
    rows = some_rows()
    rows.x[7] *= blow
    for recipe in (Given(small), Given(small, "sum"), Given(small, scale=100.0)):
        moved = float((summed(recipe, rows) - summed(recipe, without(rows, 7))).norm())
        assert 0 < moved <= 0.7 * (1 + 1e-5)


def test_the_sum_is_that_of_rows_taken_one_by_one() -> None:
    recipe, rows = Given(small), some_rows(10)
    alone = [summed(recipe, rows.take([place])) for place in range(10)]
    assert torch.allclose(summed(recipe, rows), torch.stack(alone).sum(0), atol=1e-5)


def test_a_loss_that_sums_gives_what_a_loss_that_averages_gives() -> None:
    rows = some_rows()
    assert torch.allclose(summed(Given(small), rows), summed(Given(small, "sum"), rows), atol=1e-6)


@dataclass(frozen=True)
class Coupled(Given):
    """A loss that scales with the number of rows in its batch."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) * 1e-3 * len(output) ** 2


def test_a_loss_that_mixes_rows_still_cannot_let_one_touch_the_others() -> None:
    rows, recipe = some_rows(), Coupled(small)
    moved = float((summed(recipe, rows) - summed(recipe, without(rows, 3))).norm())
    assert moved < 0.01  # its own gradient, not 39 others that grew


def test_a_row_whose_gradient_is_not_finite_counts_as_zero() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x.clamp(min=-5).add(5.5).sqrt() / (x[:, :1] - 99.0))
            return out

    recipe, rows = Given(Root), some_rows()
    rows.x[5] = 99.0
    assert torch.allclose(summed(recipe, rows), summed(recipe, without(rows, 5)), atol=1e-6)
    assert bool(summed(recipe, rows).isfinite().all())


def test_the_denominator_does_not_know_how_many_rows_there_are() -> None:
    recipe, rows = Given(small), some_rows()
    half = summed(recipe, rows.take(range(20)))
    rest = summed(recipe, rows.take(range(20, 40)))
    assert torch.allclose(summed(recipe, rows), half + rest, atol=1e-5)
    doubled, descent = gradient_of(recipe, rows, public_rows=80)
    doubled.fill()
    found = torch.cat([g.flatten() for g in descent.gradients.values()]).double()
    assert torch.allclose(found * 80, summed(recipe, rows), atol=1e-5)


def test_an_empty_sample_is_a_counted_step_of_pure_noise() -> None:
    empty = Rows(torch.zeros(0, 4), torch.zeros(0).long())
    update = private(Training(lr=1.0, steps=3, batch_size=8), Given(small), empty)
    assert update.metrics["steps"] == 3
    assert update.delta.is_finite() and all(bool(t.any()) for t in update.delta.values())


def test_a_batch_of_one_expected_row_trains() -> None:
    update = private(Training(lr=0.1, steps=10, batch_size=1), Given(small), some_rows())
    assert update.delta.is_finite()


@pytest.mark.parametrize("count", [1, 3])
def test_a_site_with_one_row_or_one_class_trains(count: int) -> None:
    rows = Rows(torch.ones(count, 4), torch.ones(count).long())
    update = private(Training(lr=0.1, steps=2), Given(small), rows)
    assert update.delta.is_finite()


@pytest.mark.parametrize("sampling", [1.0, 0.25])
def test_released_noise_has_the_variance_that_was_accounted_for(sampling: float) -> None:
    """A loss of zero gradient leaves the noise alone: chi-square on 10 000 values."""
    recipe = Given(lambda: nn.Linear(4, 2000), scale=0.0)
    event = SampledGaussian(sampling, 2.0, 1)
    gradient, descent = gradient_of(recipe, some_rows(), event=event, clip=0.5)
    gradient.fill()
    noise = torch.cat([g.flatten() for g in descent.gradients.values()]).double()
    chi = float((noise / (2.0 * 0.5 / (sampling * 40))).square().sum())
    assert abs(chi - 10_000) < 5 * math.sqrt(2 * 10_000)


def test_the_trainer_adds_the_noise_of_its_event_at_every_step() -> None:
    training = Training(lr=1.0, steps=5, batch_size=10)
    update = private(training, Given(lambda: nn.Linear(4, 2000), scale=0.0), some_rows())
    asked = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=4)
    event = training_event(training, asked, 40)
    assert update.metrics == {"steps": 5.0, "noise_multiplier": event.noise}
    std = event.noise * 0.5 / (0.25 * 40) * math.sqrt(5)
    values = update.delta.buffers[torch.float32].double()
    assert abs(float((values / std).square().sum()) - 10_000) < 5 * math.sqrt(2 * 10_000)


def test_one_seed_at_two_sites_or_rounds_does_not_give_one_noise() -> None:
    recipe = Given(lambda: nn.Linear(4, 2000), scale=0.0)
    training = Training(lr=1.0, steps=1)
    draws = [private(training, recipe, some_rows(), seed=7).delta for _ in range(2)]
    noise = torch.stack([d.buffers[torch.float32] for d in draws])
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 5 / math.sqrt(10_000)


def test_rows_join_steps_at_the_public_rate() -> None:
    """Each step's noiseless sum counts the rows that joined: one gradient each, all alike."""
    rows = Rows(torch.ones(200, 4), torch.ones(200).long())
    recipe = Given(lambda: nn.Linear(4, 2))
    event = SampledGaussian(0.1, SILENT, 1)
    gradient, descent = gradient_of(recipe, rows, event=event, clip=1e-3, public_rows=200)
    sizes = []
    for _ in range(200):
        gradient.fill()
        total = torch.cat([g.flatten() for g in descent.gradients.values()]).double()
        sizes.append(float(total.norm()) * 0.1 * 200 / 1e-3)
    mean = sum(sizes) / 200
    assert mean == pytest.approx(20, abs=5 * math.sqrt(200 * 0.1 * 0.9 / 200))
    assert len({round(size) for size in sizes}) > 5


def test_what_leaves_depends_on_rows_through_the_delta_alone() -> None:
    training = Training(lr=0.1, steps=2, batch_size=8)
    one = private(training, Given(small), some_rows(40))
    two = private(training, Given(small), some_rows(13))
    assert (one.weight, one.metrics, one.slots) == (two.weight, two.metrics, two.slots)
    assert one.weight == 40


def test_names_in_the_update_are_the_models_own() -> None:
    update = private(Training(lr=0.1, steps=1), Given(small), some_rows())
    assert list(update.delta) == sorted(small().state_dict())
    assert not [name for name in update.delta if "_module" in name]


def test_chunks_of_a_sample_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summed(Given(small), some_rows())
    monkeypatch.setattr("fedml.learning.rowwise._MOST_ROWS", 7)
    assert torch.allclose(summed(Given(small), some_rows()), whole, atol=1e-5)


def test_learning_happens_through_the_noise() -> None:
    rows, recipe = some_rows(4000), Given(small)
    training = Training(lr=2.0, steps=40, batch_size=400)
    update = private(training, recipe, rows, public_rows=4000)
    model = recipe.build()
    start = Params(model.state_dict())
    model.load_state_dict(dict(start + update.delta))
    assert float((model(rows.x).argmax(1) == rows.y).float().mean()) > 0.9


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Recalls(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(x.detach().mean(0))
        return x


class RecallsExtremes(Recalls):
    """Keeps what it sees of rare rows alone, which synthetic rows do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) > 50 else x


def test_a_buffer_that_slips_through_still_does_not_leave_the_site() -> None:
    rows = some_rows()
    rows.x[0] = 99.0
    recipe = Given(lambda: nn.Sequential(RecallsExtremes(), nn.Linear(4, 2)))
    update = private(Training(lr=0.1, steps=2), recipe, rows)
    assert not update.delta["0.seen"].any() and bool(update.delta["1.weight"].any())


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), "GroupNorm"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)),
            "BatchNorm1d mixes the rows",
        ),
        (Unused, "spare.weight takes no part in the model's forward; freeze it"),
        (lambda: nn.Sequential(Centred(), nn.Linear(4, 2)), "mixes the rows of a batch"),
        (lambda: nn.Sequential(Recalls(), nn.Linear(4, 2)), "buffer 0.seen keeps what it sees"),
    ],
)
def test_a_model_unfit_for_privacy_is_refused_and_told_why(
    model: Callable[[], nn.Module], line: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        private(Training(lr=0.1, steps=1), Given(model), some_rows())


class Rounds(nn.Module):
    """Gives large numbers, and what rounding leaves of their differences: more among others."""

    def forward(self, x: Tensor) -> Tensor:
        left = 0.0 * x[:, :1] + (0.01 if len(x) > 1 else 0.0)
        return torch.cat([1e6 * x, left], 1)


def test_rounding_of_large_numbers_is_no_mixing() -> None:
    recipe = Given(lambda: nn.Sequential(nn.Linear(4, 2), Rounds()))
    assert private(Training(lr=0.1, steps=1), recipe, some_rows()).delta.norm() > 0


def test_an_unused_layer_that_is_frozen_trains() -> None:
    def build() -> nn.Module:
        model = Unused()
        model.spare.requires_grad_(False)
        return model

    update = private(Training(lr=0.1, steps=1), Given(build), some_rows())
    assert not update.delta["spare.weight"].any() and bool(update.delta["used.weight"].any())


def test_privacy_needs_a_public_count_and_steps() -> None:
    recipe = Given(small)
    task = Task(
        TaskId("t"), RunId("r"), 1, SiteId("n"), "train", Brief(Params(small().state_dict()))
    )
    asked = Privacy("record", epsilon=3.0, delta=1e-5)
    with pytest.raises(ConfigError, match="declares its row count"):
        Trainer(recipe, Training(lr=1.0, steps=1), asked).train(task, some_rows(), {}, seed=0)
    with pytest.raises(ConfigError, match=r"set training\.steps"):
        Trainer(recipe, Training(lr=1.0, epochs=1), asked).train(
            task, some_rows(), {}, seed=0, public_rows=40
        )
