"""The four hospitals of Fed-Heart-Disease, prepared exactly as FLamby does.

Data: UCI Heart Disease (Janosi, Steinbrunn, Pfisterer and Detrano 1989, CC BY 4.0).
Preparation: du Terrail et al. 2022, arXiv:2210.04620, and its code: incomplete rows go, a third
of each hospital's rows is for testing, always the same, and each hospital standardises by the
means and deviations of its own training rows. Cholesterol 0 means that it was not measured, at
all of one hospital: the column is constant there and becomes 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.download import Source, find

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"
_DIGESTS = {
    "cleveland": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "hungarian": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "switzerland": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    "va": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
}
SOURCES = {
    name: Source(
        f"heart_disease_uci/processed.{name}.data", f"{_UCI}/processed.{name}.data", (digest,)
    )
    for name, digest in _DIGESTS.items()
}
_SEED, _SHARE = 43, 0.66  # FLamby's, of the split


@dataclass(frozen=True)
class Hospitals:
    """Cleveland, Hungarian, Switzerland and VA Long Beach; nothing about them is random."""

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return each hospital's standardised rows; `data` is not needed."""
        return {
            SiteId(name): _standardised(recipe.read(find(source)))
            for name, source in SOURCES.items()
        }


def pooled_test(recipe: Recipe) -> Rows:
    """Return FLamby's "Pooled Test": all hospitals' test rows, on the scale of all together.

    They are standardised by the means and deviations of all hospitals' training rows, not by
    each hospital's own as in training.
    """
    parts = [_split(recipe.read(find(source))) for source in SOURCES.values()]
    mean, deviation = _moments(torch.cat([train.x for train, _ in parts]))
    x = torch.cat([_scaled(test.x, mean, deviation) for _, test in parts])
    return Rows(x, torch.cat([test.y for _, test in parts]))


def _standardised(rows: Rows) -> Holding:
    train, test = _split(rows)
    mean, deviation = _moments(train.x)
    return Holding(*(Rows(_scaled(part.x, mean, deviation), part.y) for part in (train, test)))


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """Return (training rows, test rows), stratified unless a label has two rows or fewer."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ConfigError("scikit-learn is missing: pip install 'fedml-consortium[sim]'") from error
    labels = rows.y.long().reshape(-1)
    rare = int(labels.bincount(minlength=2).min()) <= 2
    train, test = train_test_split(
        np.arange(len(rows)),
        test_size=1 - _SHARE,
        train_size=_SHARE,
        random_state=_SEED,
        shuffle=True,
        stratify=None if rare else labels.numpy(),
    )
    return rows.take(torch.from_numpy(train)), rows.take(torch.from_numpy(test))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(dim=0), x.double().std(dim=0)


def _scaled(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return ((x.double() - mean) / (deviation + 1e-9)).to(x.dtype)
