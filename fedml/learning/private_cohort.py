"""DP-SGD at many sites as one computation: what `PrivateGradient` does at each of them.

Each site samples its own rows and draws its own noise, from the system's entropy. All that is
public is as there: the sampling rate, the denominator, the noise's scale. One row moves its own
site's sum by at most the clipping norm, and no other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml.learning.cohort import CohortTrainer, Trained
from fedml.learning.descent import Descent
from fedml.learning.descents import Descents
from fedml.learning.gradients import Frame, Functional
from fedml.learning.private import check_fit
from fedml.learning.rowstack import RowStack
from fedml.learning.rowwise import MOST_FLOATS
from fedml.privacy.accounting import SampledGaussian
from fedml.privacy.mechanisms import clip_factors
from fedml.privacy.noise import FINENESS, SecureNoise
from fedml.privacy.sampling import PoissonSampler
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief
from fedml.stacked import Stacked


@dataclass(frozen=True)
class Release:
    """What one site's training costs, and the public number of rows it was set by."""

    event: SampledGaussian
    public_rows: int


def train_privately(
    trainer: CohortTrainer,
    brief: Brief,
    memory: Mapping[str, Stacked],
    rows: RowStack,
    releases: Sequence[Release],
    clip: float,
) -> Trained:
    """Return what becomes of all sites after the steps of their events; losses stay at zero.

    Raises `ConfigError` for a recipe unfit for privacy.
    """
    frame = trainer.frame(brief)
    _check(trainer, brief)
    descents = Descents(frame, brief, memory, trainer.training, len(rows.counts))
    gradients = _PrivateGradients(frame, rows, releases, clip)
    steps = releases[0].event.steps
    for _ in range(steps):
        descents.step(gradients.draw(descents.values))
    losses = torch.zeros(steps, len(rows.counts), dtype=torch.float64)
    return Trained(descents.delta(), (steps,) * len(rows.counts), losses)


def _check(trainer: CohortTrainer, brief: Brief) -> None:
    model = trainer.recipe.build().to(trainer.device).train()
    descent = Descent(model, brief, {}, Training(lr=1.0, steps=1))
    check_fit(descent, trainer.recipe.example(4).to(trainer.device))


class _PrivateGradients:
    """Noisy sums of clipped gradients, a row a site."""

    def __init__(
        self, frame: Frame, rows: RowStack, releases: Sequence[Release], clip: float
    ) -> None:
        self._rows, self._clip, self._gradient = rows, clip, Functional(frame)
        self._size = frame.layout.sizes[frame.dtype]
        self._columns = _columns(frame)
        exact = [(one.event.sampling, one.public_rows) for one in releases]
        device = rows.x.device
        wide = torch.float64
        self._denominators = torch.tensor([rate * n for rate, n in exact], dtype=wide)[:, None]
        # sums are in units of the noise's grid, of which `FINENESS` make its deviation
        scales = [FINENESS / (one.event.noise * clip) for one in releases]
        self._scales = torch.tensor(scales, dtype=wide, device=device)[:, None]
        self._sampling = [rate for rate, _ in exact]
        self._noise, self._device = SecureNoise(), device  # one stream: no two draws share a bit

    def draw(self, values: Tensor) -> Tensor:
        """Return each site's gradient of one step, [sites, size]; zero where nothing moves."""
        sums = self._sums(values)
        released = sums.cpu().flatten()
        self._noise.hide(released)
        noised = released.view(sums.shape) / (self._scales.cpu() * self._denominators)
        gradients = values.new_zeros(len(sums), self._size)
        gradients[:, self._columns] = noised.to(values.device, values.dtype)
        return gradients

    def _sums(self, values: Tensor) -> Tensor:
        """Return the float64 sums of sampled rows' clipped gradients, scaled, [sites, columns]."""
        picked, own = self._sample()
        sums = torch.zeros(
            len(values), len(self._columns), dtype=torch.float64, device=self._device
        )
        sites = torch.arange(len(values), device=self._device)[:, None]
        width = max(1, MOST_FLOATS // (self._size * len(values)))
        for places, real in zip(picked.split(width, 1), own.split(width, 1), strict=True):
            x, y = self._rows.x[sites, places], self._rows.y[sites, places]
            parts = self._gradient.of_rows(values, x, y)[:, :, self._columns]
            norms = torch.linalg.vector_norm(parts, dim=2, dtype=torch.float64)
            factors = clip_factors(norms, self._clip) * real * self._scales
            parts = torch.where((factors > 0)[:, :, None], parts, 0)  # for 0 * NaN is NaN
            sums += torch.bmm(factors[:, None], parts.double())[:, 0]
        return sums

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Return row numbers [sites, most sampled], and which of them are no filling."""
        most = self._rows.x.shape[1]
        chosen = torch.zeros(len(self._rows.counts), most, dtype=torch.bool)
        for site, (count, rate) in enumerate(zip(self._rows.counts, self._sampling, strict=True)):
            chosen[site, PoissonSampler(count, rate).sample(self._noise)] = True
        width = int(chosen.sum(1).max()) if chosen.numel() else 0
        order = chosen.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
        return order.to(self._device), chosen.gather(1, order).to(self._device)


def _columns(frame: Frame) -> Tensor:
    """Return the places, in the moving buffer, of what is trained."""
    places = torch.zeros(frame.layout.sizes[frame.dtype], dtype=torch.bool)
    for name, parameter in frame.model.named_parameters():
        if parameter.requires_grad:
            _, start, end, _ = frame.layout.places[name]
            places[start:end] = True
    return places.nonzero().squeeze(1).to(frame.fixed.buffers[frame.dtype].device)
