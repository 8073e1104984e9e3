"""A model that descends: its trainable tensors and their gradients are views of flat buffers.

A step is then a few operations over one vector, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Refused
from fedml.params import Params
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies import RULES, LocalRule


def find_rule(name: str) -> LocalRule:
    """Return the site half that a brief names; raises `Refused` if this site has none such."""
    if name not in RULES:
        raise Refused(f"no local rule {name!r} here; there are {', '.join(sorted(RULES))}")
    return RULES[name]


def bind(model: nn.Module, values: Params) -> Params:
    """Make the model's tensors views of a copy of `values`; return that copy.

    Raises `MalformedUpdate` if the model has other names, shapes or dtypes.
    """
    own = Params(model.state_dict())
    own.check_like(values)
    for dtype, buffer in own.buffers.items():
        buffer.copy_(values.buffers[dtype])
    bound: set[int] = set()  # a tensor under two names keeps the first, as named_parameters does
    for name, module in model.named_modules():
        for key in (*module._parameters, *module._buffers):
            place = f"{name}.{key}" if name else key
            parameter, buffer_ = module._parameters.get(key), module._buffers.get(key)
            if parameter is not None and id(parameter) not in bound:
                parameter.data = own[place]
                bound.add(id(parameter))
            elif buffer_ is not None and place in own:
                module._buffers[key] = own[place]
    return own


class Descent:
    """Stochastic gradient descent from a brief's parameters, bent by its rule.

    Whoever fills the gradients (`gradients` are views that start each step at zero) calls
    `step`. Only tensors with `requires_grad` move by it; momentum starts at zero for each task.
    """

    def __init__(self, model: nn.Module, brief: Brief, memory: Slots, training: Training) -> None:
        self.model, self.training, self.steps = model, training, 0
        self._rule = None if brief.rule == "plain" else find_rule(brief.rule)
        self._brief, self._memory = brief, memory
        self.params = bind(model, brief.params)
        self._grads = self.params.zeros()
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("the recipe's model has nothing to train: no requires_grad tensor")
        for name, parameter in trainable.items():
            parameter.grad = self._grads[name]
        self.trainable: Mapping[str, nn.Parameter] = trainable
        self.gradients = {name: self._grads[name] for name in trainable}
        self._masks = self._still(trainable)
        self._velocity: dict[torch.dtype, Tensor] = {}

    def _still(self, trainable: Mapping[str, nn.Parameter]) -> dict[torch.dtype, Tensor | None]:
        """Return, by dtype, ones where tensors move; None where all of the buffer does."""
        mask = self.params.zeros()
        for name in trainable:
            mask[name].fill_(1)
        moving = {name.dtype for name in trainable.values()}
        return {
            dtype: None if bool(mask.buffers[dtype].all()) else mask.buffers[dtype]
            for dtype in moving
        }

    def step(self) -> None:
        """Move against the gradients, then zero them."""
        training = self.training
        grads = self._grads
        if training.weight_decay:
            grads = grads.zip(self.params, lambda g, w: g.add(w, alpha=training.weight_decay))
        if self._rule is not None:
            grads = self._rule.gradient(self._brief, self._memory, self.params, grads)
        for dtype, mask in self._masks.items():
            move = grads.buffers[dtype]
            if mask is not None:
                move = move * mask
            if training.momentum:
                held = self._velocity.get(dtype)
                move = move.clone() if held is None else held.mul_(training.momentum).add_(move)
                self._velocity[dtype] = move
            self.params.buffers[dtype].sub_(move, alpha=training.lr)
        for dtype in self._masks:
            self._grads.buffers[dtype].zero_()
        self.steps += 1

    def moved(self) -> Params:
        """Return the parameters now, with the buffers as the model left them."""
        return Params(self.model.state_dict())
