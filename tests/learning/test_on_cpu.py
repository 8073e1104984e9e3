"""What is computed another way on a CPU comes to the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fedml.learning.on_cpu import tune

LAST = torch.channels_last


def test_a_pooling_s_gradients_come_in_the_order_that_it_is_quick_in_and_are_the_same() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    tuned = copy.deepcopy(plain)
    tune(tuned, channels_last=True)
    came: list[bool] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda grad: came.append(grad.is_contiguous(memory_format=LAST)))

    x = torch.randn(5, 3, 8, 8).contiguous(memory_format=LAST)
    for model in (plain, tuned):
        model[1].register_forward_hook(watch)
        model(x).square().sum().backward()
    assert came == [False, True]
    for one, other in zip(plain.parameters(), tuned.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.25, 0.9])
def test_a_dropout_drops_as_often_scales_the_rest_and_passes_gradients_there(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Dropout(p)
    tune(layer, channels_last=False)
    x = torch.ones(400, 500, dtype=dtype, requires_grad=True)
    output = layer(x)
    kept = output != 0
    assert output.dtype == dtype
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.005)  # five deviations
    assert kept.float().mean(0).std() < 0.03  # no row or column is dropped as one
    assert kept.float().mean(1).std() < 0.03
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert torch.equal(output[kept], scale.expand(int(kept.sum())))
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)
    assert not torch.equal(layer(x) != 0, kept)  # drawn anew
    layer.eval()
    assert layer(x) is x


def test_a_seed_decides_what_is_dropped() -> None:
    layer = nn.Dropout(0.5)
    tune(layer, channels_last=False)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(torch.ones(100)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_dropout_that_drops_nothing_or_all_stays_as_it_is(p: float) -> None:
    layer = nn.Dropout(p)
    tune(layer, channels_last=False)
    assert "forward" not in vars(layer)
