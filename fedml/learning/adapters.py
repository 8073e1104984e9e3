"""LoRA: Hu et al. 2021, arXiv:2106.09685: only thin matrices beside a frozen model are trained.

`adapt` is for a recipe's `build`: it takes the pretrained model, the same at every site and at the
coordinator, and returns it with adapters. What is frozen is no more among the model's parameters,
so it never travels, is never averaged, masked or noised: every algorithm and every mode of privacy
has to do with the adapters alone. That all have the same frozen model is seen by its digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.params import Params


class LowRank(nn.Module):
    """A frozen linear layer with two trainable ones beside it: W x + b + (alpha / rank) B A x.

    A is drawn as torch draws a linear layer, and B is zero: at first it is the frozen layer alone.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = frozen.weight.shape
        self.down = nn.Linear(columns, rank, bias=False).to(frozen.weight)
        self.up = nn.Linear(rank, rows, bias=False).to(frozen.weight)
        nn.init.zeros_(self.up.weight)
        self.factor = alpha / rank
        self.register_buffer("weight", frozen.weight.detach(), persistent=False)
        bias = None if frozen.bias is None else frozen.bias.detach()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen layer's answer, and what the adapter adds to it."""
        added: Tensor = self.up(self.down(x)) * self.factor
        return functional.linear(x, self.weight, self.bias) + added

    def merged(self) -> nn.Linear:
        """Return one linear layer that answers the same."""
        rows, columns = self.weight.shape
        whole = nn.Linear(columns, rows, self.bias is not None).to(self.weight)
        with torch.no_grad():
            whole.weight.copy_(self.weight + self.factor * self.up.weight @ self.down.weight)
            if self.bias is not None:
                whole.bias.copy_(self.bias)
        return whole


def adapt(
    model: nn.Module,
    layers: Sequence[str],
    *,
    frozen: str,
    rank: int = 8,
    alpha: float = 16.0,
    whole: Sequence[str] = (),
) -> nn.Module:
    """Return `model`, changed: its linear `layers` have adapters, and those in `whole` are trained.

    Both are patterns of layers' names, such as `encoder.*.query`. `frozen` is the digest of all
    values that `model` comes with: BLAKE3 in hex, `Params(model.state_dict()).digest()`.

    Raises `ConfigError` if the model is another one, a pattern matches no layer or one that cannot
    have an adapter, or batch normalisation would go on to move what is frozen.
    """
    if rank < 1 or not alpha > 0:
        raise ConfigError(f"rank {rank} and alpha {alpha} of adapters: must be 1 or more, above 0")
    found = Params(model.state_dict()).digest()
    if found != frozen:
        raise ConfigError(
            f"the model to adapt has digest {found}, the recipe says {frozen or 'none'}: fetch the "
            "weights that the recipe was written with, or write this digest into the recipe"
        )
    kept = {name for pattern in whole for name, _ in _matching(model, pattern)}
    chosen: dict[str, nn.Linear] = {}
    for name, module in (one for pattern in layers for one in _matching(model, pattern)):
        if type(module) is not nn.Linear:
            raise ConfigError(
                f"layer {name} is a {type(module).__name__}: only nn.Linear can have an adapter; "
                "name others in `whole`, which trains all of them"
            )
        chosen[name] = module
    for name, linear in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LowRank(linear, rank, alpha))
    _freeze(model, kept)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Return `model`, changed: each adapter is added into its layer, which answers the same."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, LowRank):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.merged())
    return model


def _matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    names = {name: module for name, module in model.named_modules() if module._parameters}
    matching = [name for name in names if name and fnmatchcase(name, pattern)]
    if not matching:
        raise ConfigError(
            f"pattern {pattern!r} matches no layer to adapt; there are {', '.join([*names][:8])}"
        )
    return ((name, names[name]) for name in matching)


def _freeze(model: nn.Module, kept: set[str]) -> None:
    """Make buffers that do not travel of all parameters and buffers but adapters' and `kept`."""
    for name, module in model.named_modules():
        inside = isinstance(model.get_submodule(name.rpartition(".")[0]), LowRank)
        if inside or name in kept or isinstance(module, LowRank):
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name}: {type(module).__name__} moves its statistics while it trains, and what "
                "is frozen must stay: name it in `whole`, or adapt a model without it"
            )
        for key, parameter in [*module._parameters.items()]:
            if parameter is not None:
                del module._parameters[key]
                module.register_buffer(key, parameter.detach(), persistent=False)
        for key, buffer in [*module._buffers.items()]:
            module.register_buffer(key, buffer, persistent=False)
