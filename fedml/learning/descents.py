"""Many models that descend together: what `Descent` does for one, on a row for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedml.learning.descent import find_rule
from fedml.learning.gradients import Frame
from fedml.params import Params
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief
from fedml.stacked import Stacked


class Descents:
    """Stochastic gradient descent of many models from one brief, as `Descent` does it for one.

    `memory` holds what the rule remembers, a row a site.
    """

    def __init__(
        self,
        frame: Frame,
        brief: Brief,
        memory: Mapping[str, Stacked],
        training: Training,
        sites: int,
    ) -> None:
        self._frame, self._training = frame, training
        self._rule = None if brief.rule == "plain" else find_rule(brief.rule)
        self._brief = Brief(
            Stacked.repeat(brief.params, sites),
            brief.rule,
            brief.settings,
            {name: Stacked.repeat(slot, sites) for name, slot in brief.slots.items()},
        )
        self._memory = memory
        start = Stacked.repeat(brief.params, sites).buffers
        moving = {frame.dtype: start[frame.dtype].clone()}
        self.params = Stacked.over(brief.params.layout, {**start, **moving})
        self._mask = _mask(frame)
        self._velocity: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Every site's parameters, [sites, size]."""
        return self.params.buffers[self._frame.dtype]

    def step(self, gradients: Tensor) -> None:
        """Move the first `len(gradients)` sites; gradients [.., size] may be written to."""
        training, dtype, count = self._training, self._frame.dtype, len(gradients)
        here, move = self.values[:count], gradients
        if self._mask is not None:
            move = torch.where(self._mask, move, 0)
        if training.weight_decay:
            move = move.add(here, alpha=training.weight_decay)
        if self._rule is not None:
            move = self._bent(move)
        if self._mask is not None:
            move = torch.where(self._mask, move, 0)
        if training.momentum:
            if self._velocity is None:
                self._velocity = torch.zeros_like(self.values)
            move = self._velocity[:count].mul_(training.momentum).add_(move)
        self.params.buffers[dtype][:count].sub_(move, alpha=training.lr)

    def delta(self) -> Stacked:
        """Return how far each model has moved."""
        return self.params - self._brief.params

    def _bent(self, gradients: Tensor) -> Tensor:
        assert self._rule is not None
        count, dtype = len(gradients), self._frame.dtype
        brief = Brief(
            _head(self._brief.params, count),
            self._brief.rule,
            self._brief.settings,
            {name: _head(slot, count) for name, slot in self._brief.slots.items()},
        )
        memory = {name: slot.head(count) for name, slot in self._memory.items()}
        here = self.params.head(count)
        plain = Stacked.over(here.layout, {**here.zeros().buffers, dtype: gradients})
        return self._rule.gradient(brief, memory, here, plain).buffers[dtype]


def _head(stack: Params, count: int) -> Stacked:
    assert isinstance(stack, Stacked)
    return stack.head(count)


def _mask(frame: Frame) -> Tensor | None:
    """Return true where elements move; None where all do."""
    trainable = {name for name, p in frame.model.named_parameters() if p.requires_grad}
    names = [name for name, dtype, _ in frame.layout.fields if dtype == frame.dtype]
    if trainable.issuperset(names):
        return None
    mask = torch.zeros(frame.layout.sizes[frame.dtype], dtype=torch.bool)
    for name in trainable:
        _, start, end, _ = frame.layout.places[name]
        mask[start:end] = True
    return mask.to(frame.fixed.buffers[frame.dtype].device)
