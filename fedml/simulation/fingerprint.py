"""Which rows a simulation ran on, as a digest for its lineage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from fedml.simulation.population.data import Tabular

_MANY = 10_000  # sites whose rows are looked at one by one


@dataclass
class Fingerprinted:
    """Data that notes the SHA-256 of its rows, in hex, when they are read."""

    data: Data
    digest: str = ""

    def rows(self, recipe: Recipe) -> Rows:
        """Return all rows."""
        rows = self.data.rows(recipe)
        self.digest = _digest([rows])
        return rows


@dataclass
class _FingerprintedFile(Fingerprinted):
    """The same of data that are a file of lines."""

    def file(self) -> AbstractContextManager[Path]:
        """Return the file, and note the SHA-256 of its bytes."""
        assert isinstance(self.data, Tabular), "data without a file"
        return self._noted(self.data)

    @contextmanager
    def _noted(self, data: Tabular) -> Iterator[Path]:
        with data.file() as path:
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield path


def fingerprinted(data: Data) -> Fingerprinted:
    """Return the same data, which note their digest when they are read."""
    return _FingerprintedFile(data) if isinstance(data, Tabular) else Fingerprinted(data)


def of_holdings(holdings: Mapping[SiteId, Holding]) -> str:
    """Return the SHA-256 of all sites' rows, "" if there are too many sites to look at each."""
    if len(holdings) > _MANY:
        return ""
    return _digest([part for site in holdings.values() for part in (site.train, site.held_out)])


def _digest(parts: list[Rows]) -> str:
    total = hashlib.sha256()
    for rows in parts:
        for tensor in (rows.x, rows.y):
            total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().numpy().data)
    return total.hexdigest()
