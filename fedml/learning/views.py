"""How models see rows: what a model's last layer takes in, and what a rule makes of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.descent import bind
from fedml.learning.taps import trainable
from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies import Contrast

Forward = Callable[[nn.Module, Tensor], Tensor]


class View:
    """A model's representation of the rows it was last called with, [rows, size]."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Find the last layer by a look at `example`; raises `ConfigError` if none is below it."""
        layer = _last_layer(model, example)
        self.model, self._seen = model, torch.empty(0)
        layer.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]

    def of(self, forward: Forward, x: Tensor) -> Tensor:
        """Return the representation of `x`, without a gradient."""
        with torch.no_grad():
            forward(self.model, x)
        return self.latest()

    def latest(self) -> Tensor:
        """Return the representation of what the model was last called with."""
        seen = self._seen.flatten(1)
        return seen.float() if seen.dtype.itemsize < 4 else seen  # autocast's are short


class Contrasted:
    """The term that a rule adds to a batch's loss, of the model's view and those of others."""

    def __init__(
        self,
        rule: Contrast,
        brief: Brief,
        model: nn.Module,
        others: Sequence[tuple[nn.Module, Params]],
        example: Tensor,
    ) -> None:
        """Each of `others` is a model of its own, and what it is to be made of."""
        self._rule, self._brief, self._mine = rule, brief, View(model, example)
        for other, params in others:
            bind(other.eval(), params)
        self._theirs = [View(other, example) for other, _ in others]

    def term(self, forward: Forward, x: Tensor) -> Tensor:
        """Return the term for `x`, with which the model has just been called."""
        theirs = [view.of(forward, x) for view in self._theirs]
        return self._rule.term(self._brief, self._mine.latest(), theirs)


def _last_layer(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the last trainable layer that rows come to; what comes before must be trained too."""
    seen: list[nn.Module] = []
    layers = [module for module in model.modules() if trainable(module)]
    hooks = [layer.register_forward_pre_hook(lambda one, _: seen.append(one)) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if len(set(seen)) < 2:
        raise ConfigError(
            f"the recipe's model has {len(set(seen))} layer to train, so there is no "
            "representation of rows to compare; use strategy=fedavg, or a model with a hidden layer"
        )
    return seen[-1]
