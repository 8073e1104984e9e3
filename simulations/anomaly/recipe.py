"""An autoencoder that learns what is normal, and where normal ends.

Samples of breast tissue (30 measures, as the shipped recipe reads them); benign is normal. The
network squeezes a sample through a few numbers and rebuilds it; what it cannot rebuild is
strange. Only benign samples teach: a malignant one adds nothing to the loss.

Where the alarm begins is a parameter like any other: the `QUANTILE` of benign samples'
strangeness, learnt by pinball loss (Koenker and Bassett 1978). So it is averaged, and under
privacy noised, as the network is, and no site reveals its own strange samples to set it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedml.learning.recipe import Rows
from fedml.recipes.breast_cancer import FEATURES, BreastCancer

QUANTILE = 0.95  # of normal samples shall raise no alarm
_HIDDEN, _CODE = 16, 6
_NORMAL = 0
_LEAST = 1e-4  # of an error, before its logarithm


class Anomaly:
    """The recipe; its outputs are a sample's strangeness and the limit of what is normal.

    Both are logarithms of a mean squared error. Scores are shares of all rows: `alarm_right`
    (malignant, told strange), `alarm_wrong` (benign, told strange) and `strange` (malignant).
    Detection rate is the first by the last, the rate of false alarms the second by one less
    the last.
    """

    labels = ("strangeness", "limit")

    def build(self) -> nn.Module:
        """Return scaling, the autoencoder and the limit."""
        return _Detector()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean over rows of log error and pinball loss, both 0 where not normal."""
        strangeness, limit = output[:, 0], output[:, 1]
        over = strangeness.detach() - limit
        pinball = torch.maximum(QUANTILE * over, (QUANTILE - 1) * over)
        loss: Tensor = ((strangeness + pinball) * (target == _NORMAL)).mean()
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `alarm_right`, `alarm_wrong` and `strange`, each 0 or 1."""
        alarm, strange = output[:, 0] > output[:, 1], target != _NORMAL
        return {
            "alarm_right": (alarm & strange).float(),
            "alarm_wrong": (alarm & ~strange).float(),
            "strange": strange.float(),
        }

    def read(self, path: Path) -> Rows:
        """Return the rows of a CSV file as the recipe `breast_cancer` reads them."""
        return BreastCancer().read(path)

    def example(self, rows: int) -> Tensor:
        """Return rows drawn evenly from the public ranges."""
        return BreastCancer().example(rows)


class _Detector(nn.Module):
    """From raw rows [n, 30] to [n, 2]: log error of the rebuilt row, and the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = BreastCancer().build().get_submodule("0")
        self.encode = nn.Sequential(
            nn.Linear(len(FEATURES), _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, _CODE)
        )
        self.decode = nn.Sequential(
            nn.Linear(_CODE, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, len(FEATURES))
        )
        self.limit = nn.Linear(1, 1, bias=False)  # one number, in a layer that privacy knows
        nn.init.zeros_(self.limit.weight)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scale(x)
        rebuilt = self.decode(self.encode(scaled))
        error = (rebuilt - scaled).square().mean(dim=1, keepdim=True)
        strangeness = (error + _LEAST).log()
        return torch.cat([strangeness, self.limit(torch.ones_like(strangeness))], dim=1)
