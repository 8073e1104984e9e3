"""Clipped sums of rows' gradients: one pass forward, one back, then layer by layer.

Each layer's gradients take the cheapest form that is exact for it, see `ghosts`; a model that
does not consist of known layers goes through `torch.func`, row by row. Which, is found out on
made-up rows, where every norm and a sum are held against autograd's. Privacy does not hang on
that: norm and sum are always of the same vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedml.errors import FedmlError
from fedml.learning.ghosts import (
    Ghost,
    Lookup,
    Outer,
    Sums,
    Units,
    Written,
    patches,
    write_convolution,
)
from fedml.learning.lone import Loss, alone, quickly_alone
from fedml.learning.taps import Seen, Taps, trainable
from fedml.privacy.mechanisms import clip_factors

MOST_FLOATS = 2**25  # of gradients written down at once: 128 MiB of float32
_MOST_ROWS = 1024  # at once, however little is written down
OURS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)  # layers that have a form of ours
_Sampler = Callable[[nn.Module, list[Tensor], Tensor], Mapping[Tensor, Tensor]]


class RowGradients:
    """Gradients of a model's trainable parameters, for each row or for groups of rows.

    `loss` is of a batch of one row. `example` is made-up rows, some at least; what they show
    decides how each layer is treated.
    """

    def __init__(self, model: nn.Module, loss: Loss, example: Tensor) -> None:
        self._model, self._loss, self._losses = model, loss, alone(loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._written = 0  # numbers that are written down for one row
        taps = Taps(model)
        self._taps: Taps | None = taps
        uses = Counter(p for layer in taps.layers for p in trainable(layer))
        self._tied = {  # what has two uses must be added up before it has a norm
            layer for layer in taps.layers if any(uses[p] > 1 for p in trainable(layer))
        }
        known = all(isinstance(layer, OURS) or _theirs(layer) for layer in taps.layers)
        if not (known and self._agrees(taps, example)):
            self._taps, self._written = None, sum(p.numel() for p in self._parameters)
        elif isinstance(output := self._show(example), Tensor):
            self._losses = quickly_alone(loss, output)

    @property
    def is_layered(self) -> bool:
        """False where each row's gradient is computed by itself, which costs most."""
        return self._taps is not None

    @property
    def rows_at_once(self) -> int:
        """How many rows may be looked at together, for memory's sake."""
        return max(1, min(_MOST_ROWS, MOST_FLOATS // max(1, self._written)))

    def add_clipped(
        self,
        x: Tensor,
        y: Tensor,
        limit: float,
        sums: Sums,
        *,
        units: Units | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add to `sums` the gradient of each row's loss, scaled down to L2 norm `limit`.

        With `units` it is that of the mean of each unit's losses instead. One that is not finite
        counts as zero. `sums` is float64, in units of 1 / `scale`. Adding or removing a unit
        moves all the sums, taken together, by at most `limit`, rounding and all.
        """
        if self._taps is None:
            ghosts: list[Ghost] = [self._one_by_one(x, y, units)]
        else:
            ghosts = self._ghosts(self._taps, x, y, units, self._losses)
        squares = torch.stack([ghost.squares() for ghost in ghosts]).sum(0)
        factors = clip_factors(squares.sqrt(), limit)
        counted = factors > 0
        kept = slice(None) if bool(counted.all()) else counted
        for ghost in ghosts:
            ghost.add(factors[kept] * scale, kept, sums)

    def _ghosts(
        self, taps: Taps, x: Tensor, y: Tensor, units: Units | None, losses: Loss
    ) -> list[Ghost]:
        def of(output: Tensor) -> Tensor:
            numbers = losses(output, y)
            return numbers if units is None else numbers * units.shares

        written, ghosts, self._written = Written(), list[Ghost](), 0
        for seen in taps.look(x, of):
            if seen.inputs:
                ghost = None if seen.layer in self._tied else _ghost(seen, units)
                if ghost is None:
                    self._written += _write(seen, units, written)
                else:
                    ghosts.append(ghost)
        return [*ghosts, written] if self._written else ghosts

    def _one_by_one(self, x: Tensor, y: Tensor, units: Units | None) -> Written:
        model, loss = self._model, self._loss
        names = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def of_one(values: Mapping[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
            return loss(functional_call(model, dict(values), (row[None],)), target[None])

        rows = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")
        found = rows({name: p.detach() for name, p in names.items()}, x, y)
        written = Written()
        for name, parameter in names.items():
            part = found[name]
            if units is not None:
                share = units.shares.view(-1, *[1] * parameter.ndim)
                part = units.add_up(part * share)
            written.put(parameter, part)
        return written

    def _show(self, example: Tensor) -> object:
        """Return what the model makes of made-up rows, in evaluation mode."""
        self._model.eval()
        with torch.no_grad():
            output = self._model(example)
        self._model.train()
        return output

    def _agrees(self, taps: Taps, example: Tensor) -> bool:
        """Hold norms and a weighted sum, on made-up rows, against autograd's, row by row."""
        self._model.eval()  # no dropout: it would differ from one pass to the other
        try:
            with torch.no_grad():
                target = torch.randn_like(self._model(example))
            ghosts = self._ghosts(taps, example, target, None, _products)
            squares = torch.stack([ghost.squares() for ghost in ghosts]).sum(0)
            factors = torch.rand(len(example), dtype=torch.float64, device=example.device)
            wide = [p.new_zeros(p.shape, dtype=torch.float64) for p in self._parameters]
            sums: dict[Tensor, Tensor] = dict(zip(self._parameters, wide, strict=True))
            for ghost in ghosts:
                ghost.add(factors, slice(None), sums)
            pairs = zip(example, target, strict=True)
            right = [self._take_off(*pair, f, sums) for pair, f in zip(pairs, factors, strict=True)]
        except (FedmlError, RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return False
        finally:
            self._model.train()
        norms = torch.stack(right)
        scale = float(norms.max())
        rest = max(float(total.abs().max()) for total in sums.values())
        agree = torch.allclose(squares.sqrt(), norms, rtol=1e-3, atol=1e-5 * scale)
        return bool(agree) and rest <= 1e-4 * scale

    def _take_off(self, row: Tensor, target: Tensor, factor: Tensor, sums: Sums) -> Tensor:
        """Subtract a row's gradient, by autograd, times its factor; return the gradient's norm."""
        total = _products(self._model(row[None]), target[None]).sum()
        parts = torch.autograd.grad([total], self._parameters, allow_unused=True)
        square = torch.zeros_like(factor)
        for parameter, part in zip(self._parameters, parts, strict=True):
            if part is not None:
                sums[parameter].sub_(part, alpha=float(factor))
                square += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return square.sqrt()


def _theirs(layer: nn.Module) -> _Sampler | None:
    """Return Opacus's form of a layer that has none of ours, if there is one."""
    return next((form for kind, form in _samplers().items() if isinstance(layer, kind)), None)


@cache
def _samplers() -> Mapping[type[nn.Module], _Sampler]:
    from opacus.grad_sample import GradSampleModule  # two seconds, which most models save

    samplers: Mapping[type[nn.Module], _Sampler] = GradSampleModule.GRAD_SAMPLERS
    return {kind: form for kind, form in samplers.items() if kind not in (*OURS, nn.EmbeddingBag)}


def _products(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).flatten(1).sum(1)


def _ghost(seen: Seen, units: Units | None) -> Ghost | None:
    """Return the form in which a layer's gradients need not be written down, if that is cheaper."""
    layer = seen.layer
    own = trainable(layer)
    if isinstance(layer, nn.Embedding):
        return Lookup(*_lookups(layer, seen, units), layer.weight)
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return None
    weight = layer.weight if layer.weight in own else None
    bias = layer.bias if layer.bias is not None and layer.bias in own else None
    if isinstance(layer, nn.Linear):
        terms = sum(part[0].numel() // layer.in_features for part in seen.inputs)
    else:
        terms = sum(part[0, 0].numel() for part in seen.told)
    terms *= units.places.shape[1] if units else 1
    if weight is not None and terms > 1 and 2 * terms**2 > weight.numel():
        return None
    if isinstance(layer, nn.Linear):
        taken, told = _lines(seen.inputs), _lines(seen.told)
    elif layer.groups == 1:
        taken = torch.cat([patches(layer, x) for x in seen.inputs], 2).mT
        told = torch.cat([part.flatten(2) for part in seen.told], 2).mT
    else:
        return None
    if units is not None:
        taken, told = units.lay(taken), units.lay(told)
    return Outer(taken, told, weight, bias)


def _lines(parts: Sequence[Tensor]) -> Tensor:
    """Return [rows, t, features] of all of a layer's calls."""
    lines = [part.flatten(1, -2) if part.ndim > 2 else part[:, None] for part in parts]
    return lines[0] if len(lines) == 1 else torch.cat(lines, 1)


def _lookups(layer: nn.Embedding, seen: Seen, units: Units | None) -> tuple[Tensor, Tensor]:
    """Return places [units, t] and what was told there [units, t, width]."""
    taken = torch.cat([part.reshape(len(part), -1) for part in seen.inputs], 1)
    told = torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in seen.told], 1)
    if layer.padding_idx is not None:
        told = told * (taken != layer.padding_idx)[:, :, None]
    if units is None:
        return taken, told
    return units.lay(taken[:, :, None])[:, :, 0], units.lay(told)


def _write(seen: Seen, units: Units | None, written: Written) -> int:
    """Write a layer's gradients down; return how many numbers that takes for a row."""
    for taken, told in zip(seen.inputs, seen.told, strict=True):
        for parameter, part in _gradients(seen.layer, taken, told).items():
            written.put(parameter, part if units is None else units.add_up(part))
    return sum(parameter.numel() for parameter in trainable(seen.layer))


def _gradients(layer: nn.Module, taken: Tensor, told: Tensor) -> Mapping[Tensor, Tensor]:
    """Return each row's gradients of one of a layer's calls, [rows, ...] by parameter."""
    found: dict[Tensor, Tensor] = {}
    own = trainable(layer)
    if isinstance(layer, nn.Embedding):
        places, lines = _lookups(layer, Seen(layer, [taken], [told]), None)
        table = lines.new_zeros(len(lines), *layer.weight.shape)
        index = places[:, :, None].expand_as(lines)
        return {layer.weight: table.scatter_add_(1, index, lines)}
    if not isinstance(layer, OURS):
        theirs = _theirs(layer)
        assert theirs is not None  # or it is no known layer
        return theirs(layer, [taken], told)
    if layer.weight in own:
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            found[layer.weight] = write_convolution(layer, taken, told)
        else:
            found[layer.weight] = torch.bmm(_lines([told]).mT, _lines([taken]))
    bias = layer.bias
    if isinstance(bias, Tensor) and bias in own:
        is_linear = isinstance(layer, nn.Linear)
        found[bias] = _lines([told]).sum(1) if is_linear else told.flatten(2).sum(2)
    return found
