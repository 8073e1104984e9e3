"""The local training of many sites as one computation; what `Trainer` does at each of them.

Each site keeps its own parameters, a row of a `Stacked`, and its own order of batches, so a
result differs from the trainer's by rounding alone. Dropout is drawn afresh for each site, with
the same distribution and other bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedml.errors import ConfigError
from fedml.learning.descents import Descents
from fedml.learning.gradients import Frame, Functional, Gradient, Layered, Precision, layers_of
from fedml.learning.recipe import Recipe
from fedml.learning.rowstack import RowStack, gather
from fedml.learning.trainer import batches
from fedml.params import Layout, Params
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief
from fedml.stacked import Stacked

_MODELS = 6  # held for a site: parameters, gradients, momentum, what comes and goes
_PROBED = 4096  # targets at which a loss is looked at, at the most


@dataclass(frozen=True)
class Trained:
    """What came of each site: its delta, steps taken, and losses [most steps, sites].

    Sites come with the most steps first. A site's losses end with its steps.
    """

    delta: Stacked
    steps: tuple[int, ...]
    losses: Tensor

    def diverged(self) -> dict[int, int]:
        """Return the step at which each site, by row, left the finite numbers."""
        finite = self.delta.finite_rows()
        if all(finite) and bool(self.losses.isfinite().all()):
            return {}
        found = {}
        for row, steps in enumerate(self.steps):
            bad = (~self.losses[:steps, row].isfinite()).nonzero()
            if len(bad) or not finite[row]:
                found[row] = int(bad[0]) + 1 if len(bad) else steps
        return found

    def mean_losses(self) -> list[float]:
        """Return each site's mean loss over its steps."""
        held = torch.arange(len(self.losses))[:, None] < torch.tensor(self.steps)
        totals = torch.where(held, self.losses, 0.0).sum(0)
        means: list[float] = (totals / torch.tensor(self.steps, dtype=torch.float64)).tolist()
        return means


class CohortTrainer:
    """Trains a recipe at many sites at once; one object serves a whole run.

    Raises `ConfigError` at birth if the recipe's model cannot be trained so, with the reason.
    """

    def __init__(
        self,
        recipe: Recipe,
        training: Training,
        device: torch.device,
        precision: Precision = "fp32",
        *,
        by_rows: bool = False,
    ) -> None:
        """With `by_rows` rows' own gradients will be asked for, as privacy does."""
        self.recipe, self.training, self.device, self.precision = (
            recipe, training, device, precision,
        )  # fmt: skip
        self.model = recipe.build().to(device).train()
        self._example = recipe.example(3).to(device)
        self.dtype = _moving_dtype(self.model)
        _check(recipe, self.model, self._example)
        self.layout = Layout.of(self.model.state_dict())
        self._layers = layers_of(self.model) if self.mixes_no_rows else None
        if self._layers is None or by_rows:  # else torch.func's compiler need not be imported
            self._check_batches()

    def _check_batches(self) -> None:
        """Raise `ConfigError` where torch would only loop: it warns, and falls behind `Trainer`."""
        params = Params(self.model.state_dict())
        frame = Frame(self.recipe, self.model, self.layout, self.dtype, params, self.precision)

        def total(flat: Tensor) -> Tensor:
            return frame.forward(flat, self._example).sum()

        values = params.buffers[self.dtype].repeat(2, 1)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")
            try:
                vmap(grad(total), randomness="different")(values)
            except (RuntimeError, UserWarning) as error:
                line = str(error).partition(". Please")[0].splitlines()
                raise ConfigError(line[0] if line else type(error).__name__) from error

    @cached_property
    def mixes_no_rows(self) -> bool:
        """True if rows get the same output together and alone."""
        self.model.eval()
        with torch.no_grad():
            together = self.model(self._example)
            apart = torch.cat([self.model(row[None]) for row in self._example])
        self.model.train()
        return bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-4, equal_nan=True))

    @cached_property
    def row_bytes(self) -> int:
        """About how many bytes the backward pass keeps for one row of a batch."""
        kept = 0

        def weigh(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes if tensor.shape[:1] == self._example.shape[:1] else 0
            return tensor

        weighing = torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), weighing:
            self.model(self._example)
        return 1 + kept // len(self._example)

    def site_bytes(self, rows: int) -> int:
        """About how many bytes a site with that many rows takes while it trains."""
        batch = min(rows, self.training.batch_size or rows)
        data = self._example.nbytes // len(self._example)
        return _MODELS * self.layout.bytes + 2 * rows * data + 2 * batch * self.row_bytes

    def shuffles(self, counts: Sequence[int]) -> bool:
        """True if a seed orders batches, which it does unless a batch is all of a site's rows."""
        return 0 < self.training.batch_size < max(counts)

    def _orders(
        self, counts: Sequence[int], seeds: Sequence[int]
    ) -> Sequence[Sequence[Tensor | slice]]:
        if not self.shuffles(counts):
            return [list(batches(1, self.training, 0))] * len(counts)
        return [
            list(batches(count, self.training, seed))
            for count, seed in zip(counts, seeds, strict=True)
        ]

    def frame(self, brief: Brief) -> Frame:
        """Return what gradients of models like the brief's share; raises `MalformedUpdate`."""
        if self.layout != brief.params.layout:
            Params(self.model.state_dict()).check_like(brief.params)
        return Frame(
            self.recipe, self.model, self.layout, self.dtype, brief.params, self.precision
        )  # fmt: skip

    def train(
        self, brief: Brief, memory: Mapping[str, Stacked], rows: RowStack, seeds: Sequence[int]
    ) -> Trained:
        """Return what becomes of all sites, which must come by number of rows, most first.

        `seeds` order the batches, one a site; they are not looked at unless it `shuffles`.
        All is on the trainer's device. Raises what torch raises if it cannot batch the model.
        """
        frame = self.frame(brief)
        descents = Descents(frame, brief, memory, self.training, len(rows.counts))
        gradient: Gradient = Layered(frame, self._layers) if self._layers else Functional(frame)
        orders = self._orders(rows.counts, seeds)
        padded = len({*rows.counts}) > 1 and self.mixes_no_rows and _is_mean_of_rows(frame, rows)
        steps = tuple(map(len, orders))
        told: list[Tensor] = []  # fetched at the end: an accelerator waits for no step's losses
        for step in range(steps[0]):
            active = sum(1 for count in steps if count > step)
            parts = gather(rows, [order[step] for order in orders[:active]], padded=padded)
            some, moves = _joined(
                [
                    (
                        part.sites,
                        *gradient(descents.values[part.sites], part.x, part.y, part.counts),
                    )
                    for part in parts
                ]
            )
            told.append(some)
            descents.step(moves)
        losses = torch.zeros(steps[0], len(steps), dtype=torch.float64)
        for row, some in zip(losses, told, strict=True):
            row[: len(some)] = some
        return Trained(descents.delta(), steps, losses)


def _joined(told: Sequence[tuple[slice | Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return losses and gradients of all parts in the order of sites."""
    if len(told) == 1:
        return told[0][1:]
    order = torch.cat([sites for sites, _, _ in told if isinstance(sites, Tensor)]).argsort()
    losses = torch.cat([some for _, some, _ in told])
    gradients = torch.cat([some for _, _, some in told])
    return losses[order.to(losses.device)], gradients[order.to(gradients.device)]


def _is_mean_of_rows(frame: Frame, rows: RowStack) -> bool:
    """Find out, with outputs drawn at random, if a batch's loss is the mean of its rows'.

    A loss that weighs classes is not, for these very targets, and must see whole batches.
    """
    y = torch.cat([rows.y[site, :count] for site, count in enumerate(rows.counts)])
    y = y[:: max(1, len(y) // _PROBED)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shape = frame.model(rows.x[0, :1]).shape[1:]
        outputs = torch.randn(len(y), *shape, generator=generator).to(y.device)
        try:
            whole = frame.recipe.loss(outputs, y)
            mean = frame.row_losses(outputs, y).mean()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    return bool(torch.allclose(whole, mean, rtol=1e-5))


def _moving_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) != 1:
        raise ConfigError(f"its trainable tensors are of {len(dtypes)} dtypes")
    return dtypes.pop()


def _check(recipe: Recipe, model: nn.Module, example: Tensor) -> None:
    """Raise `ConfigError` for a model that does more than map rows to outputs."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(f"{name}: {type(layer).__name__} mixes the rows of a batch")
    tensors = model.state_dict(keep_vars=True)
    if len({id(tensor) for tensor in tensors.values()}) < len(tensors):
        raise ConfigError("some of its tensors have two names")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = dict(recipe.build().to(example.device).named_buffers())
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, buffer in before.items():
            if name not in tensors and not torch.equal(buffer, other[name]):
                raise ConfigError(f"buffer {name} is drawn at random and does not travel")
        with torch.no_grad():
            model(example)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise ConfigError(f"buffer {name} keeps what it sees of rows")
