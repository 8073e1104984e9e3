"""Gradients of single units (rows, or persons of several rows) that need not be written down.

A linear layer's gradient for a unit is a product of what the layer took in and what it was told.
The product's norm follows from its two sides ("ghost norm": Goodfellow 2015, arXiv:1510.01799;
Li et al. 2022, arXiv:2110.05679), and a weighted sum over units is one product of all of them.
So a step takes one pass forward and one back. What has no such form is written down, unit by unit.

Soundness: the sum must hold of no unit more than the norm that it was clipped by. Sides are
float32, and every norm, product and sum of them is float64, in which products of two float32 are
exact. What a sum's rounding adds is then below n * m * 2**-53 of the clip, for n units in pieces
of at most m terms, which `mechanisms.MARGIN` covers up to n * m of 2**32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

_PIECE = 2**22  # numbers of a scratch pad, at most, unless one row takes more
_CACHED = 2**18  # numbers of a convolution's patches at a time, unless one row has more

Sums = Mapping[Tensor, Tensor]  # float64, of a parameter's shape


@dataclass(frozen=True)
class Units:
    """Which rows of a batch make a unit: `places` [units, most], -1 where there is none.

    `owners` [rows] says the same the other way round; `shares` [rows] are what a row counts in
    its unit, together 1.
    """

    places: Tensor
    owners: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def lay(self, values: Tensor) -> Tensor:
        """Return a row's values [rows, n, ...] as their unit's, [units, most * n, ...]."""
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded[self.places].flatten(1, 2)

    def add_up(self, values: Tensor) -> Tensor:
        """Return sums [units, ...] of rows' values [rows, ...]."""
        return values.new_zeros(len(self), *values.shape[1:]).index_add_(0, self.owners, values)


class Ghost(Protocol):
    """The gradients, of some parameters, of every unit of a batch."""

    def squares(self) -> Tensor:
        """Return each unit's squared L2 norm, float64, never below that of what `add` adds."""

    def add(self, factors: Tensor, kept: Tensor | slice, sums: Sums) -> None:
        """Add the `kept` units' gradients, each times its factor, float64 [kept].

        Of others nothing is touched: they may hold NaN, and 0 * NaN is NaN.
        """


class Outer:
    """Of a linear map: the sum over t of told[u, t] x taken[u, t], for weight, and for bias.

    `taken` is [units, t, inputs], `told` [units, t, outputs].
    """

    def __init__(
        self, taken: Tensor, told: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        self._taken, self._told = taken.double(), told.double()
        self._weight, self._bias = weight, bias

    def squares(self) -> Tensor:
        """Return norms by the Gram matrices of both sides: exact where there is one term."""
        own = self._own(self._taken)
        terms: Tensor = (
            torch.linalg.vector_norm(self._told, dim=2).square() * own
        )  # of each t alone
        if terms.shape[1] == 1:
            return terms[:, 0]
        pairs = torch.bmm(self._told, self._told.mT)
        if self._weight is not None:
            pairs *= torch.bmm(self._taken, self._taken.mT) + float(self._bias is not None)
        found = pairs.sum((1, 2))
        numbers = terms.shape[1] ** 2 + self._taken.shape[2] + self._told.shape[2]
        exact: Tensor = found.clamp(min=0) + _lost(numbers) * terms.sqrt().sum(1).square()
        return exact

    def _own(self, taken: Tensor) -> Tensor:
        """Return what each t of `taken`, with a 1 for the bias, brings to a square."""
        if self._weight is None:
            return taken.new_ones(taken.shape[:2])
        squares: Tensor = torch.linalg.vector_norm(taken, dim=2).square()
        return squares + 1.0 if self._bias is not None else squares

    def add(self, factors: Tensor, kept: Tensor | slice, sums: Sums) -> None:
        """Multiply both sides once, all units together."""
        scaled = self._told[kept].mul(factors[:, None, None]).flatten(0, 1)
        if self._weight is not None:
            sums[self._weight].flatten(1).addmm_(scaled.T, self._taken[kept].flatten(0, 1))
        if self._bias is not None:
            sums[self._bias] += scaled.sum(0)


class Lookup:
    """Of an embedding: told[u, t] at the place taken[u, t] of the table."""

    def __init__(self, taken: Tensor, told: Tensor, table: Tensor) -> None:
        self._taken, self._told, self._table = taken, told.double(), table

    def squares(self) -> Tensor:
        """Return norms by the products of terms that meet in one place."""
        size = max(1, _PIECE // max(1, self._taken.shape[1] ** 2))
        parts = [
            (torch.bmm(told, told.mT) * (taken[:, :, None] == taken[:, None])).sum((1, 2))
            for taken, told in zip(self._taken.split(size), self._told.split(size), strict=True)
        ]
        terms = torch.linalg.vector_norm(self._told, dim=2).sum(1).square()
        numbers = self._taken.shape[1] ** 2 + self._told.shape[2]
        exact: Tensor = torch.cat(parts).clamp(min=0) + _lost(numbers) * terms
        return exact

    def add(self, factors: Tensor, kept: Tensor | slice, sums: Sums) -> None:
        """Add each term to its place."""
        scaled = self._told[kept].mul(factors[:, None, None])
        sums[self._table].index_add_(0, self._taken[kept].flatten(), scaled.flatten(0, 1))


class Written:
    """Of whatever parameters: each unit's gradient as it is, [units, ...] by parameter."""

    def __init__(self) -> None:
        self._parts: dict[Tensor, Tensor] = {}

    def put(self, parameter: Tensor, gradients: Tensor) -> None:
        """Take more of a parameter's gradients, from another of its uses."""
        held = self._parts.get(parameter)
        self._parts[parameter] = gradients if held is None else held + gradients

    def squares(self) -> Tensor:
        """Return norms as they are."""
        norms = [
            torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64)
            for part in self._parts.values()
        ]
        return torch.stack(norms).square().sum(0)

    def add(self, factors: Tensor, kept: Tensor | slice, sums: Sums) -> None:
        """Add up in float64, a piece of units at a time."""
        for parameter, part in self._parts.items():
            total = sums[parameter].view(-1)
            size = max(1, _PIECE // max(1, total.numel()))
            rows = part[kept].flatten(1)
            for some, weights in zip(rows.split(size), factors.split(size), strict=True):
                total.addmv_(some.double().T, weights)


def _lost(numbers: int) -> float:
    """Return what share of a square may be lost, at worst, where so many float64 cancel."""
    return 2.0**-52 * numbers


def patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Return what each place of a convolution's output looks at, [rows, patch, places]."""
    flat = isinstance(layer, nn.Conv1d)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
    else:
        padding = layer.padding
    before: tuple[int, ...] = (1,) if flat else ()  # a sequence is an image of height 1
    return functional.unfold(
        x.unsqueeze(2) if flat else x,
        (*before, *layer.kernel_size),
        (*before, *layer.dilation),
        ((0,) if flat else ()) + tuple(padding),
        (*before, *layer.stride),
    )


def write_convolution(layer: nn.Conv1d | nn.Conv2d, x: Tensor, told: Tensor) -> Tensor:
    """Return each row's gradient of the weight, [rows, *weight's shape]."""
    out = x.new_empty(len(x), *layer.weight.shape)
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    size = max(1, _CACHED // max(1, told[0, 0].numel() * out[0, 0].numel()))
    for start in range(0, len(x), size):  # few rows at a time: patches stay in the cache
        some = slice(start, start + size)
        seen = patches(layer, x[some]).unflatten(1, (groups, -1)).flatten(0, 1)
        back = told[some].flatten(2).unflatten(1, (groups, outputs)).flatten(0, 1)
        torch.bmm(back, seen.mT, out=out[some].view(len(back), outputs, -1))
    return out
