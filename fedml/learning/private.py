"""Record-level DP-SGD: what one row can do to a step is bounded, and drowned in noise.

Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with what its common forms get wrong put
right: rows join by a Poisson sample whose rate, like the denominator, is made of the *public*
number of rows; an empty sample is a step of pure noise; a row whose gradient is not finite
counts as zero; noise is drawn from the system's entropy, never from the experiment's seed.
Whatever follows the noise (weight decay, the rule, momentum) costs nothing more.
"""

from __future__ import annotations

import warnings

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.func import vmap

from fedml.errors import ConfigError
from fedml.learning.descent import Descent
from fedml.learning.recipe import Recipe, Rows
from fedml.privacy.accounting import SampledGaussian
from fedml.privacy.mechanisms import clipped_sum
from fedml.privacy.noise import SecureNoise
from fedml.privacy.sampling import PoissonSampler

MOST_FLOATS = 2**25  # per-row gradients held at once: 128 MiB of float32
_MOST_ROWS = 1024  # at once, however small the model


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
    ) -> None:
        self._recipe, self._descent, self._rows = recipe, descent, rows
        self._std, self._clip = event.noise * clip, clip
        self._denominator = event.sampling * public_rows
        self._sampler = PoissonSampler(len(rows), event.sampling)
        self._noise = SecureNoise()  # fresh for each task
        check_fit(descent, recipe.example(4).to(rows.x.device))
        self._wrapped = GradSampleModule(descent.model, loss_reduction="sum")
        size = sum(p.numel() for p in descent.trainable.values())
        self._chunk = max(1, min(_MOST_ROWS, MOST_FLOATS // max(size, 1)))

    def fill(self) -> None:
        """Set the gradients of one step: (sum of clipped ones + noise) / expected batch."""
        gradients = list(self._descent.gradients.values())
        sums = [torch.zeros_like(g, dtype=torch.float64) for g in gradients]
        for chunk in torch.split(self._sampler.sample(self._noise), self._chunk):
            if len(chunk):
                for total, part in zip(sums, self._clipped(chunk), strict=True):
                    total += part
        sizes = [total.numel() for total in sums]
        noise = torch.split(self._noise.normal(sum(sizes), self._std), sizes)
        for gradient, total, part in zip(gradients, sums, noise, strict=True):
            total += part.view(total.shape).to(total.device)
            gradient.copy_(total / self._denominator)

    def _clipped(self, chunk: Tensor) -> list[Tensor]:
        """Return the sums of one chunk's clipped gradients."""
        parameters = list(self._descent.trainable.values())
        chunk = chunk.to(self._rows.x.device)
        x, y = self._rows.x[chunk], self._rows.y[chunk]
        output = self._wrapped(x)
        # the loss of each row by itself: a mean, a sum, even a loss that mixes rows cannot leak
        losses = vmap(lambda o, t: self._recipe.loss(o[None], t[None]), randomness="different")(
            output, y
        )
        with warnings.catch_warnings():  # raw rows need no gradient, which hooks remark upon
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(
                [losses.sum()]
            )  # its plain sum lands in the gradients, which `fill` overwrites
        rows: list[Tensor] = []
        for parameter in parameters:
            part: Tensor | None = getattr(parameter, "grad_sample", None)
            if part is None:  # a layer that this batch did not visit
                part = parameter.new_zeros(len(x), *parameter.shape)
            rows.append(part)
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return clipped_sum(rows, self._clip)


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
    faults = ModuleValidator.validate(model, strict=False)
    if faults:
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
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ConfigError("the recipe's model mixes the rows of a batch; under privacy it may not")
