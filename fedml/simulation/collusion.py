"""Attackers that know what every honest site sends, and agree on what they send instead.

The strongest enemy that robust rules are held against: what they send looks like an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml.learning.recipe import Rows
from fedml.params import Params


class _Colluding:
    """An attack that leaves rows alone, and needs others to look at."""

    def poison(self, rows: Rows, labels: int) -> Rows:
        """Return `rows`."""
        return rows

    def bend(self, sent: Params, random: torch.Generator) -> Params:
        """Return `sent`: what to do where no honest site has answered."""
        return sent


@dataclass(frozen=True)
class LittleIsEnough(_Colluding):
    """Sends the honest mean less `z` of their standard deviations, in each element.

    Source: Baruch, Baruch & Goldberg 2019 (ALIE), arXiv:1902.06156, algorithm 3.
    """

    z: float = 1.5

    def conspire(self, honest: Sequence[Params]) -> Params:
        """Return mean - z * std."""
        return _over(honest, lambda all_: all_.mean(0) - self.z * all_.std(0, correction=0))


@dataclass(frozen=True)
class InnerProduct(_Colluding):
    """Sends the opposite of the honest mean, `scale` times as long.

    Source: Xie, Koyejo & Gupta 2019 (inner product manipulation), arXiv:1903.03936, section 3.
    """

    scale: float = 10.0

    def conspire(self, honest: Sequence[Params]) -> Params:
        """Return -scale * mean."""
        return _over(honest, lambda all_: -self.scale * all_.mean(0))


@dataclass(frozen=True)
class Mimic(_Colluding):
    """Sends what one honest site sends, so that this one counts for many.

    Source: Karimireddy, He & Jaggi 2022, arXiv:2006.09365, section 3.2; theirs chooses the site,
    ours is the first by name.
    """

    def conspire(self, honest: Sequence[Params]) -> Params:
        """Return the first."""
        return honest[0]


def _over(honest: Sequence[Params], make: Callable[[Tensor], Tensor]) -> Params:
    """Return what `make` makes of each floating buffer of all, [sites, size] in float64."""
    first = honest[0]
    buffers = {
        dtype: make(torch.stack([one.buffers[dtype] for one in honest]).double()).to(dtype)
        if dtype.is_floating_point
        else buffer
        for dtype, buffer in first.buffers.items()
    }
    return Params.over(first.layout, buffers)
