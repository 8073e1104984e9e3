"""Two datasets that come with scikit-learn, dealt out as privacy is measured on them.

A fifth of the rows, stratified by label, is for testing; the others go to the sites at random, in
equal parts. Breast cancer is standardised by the training rows' means and deviations, of all
sites together, which no noise hides: the usual convention, and a cost that is not counted. Digits
need none: an image has its own mean taken off, and is brought to a length of `_LENGTH`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.privacy.recipe import Linear

_TESTED = 0.2
_LENGTH = 5.0


@dataclass(frozen=True)
class Sites:
    """`sites` sites of equal size; `seed` draws the test rows and who gets which of the others."""

    sites: int = 5
    seed: int = 0

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal the recipe's own dataset out; `data` is not needed."""
        if not isinstance(recipe, Linear):
            raise ConfigError("these sites hold the rows of simulations.privacy.recipe alone")
        train, test = _divided(recipe.dataset, self.seed)
        order = np.random.default_rng(self.seed).permutation(len(train))
        parts = [
            [torch.from_numpy(part) for part in np.array_split(numbers, self.sites)]
            for numbers in (order, np.arange(len(test)))
        ]
        return {
            SiteId(f"site-{number}"): Holding(train.take(own), test.take(kept))
            for number, (own, kept) in enumerate(zip(*parts, strict=True))
        }


def shipped(dataset: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a dataset's rows and labels as scikit-learn ships them; raises `ConfigError`."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError("scikit-learn is missing: pip install 'fedml-consortium[sim]'") from error
    x, y = getattr(datasets, f"load_{dataset}")(return_X_y=True)
    return x, y


def _divided(dataset: str, seed: int) -> tuple[Rows, Rows]:
    """Return all rows to train on and all to test on, prepared."""
    x, y = shipped(dataset)
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(y)), test_size=_TESTED, stratify=y, random_state=seed
    )
    prepared = _standardised(x, train) if dataset == "breast_cancer" else _normalised(x)
    rows = Rows(torch.from_numpy(prepared).float(), torch.from_numpy(y).long())
    return rows.take(torch.from_numpy(train)), rows.take(torch.from_numpy(test))


def _standardised(x: NDArray[np.float64], train: NDArray[np.int64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    return scaled


def _normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = x - x.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = _LENGTH * centred / np.maximum(lengths, 1e-9)
    return scaled
