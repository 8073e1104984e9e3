"""The rows that a population deals out, in one heap."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows


class Data(Protocol):
    """Rows in one heap, for a population to deal out."""

    def rows(self, recipe: Recipe) -> Rows:
        """Return all rows, as the recipe reads them."""


@runtime_checkable
class Tabular(Protocol):
    """Data that are a file of lines, so that they can be parted by what is written there."""

    def file(self) -> AbstractContextManager[Path]:
        """Return the file, as a site's would be; it is there for as long as the context is."""


@dataclass(frozen=True)
class DataFile:
    """The rows of one file."""

    path: str

    def rows(self, recipe: Recipe) -> Rows:
        """Return the file's rows."""
        return recipe.read(Path(self.path))

    def file(self) -> AbstractContextManager[Path]:
        """Return the file itself."""
        return nullcontext(Path(self.path))


@dataclass(frozen=True)
class ShippedData:
    """A dataset that comes with scikit-learn, such as `breast_cancer`."""

    name: str

    def rows(self, recipe: Recipe) -> Rows:
        """Write the dataset as a site's CSV file would be, and let the recipe read that."""
        with self.file() as path:
            return recipe.read(path)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Write the dataset as a CSV file, with underscores for the spaces of its header."""
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
            yield path


def needed(data: Data | None) -> Data:
    """Return `data`; raises `ConfigError` if there is none."""
    if data is None:
        raise ConfigError("this population deals out one dataset: set data, or population=files")
    return data
