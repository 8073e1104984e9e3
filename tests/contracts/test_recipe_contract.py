"""What every recipe promises, over all that come with fedml and all of the experiments."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from torch import nn

from fedml.cli.compose import configs
from fedml.learning.recipe import BUILT_IN, Recipe, Rows, identify, load
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task

torch.set_num_threads(1)


EXPERIMENTS: dict[str, str] = {}
for path in sorted((configs() / "experiment").glob("*.yaml")):
    EXPERIMENTS.update(yaml.safe_load(path.read_text()).get("recipes", {}))


@pytest.fixture(params=sorted({**BUILT_IN, **EXPERIMENTS}))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load(identify(request.param, EXPERIMENTS), EXPERIMENTS)


def _targets(recipe: Recipe, rows: int) -> torch.Tensor:
    return torch.arange(rows) % max(2, len(recipe.labels))  # one output tells two labels apart


def test_examples_are_the_same_each_time_and_finite(recipe: Recipe) -> None:
    assert torch.equal(recipe.example(9), recipe.example(9))
    assert len(recipe.example(9)) == 9 and bool(recipe.example(9).isfinite().all())
    assert len(recipe.example(1)) == 1


def test_the_model_takes_raw_rows_and_has_one_output_a_label(recipe: Recipe) -> None:
    output = recipe.build()(recipe.example(5))
    assert output.shape == (5, len(recipe.labels)) and bool(output.isfinite().all())


def test_two_builds_are_alike(recipe: Recipe) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Params(recipe.build().state_dict()))
    assert models[0] == models[1]


def test_public_constants_do_not_travel_with_the_parameters(recipe: Recipe) -> None:
    model = recipe.build()
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_the_loss_is_a_mean_over_rows(recipe: Recipe) -> None:
    output = torch.randn(6, len(recipe.labels), generator=torch.Generator().manual_seed(0))
    target = _targets(recipe, 6)
    apart = [recipe.loss(output[k : k + 1], target[k : k + 1]) for k in range(6)]
    assert torch.allclose(recipe.loss(output, target), torch.stack(apart).mean())


def test_scores_are_one_value_a_row_within_their_range(recipe: Recipe) -> None:
    output = torch.randn(6, len(recipe.labels), generator=torch.Generator().manual_seed(0))
    for name, values in recipe.score(output, _targets(recipe, 6)).items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert values.shape == (6,) and bool(((values >= 0) & (values <= 1)).all())


def test_it_trains_in_the_open_and_under_privacy(recipe: Recipe) -> None:
    rows = Rows(recipe.example(40), _targets(recipe, 40))
    params = Params(recipe.build().state_dict())
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", Brief(params))
    training = Training(lr=0.1, steps=3, batch_size=10)
    for privacy in (Privacy(), Privacy("record", epsilon=3.0, delta=1e-5)):
        update, _ = Trainer(recipe, training, privacy).train(task, rows, {}, seed=0, public_rows=40)
        assert update.delta.is_finite() and update.delta.norm() > 0
    assert isinstance(recipe.build(), nn.Module)
