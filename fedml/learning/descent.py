"""A model that descends: its trainable tensors and their gradients are views of flat buffers.

A step is then a few operations over one vector, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Refused
from fedml.params import Layout, Params
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies import RULES, Follower, LocalRule, Twofold

Bend = Callable[[Brief, Slots, Params, Params], Params]


def find_rule(name: str) -> LocalRule:
    """Return the site half that a brief names; raises `Refused` if this site has none such."""
    if name not in RULES:
        raise Refused(f"no local rule {name!r} here; there are {', '.join(sorted(RULES))}")
    return RULES[name]


def _bend_of(brief: Brief, *, own: bool) -> Bend | None:
    """Return what bends gradients, or None where nothing does."""
    if brief.rule == "plain":
        return None
    rule = find_rule(brief.rule)
    return rule.own_gradient if own and isinstance(rule, Twofold) else rule.gradient


def bind(model: nn.Module, own: Params) -> None:
    """Make the model's tensors views of `own`.

    Raises `MalformedUpdate` if the model has other names, shapes or dtypes.
    """
    if Layout.of(model.state_dict()) != own.layout:
        Params(model.state_dict()).check_like(own)
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


class Descent:
    """Stochastic gradient descent from `start` or a brief's parameters, bent by the brief's rule.

    With `own` it is that of the model that a site has beside the one that travels.
    Whoever fills the gradients (`gradients` are views that start each step at zero) calls
    `step`. Only tensors with `requires_grad` move by it; momentum starts at zero for each task.
    """

    def __init__(
        self,
        model: nn.Module,
        brief: Brief,
        memory: Slots,
        training: Training,
        copy: Callable[[Params], Params] = Params.clone,
        *,
        start: Params | None = None,
        own: bool = False,
    ) -> None:
        """Start in the memory that `copy` gives for the parameters."""
        self.model, self.training, self.steps = model, training, 0
        self._bend = _bend_of(brief, own=own)
        rule = RULES.get(brief.rule)
        self._follow = rule.follow if isinstance(rule, Follower) else None
        self.brief, self.memory = brief, memory
        self._start = brief.params if start is None else start
        self.params = copy(self._start)
        bind(model, self.params)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("the recipe's model has nothing to train: no requires_grad tensor")
        self.trainable: Mapping[str, nn.Parameter] = trainable
        self._masks = self._still(trainable)
        self._velocity: dict[torch.dtype, Tensor] = {}
        bent = self._bend is not None or training.momentum or training.weight_decay
        self._straight = not bent

    @cached_property
    def _grads(self) -> Params:
        return self.params.zeros()

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """Where whoever calls `step` puts each trainable tensor's gradient."""
        views = {name: self._grads[name] for name in self.trainable}
        for name, view in views.items():
            self.trainable[name].grad = view
        return views

    def _still(self, trainable: Mapping[str, nn.Parameter]) -> dict[torch.dtype, Tensor | None]:
        """Return, by dtype, ones where tensors move; None where all of the buffer does."""
        moving = {dtype: 0 for dtype in self.params.layout.sizes}
        for parameter in trainable.values():
            moving[parameter.dtype] += parameter.numel()
        masks: dict[torch.dtype, Tensor | None] = {}
        for dtype, size in self.params.layout.sizes.items():
            if 0 < moving[dtype] < size:
                masks[dtype] = self._mask(trainable, dtype)
            elif moving[dtype]:
                masks[dtype] = None
        return masks

    def _mask(self, trainable: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Tensor:
        size = self.params.layout.sizes[dtype]
        mask = Params.over(
            Layout(tuple(f for f in self.params.layout.fields if f[1] == dtype)),
            {dtype: self.params.buffers[dtype].new_zeros(size)},
        )
        for name, parameter in trainable.items():
            if parameter.dtype == dtype:
                mask[name].fill_(1)
        return mask.buffers[dtype]

    def descend(self, loss: Tensor) -> None:
        """Take the step against the gradients of `loss`, a scalar."""
        # autograd.grad: nothing is zeroed beforehand, and nothing added to the zeros
        parts = torch.autograd.grad([loss], list(self.trainable.values()), allow_unused=True)
        if self._straight:
            for parameter, part in zip(self.trainable.values(), parts, strict=True):
                if part is not None:
                    parameter.data.sub_(part, alpha=self.training.lr)
            self.steps += 1
            return
        for name, part in zip(self.trainable, parts, strict=True):
            if part is not None:
                self.gradients[name].copy_(part)
        self.step()

    def step(self) -> None:
        """Move against the gradients, then zero them."""
        training = self.training
        grads = self._grads
        if training.weight_decay:
            grads = grads.zip(self.params, lambda g, w: g.add(w, alpha=training.weight_decay))
        if self._bend is not None:
            grads = self._bend(self.brief, self.memory, self.params, grads)
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
        if self._follow is not None:
            self.memory = self._follow(self.brief, self.memory, self.params, self.steps)

    def moved(self) -> Params:
        """Return how far parameters and buffers went from the start; the descent ends here."""
        state, own = self.model.state_dict(), self.params
        if any(state[name].data_ptr() != own[name].data_ptr() for name in own):
            own = Params(state)  # a buffer was replaced, and not written to
        own.check_like(self._start)
        for dtype, buffer in own.buffers.items():  # in place: a copy would cost as much again
            start = self._start.buffers[dtype]
            if dtype == torch.bool:
                buffer.logical_xor_(start)
            else:
                buffer.sub_(start)
        return own
