"""Who the simulated sites are, and which rows each of them holds."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId, check_name
from fedml.recipes.partition import dirichlet_label_skew
from fedml.simulation.executors.base import Holding


class Data(Protocol):
    """Rows in one heap, for a population to deal out."""

    def rows(self, recipe: Recipe) -> Rows:
        """Return all rows, as the recipe reads them."""


@dataclass(frozen=True)
class DataFile:
    """The rows of one file."""

    path: str

    def rows(self, recipe: Recipe) -> Rows:
        """Return the file's rows."""
        return recipe.read(Path(self.path))


@dataclass(frozen=True)
class ShippedData:
    """A dataset that comes with scikit-learn, such as `breast_cancer`."""

    name: str

    def rows(self, recipe: Recipe) -> Rows:
        """Write the dataset as a site's CSV file would be, and let the recipe read that."""
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ConfigError(
                "scikit-learn is missing: pip install 'fedml-consortium[sim]'"
            ) from error
        load = getattr(datasets, f"load_{self.name}", None)
        if load is None:
            raise ConfigError(f"scikit-learn ships no dataset {self.name!r}; try breast_cancer")
        bunch = load()
        names = [str(name).replace(" ", "_") for name in bunch.feature_names]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{self.name}.csv")
            with path.open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow([*names, "target"])
                for features, target in zip(bunch.data, bunch.target, strict=True):
                    table.writerow([*(repr(float(value)) for value in features), int(target)])
            return recipe.read(path)


class Population(Protocol):
    """A way to make sites."""

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return each site's rows; the same for the same settings."""


@dataclass(frozen=True)
class IID:
    """`sites` sites of equal size with rows drawn at random; `held_out` is the scored share."""

    sites: int
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out like cards."""
        rows = _needed(data).rows(recipe)
        if not 1 <= self.sites <= len(rows):
            raise ConfigError(f"{len(rows)} rows cannot go to {self.sites} sites; lower sites")
        shuffled = np.random.default_rng(self.seed).permutation(len(rows))
        return _name(rows, np.array_split(shuffled, self.sites), self.held_out, self.seed)


@dataclass(frozen=True)
class Dirichlet:
    """`sites` sites of equal size, each with a label mixture of its own.

    `alpha` 100 and all are alike, 0.1 and most see a single label; see `dirichlet_label_skew`.
    """

    sites: int
    alpha: float = 0.5
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out with label skew."""
        rows = _needed(data).rows(recipe)
        labels = rows.y.reshape(len(rows), -1)[:, 0].long().numpy()
        parts = dirichlet_label_skew(labels, self.sites, self.alpha, self.seed)
        return _name(rows, parts, self.held_out, self.seed)


@dataclass(frozen=True)
class Files:
    """The natural split: one file for each site, by name."""

    files: Mapping[str, str]
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Read each site's file; `data` is not needed."""
        if not self.files:
            raise ConfigError("population.files is empty: give site names and their files")
        sites = sorted(self.files)
        return {
            SiteId(check_name("site", site)): _hold_out(
                recipe.read(Path(self.files[site])), self.held_out, self.seed, number
            )
            for number, site in enumerate(sites)
        }


def _needed(data: Data | None) -> Data:
    if data is None:
        raise ConfigError("this population deals out one dataset: set data, or population=files")
    return data


def _name(
    rows: Rows, parts: Sequence[np.typing.NDArray[np.int64]], held_out: float, seed: int
) -> Mapping[SiteId, Holding]:
    width = len(str(len(parts) - 1))
    return {
        SiteId(f"site-{k:0{width}d}"): _hold_out(
            rows.take(torch.from_numpy(part.astype(np.int64))), held_out, seed, k
        )
        for k, part in enumerate(parts)
    }


def _hold_out(rows: Rows, share: float, seed: int, number: int) -> Holding:
    if not 0 <= share < 1:
        raise ConfigError(f"population.held_out {share}: a share of each site's rows, below 1")
    order = torch.from_numpy(np.random.default_rng([seed, number]).permutation(len(rows)))
    kept = round(len(rows) * share)
    return Holding(rows.take(order[kept:].sort().values), rows.take(order[:kept].sort().values))
