"""What one row can do to what a site releases, and what a site's numbers tell of its rows.

Each attack is shown to work without privacy, by the same code that fails with it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import TaskFailed
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update
from fedml.recipes.breast_cancer import BreastCancer
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from tests.attacks.recording import released
from tests.attacks.sabotage import scale

torch.set_num_threads(1)

ROWS, CLIP = 40, 0.5
PRIVATE = Privacy("record", epsilon=3.0, delta=1e-5, clip=CLIP, rounds=1, evaluation_epsilon=0.5)
ONE_STEP = Training(lr=1.0, steps=1)
ENGINES: list[MakeExecutor] = [Inline, Vectorised]


class Unscaled(BreastCancer):
    """Takes rows as they are, so that one can be as large as it likes."""

    def build(self) -> nn.Module:
        linear = nn.Linear(30, 2)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 30, generator=torch.Generator().manual_seed(0))


RECIPE = Unscaled()


def rows_with(seventh: Tensor) -> Rows:
    x = RECIPE.example(ROWS)
    x[7] = seventh
    return Rows(x, torch.arange(ROWS) % 2)


def without(rows: Rows) -> Rows:
    return rows.take([place for place in range(ROWS) if place != 7])


def trained(rows: Rows, privacy: Privacy, training: Training = ONE_STEP) -> Update:
    brief = Brief(Params(RECIPE.build().state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", brief)
    trainer = Trainer(RECIPE, training, privacy)
    return trainer.train(task, rows, {}, seed=0, public_rows=ROWS)[0]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the noise away, so that only the sum is left."""
    scale(monkeypatch, noise=0.0)


def moved(make: MakeExecutor, rows: Rows, privacy: Privacy) -> float:
    """Return by how much the seventh row moves the sum that a site releases."""
    sums = []
    for some in (rows, without(rows)):
        holdings = {SiteId("s"): Holding(some, some.take([]))}
        [update] = released(make, RECIPE, holdings, ONE_STEP, privacy)
        sums.append(update.delta * update.weight)
    return (sums[0] - sums[1]).norm()


@pytest.mark.parametrize("size", [1.0, 1e4, 1e18, 3e38])
@pytest.mark.parametrize("make", ENGINES)
def test_one_loud_row_moves_a_sum_as_far_as_the_clip_and_no_further(
    make: MakeExecutor, size: float, silent: None
) -> None:
    rows = rows_with(torch.full((30,), size))
    assert 0 <= moved(make, rows, PRIVATE) <= CLIP * (1 + 1e-5)


def test_one_loud_row_moves_a_sum_as_far_as_it_likes_without_privacy() -> None:
    assert moved(Inline, rows_with(torch.full((30,), 1e4)), Privacy()) > 1000 * CLIP


def test_nan_norm_breaks_a_plain_site_and_tells_that_the_row_is_there() -> None:
    rows, two = rows_with(torch.full((30,), 3e38)), Training(lr=1.0, steps=2)
    with pytest.raises(TaskFailed, match="left the finite numbers"):
        trained(rows, Privacy(), two)
    assert trained(without(rows), Privacy(), two).delta.is_finite()


@pytest.mark.parametrize("make", ENGINES)
def test_nan_norm_counts_as_zero_under_privacy(make: MakeExecutor, silent: None) -> None:
    class Rooted(Unscaled):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            whole = super().loss(output, target)
            return whole + 0 * output.abs().max().clamp(max=1e30).sub(1e30).sqrt()

    recipe = Rooted()
    rows = Rows(RECIPE.example(ROWS), torch.arange(ROWS) % 2)
    holdings = {SiteId("s"): Holding(rows, rows.take([]))}
    [update] = released(make, recipe, holdings, ONE_STEP, PRIVATE)
    assert update.delta.norm() < 1e-6  # every row's gradient is NaN, and none counts


def test_a_batch_of_one_is_trained_on_and_is_not_told_from_an_empty_one() -> None:
    """Expected batches of one row: what is released has the deviation of noise alone."""
    training = Training(lr=1.0, steps=1, batch_size=1)
    rows = rows_with(torch.full((30,), 1e6))
    some = [trained(rows, PRIVATE, training).delta.norm() for _ in range(40)]
    none = [trained(rows.take([]), PRIVATE, training).delta.norm() for _ in range(40)]
    full, empty = (torch.tensor(norms, dtype=torch.float64) for norms in (some, none))
    spread = float((full.var() / 40 + empty.var() / 40).sqrt())
    assert abs(float(full.mean() - empty.mean())) < 6 * spread + 0.1 * float(empty.mean())


def told(count: int, privacy: Privacy) -> tuple[object, ...]:
    """Return all numbers beside the delta that a site with `count` equal rows sends."""
    rows = Rows(RECIPE.example(1).expand(count, -1), torch.zeros(count, dtype=torch.long))
    update = trained(rows, privacy)
    return update.weight, sorted(update.metrics.items()), sorted(update.slots)


def test_metrics_leaking_counts_tell_how_many_rows_there_are_without_privacy_alone() -> None:
    assert told(40, Privacy()) != told(39, Privacy())
    assert told(40, PRIVATE) == told(39, PRIVATE)


def scored(count: int, privacy: Privacy) -> float:
    """Return the count that a site reports with its scores."""
    rows = Rows(RECIPE.example(count), torch.zeros(count, dtype=torch.long))
    brief = Brief(Params(RECIPE.build().state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "evaluate", brief)
    return evaluate(RECIPE, task, rows, privacy).count


def test_scores_leaking_counts_are_exact_without_privacy_alone() -> None:
    assert (scored(40, Privacy()), scored(39, Privacy())) == (40.0, 39.0)
    reported = {scored(40, PRIVATE) for _ in range(40)}
    assert len(reported) > 5
