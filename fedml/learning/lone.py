"""The loss of each row by itself, whatever a recipe's loss makes of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Loss = Callable[[Tensor, Tensor], Tensor]


def alone(loss: Loss) -> Loss:
    """Return what gives one number a row, each from that row as a batch of its own.

    A mean, a sum, even a loss that mixes rows cannot let one row touch another's number then.
    """
    return vmap(lambda o, t: loss(o[None], t[None]), randomness="different")


def quickly_alone(loss: Loss, output: Tensor) -> Loss:
    """Return `alone(loss)`, or cross entropy itself if that is all that `loss` does.

    Which it does is seen on a made-up `output`, never on rows: the answer may not depend on them.
    Batching by torch.func takes five times as long.
    """
    target = torch.zeros(len(output), dtype=torch.long, device=output.device)
    watch = _Watch()
    try:
        with torch.no_grad(), watch:
            found = loss(output, target)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return alone(loss)
    plain = output.ndim == 2 and watch.is_plain_cross_entropy(output, target, found)
    return _cross_entropies if plain else alone(loss)


def _cross_entropies(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


class _Watch(TorchFunctionMode):
    """Notes what is called of torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[object, tuple[object, ...], Mapping[str, object], object]] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def is_plain_cross_entropy(self, output: Tensor, target: Tensor, found: object) -> bool:
        """True if all that was called is cross entropy, as it is by default, and `found` is it."""
        if len(self._calls) != 1:
            return False
        func, args, kwargs, result = self._calls[0]
        usual: dict[str, object] = {
            "weight": None,
            "size_average": None,
            "ignore_index": -100,
            "reduce": None,
        }
        usual |= {"reduction": "mean", "label_smoothing": 0.0}
        return (
            func is functional.cross_entropy
            and result is found
            and len(args) == 2
            and args[0] is output
            and args[1] is target
            and all(kwargs[name] == usual[name] for name in kwargs if name in usual)
            and kwargs.keys() <= usual.keys()
        )
