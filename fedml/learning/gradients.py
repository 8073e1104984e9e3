"""Gradients of many models at once, each on a batch of its own: one computation for a cohort.

`Functional` takes any model that `torch.func` can batch. `Layered` takes chains of linear and
convolutional layers and of layers without parameters, as batched matrix products; it is several
times faster where layers are small, and equals `Functional` up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fedml.learning.recipe import Recipe
from fedml.params import Layout, Params

Precision = Literal["fp32", "bf16"]
_Layer = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Frame:
    """What all gradients of a recipe's model share.

    Models move in one dtype's buffer, `dtype`; tensors of other dtypes stay as in `fixed`.
    """

    recipe: Recipe
    model: nn.Module
    layout: Layout
    dtype: torch.dtype
    fixed: Params
    precision: Precision = "fp32"

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Return [..., *shape] by name, views of a buffer `flat` [..., size]."""
        fields = [(name, shape) for name, dtype, shape in self.layout.fields if dtype == self.dtype]
        parts = flat.split([math.prod(shape) for _, shape in fields], dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(fields, parts, strict=True)
        }

    def forward(self, flat: Tensor, x: Tensor) -> Tensor:
        """Return the output of the one model `flat` [size] for a batch."""
        others = {n: self.fixed[n] for n, dtype, _ in self.layout.fields if dtype != self.dtype}
        with self.autocast(flat.device):
            output = functional_call(self.model, {**self.tensors(flat), **others}, (x,))
        assert isinstance(output, Tensor)
        return output

    def loss(self, output: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """Return a batch's loss; with `weights` that of each row by itself, weighted and summed."""
        with self.autocast(y.device):
            if weights is None:
                return self.recipe.loss(output, y)
            return (self.row_losses(output, y) * weights).sum()

    def row_losses(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row as a batch of its own."""
        batched = vmap(lambda o, t: self.recipe.loss(o[None], t[None]), randomness="different")
        losses: Tensor = batched(output, y)
        return losses

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Compute in bfloat16 where torch thinks it safe, if this is asked for."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Gradient(Protocol):
    """Returns losses [models] and gradients [models, size] of `values` [models, size].

    `x` and `y` are [models, batch, ...]. `weights` [models, batch], if given, say what each row
    counts, for batches of unequal size.
    """

    def __call__(
        self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Leave `values` as they are."""


class Functional:
    """By `torch.func`: whatever a model does, if torch can batch it."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def __call__(
        self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raise `RuntimeError` where torch has no batched form of an operation."""
        batched = vmap(
            grad_and_value(self._loss),
            in_dims=(0, 0, 0, None if weights is None else 0),
            randomness="different",
        )
        gradients, losses = batched(values, x, y, weights)
        return losses, gradients

    def of_rows(self, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of each row by itself, [models, batch, size]."""

        def of_one(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
            gradient: Tensor = grad_and_value(self._loss)(flat, x[None], y[None], None)[0]
            return gradient

        rows = vmap(of_one, in_dims=(None, 0, 0), randomness="different")
        gradients: Tensor = vmap(rows, randomness="different")(values, x, y)
        return gradients

    def _loss(self, flat: Tensor, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        return self._frame.loss(self._frame.forward(flat, x), y, weights)


class Layered:
    """Layer by layer, for a chain that `layers_of` knows."""

    def __init__(self, frame: Frame, layers: Sequence[_Layer]) -> None:
        self._frame, self._layers = frame, layers

    def __call__(
        self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all models forward together, then one ordinary backward pass."""
        frame, leaf = self._frame, values.detach().requires_grad_()
        with frame.autocast(values.device):
            tensors, output = frame.tensors(leaf), x
            for layer in self._layers:
                output = layer(output, tensors)
        losses = self._losses(output, y, weights)
        [gradient] = torch.autograd.grad(losses.sum(), [leaf])
        return losses.detach(), gradient

    def _losses(self, output: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of each model's batch."""
        loss = self._frame.loss
        losses: Tensor
        if weights is None:  # one number for in_dims: a tuple of them costs torch as much again
            losses = vmap(lambda o, t: loss(o, t, None), randomness="different")(output, y)
        else:
            losses = vmap(loss, randomness="different")(output, y, weights)
        return losses


def layers_of(model: nn.Module) -> list[_Layer] | None:
    """Return the batched layers of `model`, or None if it is no chain of layers known here.

    A layer without tensors runs on the rows of all models together, so it must treat rows alone.
    """
    if not isinstance(model, nn.Sequential):
        layer = None if any(True for _ in model.children()) else _layer("", model)
        return None if layer is None else [layer]
    layers: list[_Layer] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            if type(module) is not nn.Sequential:
                return None
        elif any(True for _ in module.children()):
            return None
        else:
            layer = _layer(name, module)
            if layer is None:
                return None
            layers.append(layer)
    return layers


def _layer(name: str, module: nn.Module) -> _Layer | None:
    prefix = f"{name}." if name else ""
    if type(module) is nn.Linear:
        return _linear(prefix, biased=module.bias is not None)
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return _convolution(prefix, module) if plain and module.padding != "same" else None
    if module.state_dict() or any(True for _ in module.parameters()):
        return None

    def fold(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = module(x.flatten(0, 1))
        return output.reshape(*x.shape[:2], *output.shape[1:])

    return fold


def _linear(prefix: str, *, biased: bool) -> _Layer:
    def linear(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        weight, rows = tensors[f"{prefix}weight"].mT, x.flatten(1, -2)
        if biased:
            output = torch.baddbmm(tensors[f"{prefix}bias"][:, None], rows, weight)
        else:
            output = torch.bmm(rows, weight)
        return output.reshape(*x.shape[:-1], output.shape[-1])

    return linear


def _is_near(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _convolution(prefix: str, module: nn.Conv2d) -> _Layer:
    """Return a convolution: on a CPU as one matrix product a row, elsewhere as a grouped one.

    Patches are [models, rows, patch, places]. On an H100, W1's second layer takes a grouped
    convolution 1.8 ms, and products 5.6 ms; on a CPU groups lose.
    """
    padding = (0, 0) if isinstance(module.padding, str) else module.padding
    places = tuple(zip(module.kernel_size, module.stride, padding, module.dilation, strict=True))

    def convolution(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return products(x, tensors) if _is_near(x) else groups(x, tensors)

    def groups(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors[f"{prefix}weight"]
        bias = tensors[f"{prefix}bias"].flatten() if module.bias is not None else None
        output: Tensor = functional.conv2d(
            x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1), bias,
            module.stride, padding, module.dilation, len(weight),
        )  # fmt: skip
        output = output.unflatten(1, weight.shape[:2])
        return output.transpose(0, 1)

    def products(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        patches = functional.unfold(
            x.flatten(0, 1), module.kernel_size, module.dilation, padding, module.stride
        ).unflatten(0, x.shape[:2])
        weight = tensors[f"{prefix}weight"].flatten(2)
        output: Tensor = torch.matmul(weight[:, None], patches)
        if module.bias is not None:
            output = output + tensors[f"{prefix}bias"][:, None, :, None]
        size = [
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, (kernel, stride, pad, dilation) in zip(x.shape[3:], places, strict=True)
        ]
        return output.reshape(*output.shape[:3], *size)

    return convolution
