"""Every row's loss is its own, also where cross entropy is known for what it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.lone import Loss, alone, quickly_alone

OUTPUT, TARGET = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])


def mean(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target)


def mixed(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target) * len(output) ** 2


OTHERS: dict[str, Loss] = {
    "mixed": mixed,
    "sum": lambda o, t: functional.cross_entropy(o, t, reduction="sum"),
    "twice": lambda o, t: functional.cross_entropy(o, t) * 2,
    "scaled": lambda o, t: functional.cross_entropy(o / 3, t),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])),
    "smooth": nn.CrossEntropyLoss(label_smoothing=0.3),
    "square": lambda o, t: (o - t[:, None]).square().mean(),
}


@pytest.mark.parametrize("loss", [mean, nn.CrossEntropyLoss(), *OTHERS.values()])
def test_a_rows_number_is_its_loss_as_a_batch_of_one(loss: Loss) -> None:
    right = torch.stack([loss(OUTPUT[n : n + 1], TARGET[n : n + 1]) for n in range(6)])
    for losses in (alone(loss), quickly_alone(loss, OUTPUT)):
        assert torch.allclose(losses(OUTPUT, TARGET), right, rtol=1e-6)


def test_plain_cross_entropy_is_known_and_nothing_else_is_taken_for_it() -> None:
    quick = quickly_alone(mean, OUTPUT)
    assert quick is quickly_alone(nn.CrossEntropyLoss(), OUTPUT)
    assert all(quickly_alone(loss, OUTPUT) is not quick for loss in OTHERS.values())
