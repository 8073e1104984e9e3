"""What each trainable layer of a model took in, and the gradient that came back to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedml.errors import TaskFailed


@dataclass
class Seen:
    """One layer's calls in one forward pass: what went in, and gradients of what came out.

    Both lie with rows first. A layer that the pass did not visit has no calls.
    """

    layer: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    told: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    layer: nn.Module
    input: Tensor
    version: int
    output: GradientEdge


class Taps:
    """Listens at a model's trainable layers while it looks at a batch.

    Parameters' own gradients are never computed: whoever has a layer's inputs and its outputs'
    gradients can make any sum of rows' gradients from them, and the norm of each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = [module for module in model.modules() if _is_layer(module)]
        self._calls: list[_Call] | None = None
        self._axes: dict[nn.Module, int] = {}  # of the rows in a layer's input
        for layer in self.layers:
            layer.register_forward_hook(self._note)

    def look(self, x: Tensor, losses: Callable[[Tensor], Tensor]) -> list[Seen]:
        """Return what every trainable layer saw of `losses` (output to a number a row) of `x`.

        Raises `TaskFailed` where rows cannot be told apart.
        """
        calls: list[_Call] = []
        self._calls = calls
        try:
            total = losses(self.model(x)).sum()
        finally:
            self._calls = None
        edges = [call.output for call in calls]
        gradients = torch.autograd.grad([total], edges, allow_unused=True) if edges else ()
        seen = {layer: Seen(layer) for layer in self.layers}
        for call, gradient in zip(calls, gradients, strict=True):
            if gradient is None:  # its output led nowhere
                continue
            if call.input._version != call.version:
                raise TaskFailed(f"{_name(call.layer)}: its input was overwritten in place")
            axis = self._axis(call.layer, call.input, len(x))
            for values, place in ((call.input, "inputs"), (gradient, "told")):
                if values.ndim <= axis or values.shape[axis] != len(x):
                    raise TaskFailed(f"{_name(call.layer)}: its rows are not those of the batch")
                getattr(seen[call.layer], place).append(values.movedim(axis, 0) if axis else values)
        return list(seen.values())

    def _axis(self, layer: nn.Module, values: Tensor, rows: int) -> int:
        """Return where a layer's rows are: settled at the first look, of made-up rows."""
        if layer not in self._axes:
            fits = [axis for axis in (0, 1) if values.shape[axis : axis + 1] == (rows,)]
            self._axes[layer] = fits[0] if fits else 0
        return self._axes[layer]

    def _note(self, layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        if self._calls is None:
            return
        if not (inputs and isinstance(output, Tensor) and output.requires_grad):
            raise TaskFailed(f"{_name(layer)}: it does not turn one tensor into another")
        # the edge, not the tensor: a layer behind may overwrite that in place
        [given, *_] = inputs
        call = _Call(layer, given.detach(), given._version, get_gradient_edge(output))
        self._calls.append(call)


def trainable(module: nn.Module) -> set[Tensor]:
    """Return the parameters of the module itself, not of its children, that are trained."""
    return {p for p in module._parameters.values() if p is not None and p.requires_grad}


def _is_layer(module: nn.Module) -> bool:
    """True if it has trainable parameters that it does not merely list for its parts."""
    parts = {p for part in module.modules() if part is not module for p in trainable(part)}
    return bool(trainable(module) - parts)


def _name(layer: nn.Module) -> str:
    return type(layer).__name__
