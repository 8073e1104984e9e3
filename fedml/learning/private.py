"""DP-SGD: what one row, or one person's rows, can do to a step is bounded, and drowned in noise.

Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with what its common forms get wrong put
right: rows join by a Poisson sample whose rate, like the denominator, is made of the *public*
number of rows; an empty sample is a step of pure noise; a row whose gradient is not finite
counts as zero; noise is drawn from the system's entropy, never from the experiment's seed.
Whatever follows the noise (weight decay, the rule, momentum) costs nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.descent import Descent
from fedml.learning.persons import Persons
from fedml.learning.recipe import Recipe, Rows
from fedml.learning.rowwise import OURS, RowGradients
from fedml.learning.taps import trainable
from fedml.privacy.accounting import SampledGaussian, Unit
from fedml.privacy.noise import FINENESS, SecureNoise
from fedml.privacy.sampling import PoissonSampler


class PrivateGradient:
    """Fills a descent's gradients with noisy sums of clipped ones, as `event` accounts for.

    Raises `ConfigError` at birth, from synthetic rows alone, if the recipe's model lets one row
    touch another's gradient (batch normalisation), keeps what it saw in buffers, or has a
    trainable tensor that takes no part; see `check_fit`.
    """

    def __init__(
        self,
        recipe: Recipe,
        descent: Descent,
        rows: Rows,
        *,
        event: SampledGaussian,
        clip: float,
        public_rows: int,
        unit: Unit = "record",
    ) -> None:
        """With `unit` "patient", `public_rows` and all that was said of rows is of persons."""
        self._rows = rows
        example = recipe.example(5).to(rows.x.device)
        check_fit(descent, example)
        self._gradients = RowGradients(descent.model, recipe.loss, example)
        self._noise = SecureNoise()  # fresh for each task
        self._persons = Persons(rows, self._noise) if unit == "patient" else None
        count = len(rows) if self._persons is None else len(self._persons)
        self._sampler = PoissonSampler(count, event.sampling)
        # sums are in units of the noise's grid, of which `FINENESS` make its deviation
        self._clip, self._scale = clip, FINENESS / (event.noise * clip)
        self._unit = 1 / (self._scale * event.sampling * public_rows)
        # in the order in which gradients lie in memory, so that they are mostly filled at once
        names = sorted(descent.trainable, key=lambda name: descent.gradients[name].data_ptr())
        sizes = [descent.gradients[name].numel() for name in names]
        self._flat = torch.zeros(sum(sizes), dtype=torch.float64, device=rows.x.device)
        self._trainable = descent.trainable
        parts = [descent.trainable[name] for name in names], self._flat.split(sizes)
        self._sums: dict[Tensor, Tensor] = {
            p: total.view(p.shape) for p, total in zip(*parts, strict=True)
        }
        self._filled = _joined([descent.gradients[name] for name in names], self._flat)

    def fill(self) -> None:
        """Set the gradients of one step: (sum of clipped ones + noise) / expected batch."""
        self._sum_up()
        for gradient, total in self._filled:
            gradient.copy_(total).mul_(self._unit)

    def whole(self) -> Mapping[str, Tensor]:
        """Return the noisy sums of one step on the CPU, as whole numbers of the noise's grid.

        `fill` makes gradients of the same; floats are no good where sums of several sites,
        each with a share of the noise, must tell no more than their total.
        """
        self._sum_up()
        return {name: self._sums[p].cpu() for name, p in self._trainable.items()}

    def _sum_up(self) -> None:
        self._flat.zero_()
        most = self._persons.most if self._persons is not None else 1
        room = max(1, self._gradients.rows_at_once // most)
        for chunk in self._sampler.sample(self._noise).split(room):
            if len(chunk):
                self._add(chunk)
        released = self._flat.cpu()
        self._noise.hide(released)
        self._flat.copy_(released)

    def _add(self, chunk: Tensor) -> None:
        """Add the clipped gradients of some rows, or some persons."""
        device, units = self._rows.x.device, None
        if self._persons is not None:
            chunk, units = self._persons.rows_of(chunk, device)
        places = chunk.to(device)
        x, y = self._rows.x[places], self._rows.y[places]
        self._gradients.add_clipped(x, y, self._clip, self._sums, units=units, scale=self._scale)


def _joined(gradients: Sequence[Tensor], flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a gradient and its part of `flat`: one pair, if all lie side by side."""
    first, sizes = gradients[0], [gradient.numel() for gradient in gradients]
    ends = [one.data_ptr() + one.nbytes for one in gradients]
    side_by_side = ends[:-1] == [one.data_ptr() for one in gradients[1:]]
    if side_by_side and all(one.dtype == first.dtype for one in gradients):
        return [(first.as_strided(flat.shape, (1,)), flat)]
    parts = [total.view(one.shape) for one, total in zip(gradients, flat.split(sizes), strict=True)]
    return list(zip(gradients, parts, strict=True))


def check_fit(descent: Descent, x: Tensor) -> None:
    """Raise `ConfigError` if the model, given synthetic rows `x`, lets rows touch each other."""
    _check_layers(descent.model)
    _check_independence(descent, x)


def _check_layers(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name}: {type(layer).__name__} mixes the rows of a batch, so no row's "
                "gradient can be bounded; use nn.GroupNorm or nn.LayerNorm under privacy"
            )
    if all(type(layer) in OURS or not trainable(layer) for layer in model.modules()):
        return  # nothing that Opacus would have an opinion on
    from opacus.validators import ModuleValidator

    if faults := ModuleValidator.validate(model, strict=False):
        raise ConfigError(f"the recipe's model is unfit for privacy: {faults[0]}")


def _check_independence(descent: Descent, x: Tensor) -> None:
    """Look, with synthetic rows, for what would let a row touch another row's gradient."""
    model = descent.model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = model(x)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise ConfigError(f"buffer {name} keeps what it sees of rows; remove it under privacy")
    parts = torch.autograd.grad(output.sum(), list(descent.trainable.values()), allow_unused=True)
    for name, part in zip(descent.trainable, parts, strict=True):
        if part is None:
            raise ConfigError(
                f"{name} takes no part in the model's forward; freeze it with requires_grad_(False)"
            )
    model.eval()  # no dropout: rows by themselves and together must agree
    with torch.no_grad():
        together, apart = model(x), torch.cat([model(row[None]) for row in x])
    model.train()
    # rounding is as large as the largest numbers are, which noise lets grow
    scale = max(1.0, float(together.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
        raise ConfigError("the recipe's model mixes the rows of a batch; under privacy it may not")
