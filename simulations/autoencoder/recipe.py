"""Anomaly detection: an autoencoder learns healthy rows, and malignant ones reconstruct worse.

The model's one output is a row's reconstruction error, so the loss needs no label, and serving
answers with the anomaly score itself. Inputs are those of the recipe `breast_cancer`.

Scores: `auc` is, for each row, the share of rows of the other kind that it is ranked rightly
against (ties count half), whose mean over a site's rows is the area under the ROC curve of that
site; a row by itself, as under record privacy, has nobody to be ranked against and scores 0.5.
`accuracy` needs no other rows: it alarms above the fixed error `ALARM`.
Source of the method: Hinton and Salakhutdinov 2006, doi:10.1126/science.1127647; of the area as
a mean over pairs: Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedml.learning.recipe import Rows
from fedml.recipes.breast_cancer import FEATURES, BreastCancer

ALARM = 0.02  # mean squared error of a row whose values lie in [-1, 1]; set before any measurement
_HIDDEN, _CODE = 16, 4


class Autoencoder:
    """The recipe; scores `auc` and `accuracy`. Label 1 is an anomaly; none is trained on."""

    labels = ("anomaly",)

    def build(self) -> nn.Module:
        """Return the autoencoder with its error as the output, drawn at random."""
        scale = next(BreastCancer().build().children())
        return _Error(scale)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean reconstruction error, whatever the labels."""
        return output.mean()

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `auc` and `accuracy`, see above."""
        error, anomalous = output[:, 0], target > 0
        return {
            "auc": _ranked(error, anomalous),
            "accuracy": ((error > ALARM) == anomalous).float(),
        }

    def read(self, path: Path) -> Rows:
        """Return the rows of a CSV file as the recipe `breast_cancer` reads them."""
        return BreastCancer().read(path)

    def example(self, rows: int) -> Tensor:
        """Return rows drawn evenly from the features' public ranges."""
        return BreastCancer().example(rows)


class _Error(nn.Module):
    """A row's mean squared difference from what the autoencoder makes of it, [n, 1]."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.scale = scale
        self.coder = nn.Sequential(
            nn.Linear(len(FEATURES), _HIDDEN),
            nn.Tanh(),
            nn.Linear(_HIDDEN, _CODE),
            nn.Tanh(),
            nn.Linear(_CODE, _HIDDEN),
            nn.Tanh(),
            nn.Linear(_HIDDEN, len(FEATURES)),
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scale(x)
        error: Tensor = (self.coder(scaled) - scaled).square().mean(dim=-1, keepdim=True)
        return error


def _ranked(error: Tensor, anomalous: Tensor) -> Tensor:
    """Return for each row the share of the other kind's rows that it is ranked rightly against."""
    ahead = (error[:, None] > error[None, :]).float()
    ahead = ahead + 0.5 * (error[:, None] == error[None, :]).float()
    others = (anomalous[:, None] != anomalous[None, :]).float()
    right = torch.where(anomalous[:, None], ahead, 1.0 - ahead) * others
    count = others.sum(dim=1)
    return torch.where(count > 0, right.sum(dim=1) / count.clamp(min=1.0), 0.5)
