"""MNIST dealt out to 1,000 devices as FedProx does: two digits each, sizes by a power law.

Li et al. 2020, arXiv:1812.06127, appendix C.1, and `data/mnist/generate_niid.py` of its code: all
70,000 images; device k gets five of digit k mod 10 and five of the next, then of each a share of
what is left, drawn from a log-normal of deviation 2. A tenth of each device's images scores. Here
pixels are scaled by 1/255, not by means and deviations of everybody's rows, which are private.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.mnist import test_rows, training_rows

_DIGITS = 10
_FIRST = 5  # of each of its digits, for every device
_SPREAD = 2.0  # deviation of the logarithm of a device's share
_HELD_OUT = 0.1

Places = np.typing.NDArray[np.int64]


@dataclass(frozen=True)
class Devices:
    """`sites` devices, a multiple of ten; `seed` draws sizes and what is held out."""

    sites: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sites % _DIGITS or not 10 <= self.sites <= 5000:
            raise ConfigError(f"population.sites {self.sites}: use 10, 20, ... or 5000")

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return the devices' rows; `data` is not needed."""
        parts = (training_rows(), test_rows())
        rows = Rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        random = np.random.default_rng(self.seed)
        width = len(str(self.sites - 1))
        holdings = {}
        for number, places in enumerate(self._places(rows.y.numpy(), random)):
            mine = torch.from_numpy(random.permutation(places))
            kept = int((1 - _HELD_OUT) * len(mine))
            holdings[SiteId(f"device-{number:0{width}d}")] = Holding(
                rows.take(mine[:kept]), rows.take(mine[kept:])
            )
        return holdings

    def _places(self, labels: Places, random: np.random.Generator) -> list[Places]:
        """Return each device's row indices."""
        heaps = [np.flatnonzero(labels == digit) for digit in range(_DIGITS)]
        rounds = self.sites // _DIGITS
        taken = [2 * _FIRST * rounds] * _DIGITS  # of each heap: twice, for two devices in ten
        shares = random.lognormal(0.0, _SPREAD, (_DIGITS, rounds, 2))
        left = np.array([len(heap) for heap in heaps]) - taken
        shares *= left[:, None, None] / shares.sum(axis=(1, 2), keepdims=True)
        dealt = []
        for device in range(self.sites):
            mine = []
            for turn in range(2):
                digit = (device + turn) % _DIGITS
                first = _FIRST * (2 * (device // _DIGITS) + turn)
                more = int(shares[digit, device // _DIGITS, turn])
                start = taken[digit]
                taken[digit] += more
                mine += [heaps[digit][first : first + _FIRST], heaps[digit][start : start + more]]
            dealt.append(np.concatenate(mine))
        return dealt
