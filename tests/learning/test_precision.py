"""A model is built once and copied, and bf16 takes images as convolutions like them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task


class Viewing(nn.Module):
    """A convolution whose output is viewed, and a note of how often it was called."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.convolution, self.view, self.calls = nn.Conv2d(3, 4, 3), view, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert self.calls <= 3, "another task's model"
        last = x.is_contiguous(memory_format=torch.channels_last)
        y: Tensor = self.convolution(x)
        LAYOUTS.append(last)
        return y.view(len(y), -1) if self.view else y.reshape(len(y), -1)


LAYOUTS: list[bool] = []


class Images:
    labels = ("a", "b")

    def __init__(self, view: bool) -> None:
        self.view, self.built = view, 0

    def build(self) -> nn.Module:
        self.built += 1
        return Viewing(self.view)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        return torch.zeros(rows, 3, 8, 8)


def train(trainer: Trainer, recipe: Images) -> Params:
    brief = Brief(Params(Viewing(recipe.view).state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("bern"), "train", brief)
    generator = torch.Generator().manual_seed(0)
    rows = Rows(torch.randn(6, 3, 8, 8, generator=generator), torch.zeros(6))
    return trainer.train(task, rows, {}, seed=0)[0].delta


def test_no_task_sees_what_another_left_in_the_model() -> None:
    recipe = Images(view=True)
    trainer = Trainer(recipe, Training(lr=0.1, steps=3, batch_size=2), Privacy())
    for _ in range(3):  # `Viewing` fails at a fourth call
        train(trainer, recipe)
    assert recipe.built == 1


def test_bf16_lays_images_out_as_the_model_takes_them() -> None:
    for view in (False, True):
        recipe = Images(view)
        trainer = Trainer(
            recipe, Training(lr=0.1, steps=2, batch_size=2), Privacy(), precision="bf16"
        )
        train(trainer, recipe)
        assert LAYOUTS[-1] is not view
