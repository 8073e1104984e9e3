"""A population whose sites see unlike inputs: other instruments, other angles, other noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population.data import Data, needed
from fedml.simulation.population.split import Split

Kind = Literal["noise", "affine", "rotation"]


@dataclass(frozen=True)
class FeatureShift:
    """Rows are dealt as `IID` does; then site i of N (1 to N) changes its inputs, never labels.

    noise     adds Gaussian noise of variance strength * i / N, in units of the data's variance
    affine    measures each feature in a unit and from an origin of its own: x * exp(a) + b * sd,
              a and b normal of deviation `strength`, drawn once for each site and feature
    rotation  turns images by strength * i / N degrees

    A feature's sd is that of all rows; pixels of an image share one. Sources: noise: Li et al.
    2022 (NIID-Bench), arXiv:2102.02079, section 4.2; rotation: Ghosh et al. 2020 (IFCA),
    arXiv:2006.04088, section 6.
    """

    sites: int
    kind: Kind = "noise"
    strength: float = 0.5
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out, and shift each site's inputs."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"population.kind {self.kind!r}: use one of {list(get_args(Kind))}")
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"population.strength {self.strength}: use 0 (no shift) or more")
        rows = needed(data).rows(recipe)
        if not 1 <= self.sites <= len(rows):
            raise ConfigError(f"{len(rows)} rows cannot go to {self.sites} sites; lower sites")
        x = rows.x
        if not x.is_floating_point():
            raise ConfigError(f"inputs are {x.dtype}, which cannot be shifted; use other data")
        if self.kind == "rotation" and x.ndim not in (3, 4):
            raise ConfigError(
                f"population.kind rotation: inputs {list(x.shape)} are no images [rows, height, "
                "width] or [rows, channels, height, width]; use noise or affine"
            )
        sd = x.double().std(dim=0) if x.ndim == 2 else x.double().std()

        def shift(number: int, own: Tensor) -> Tensor:
            return self._shift(number, own, sd)

        shuffled = np.random.default_rng(self.seed).permutation(len(rows))
        parts = np.array_split(shuffled, self.sites)
        return Split(rows, parts, held_out=self.held_out, seed=self.seed, shift=shift)

    def _shift(self, number: int, x: Tensor, sd: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        amount = self.strength * (number + 1) / self.sites
        if self.kind == "rotation":
            return _rotate(x, amount)
        if self.kind == "noise":
            noise = torch.randn(x.shape, generator=random, dtype=torch.float64)
            return (x + noise * sd * math.sqrt(amount)).to(x)
        draws = torch.randn(2, *sd.shape, generator=random, dtype=torch.float64) * self.strength
        return (x * draws[0].exp() + draws[1] * sd).to(x)


def _rotate(x: Tensor, degrees: float) -> Tensor:
    """Turn images [n, (channels,) height, width] about their middle; corners become 0."""
    images = x if x.ndim == 4 else x[:, None]
    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    height, width = images.shape[-2:]
    matrix = torch.tensor(
        [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], dtype=x.dtype
    )
    grid = functional.affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    turned: Tensor = functional.grid_sample(images, grid, align_corners=False)
    return turned.view(x.shape)
