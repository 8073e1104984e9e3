"""Natural splits: the sites are in the data, by file or by what a column says."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId, check_name
from fedml.simulation.executors.base import Holding
from fedml.simulation.population.data import Data, Tabular, needed
from fedml.simulation.population.split import Split


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
        sites = sorted(check_name("site", site) for site in self.files)
        groups = {site: recipe.read(Path(self.files[site])) for site in sites}
        return _join(groups, self.held_out, self.seed)


@dataclass(frozen=True)
class Column:
    """One site for each value of a column of the data file, such as a hospital or an employer.

    `column` is a name in the header, or a number (from 0) in a file without one. Sites are named
    after values. Values with fewer than `least` rows make one site `others` together, or are left
    out, or refused; the split's notes name them. The recipe reads each value's lines as a file of
    their own, so rows it leaves out count for nobody.
    """

    column: str | int
    least: int = 10
    small: Literal["merge", "leave_out", "refuse"] = "merge"
    separator: str = ","
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Part the file of `data` by the column, and let the recipe read each part."""
        if self.small not in ("merge", "leave_out", "refuse"):
            raise ConfigError(f"population.small {self.small!r}: use merge, leave_out or refuse")
        source = needed(data)
        if not isinstance(source, Tabular):
            raise ConfigError(
                "population=column parts a file of lines, and these data are none; "
                "set data to a fedml.simulation.population.DataFile"
            )
        with source.file() as path:
            recipe.read(path)  # what is wrong with the file is said of it, not of its parts
            groups = self._read(recipe, path)
        kept, notes = self._settle(groups)
        return _join(kept, self.held_out, self.seed, notes)

    def _read(self, recipe: Recipe, path: Path) -> dict[str, Rows | None]:
        """Return the rows of each value, by site name; None where the recipe takes none."""
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        header = [] if isinstance(self.column, int) else lines[:1]
        names = next(csv.reader(header, delimiter=self.separator), [])
        place = self._place(path, [name.strip() for name in names], lines)
        parts: dict[str, list[str]] = {}
        for line in lines[len(header) :]:
            cells = next(csv.reader([line], delimiter=self.separator, skipinitialspace=True))
            value = cells[place] if place < len(cells) else ""
            parts.setdefault(_name(value), []).append(line)
        groups: dict[str, Rows | None] = {}
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, path.name)
            for site, own in sorted(parts.items()):
                part.write_text("\n".join([*header, *own]) + "\n")
                try:
                    groups[site] = recipe.read(part)
                except ConfigError:  # the whole file could be read: no line of these is complete
                    groups[site] = None
        return groups

    def _place(self, path: Path, names: list[str], lines: list[str]) -> int:
        if isinstance(self.column, int):
            width = len(next(csv.reader(lines[:1], delimiter=self.separator), []))
            if not 0 <= self.column < width:
                raise ConfigError(
                    f"population.column {self.column}: {path} has columns 0 to {width - 1}"
                )
            return self.column
        if self.column not in names:
            raise ConfigError(
                f"population.column {self.column!r}: {path} has the columns {', '.join(names)}"
            )
        return names.index(self.column)

    def _settle(self, groups: Mapping[str, Rows | None]) -> tuple[dict[str, Rows], list[str]]:
        """Return the sites that are large enough, and what became of the others."""
        sizes = {site: len(rows) if rows else 0 for site, rows in groups.items()}
        small = [site for site, size in sizes.items() if size < self.least]
        kept = {site: rows for site, rows in groups.items() if rows and site not in small}
        told = ", ".join(f"{site} ({sizes[site]})" for site in small)
        if small and self.small == "refuse":
            raise ConfigError(
                f"population.column {self.column}: fewer than {self.least} rows at {told}; "
                "lower least, or set small to merge or leave_out"
            )
        rest = [rows for site in small if (rows := groups[site])]
        notes = [f"left out, each with fewer than {self.least} rows: {told}"] if small else []
        if rest and self.small == "merge":
            merged = Rows(torch.cat([r.x for r in rest]), torch.cat([r.y for r in rest]))
            kept[_free_name(kept)] = merged
            notes = [f"merged, each with fewer than {self.least} rows: {told}"]
        if not kept:
            raise ConfigError(
                f"population.column {self.column}: no value has {self.least} rows ({told}); "
                "lower least"
            )
        return kept, notes


def _free_name(taken: Mapping[str, Rows]) -> str:
    return "others" if "others" not in taken else "merged-others"


def _name(value: str) -> str:
    """Return a site's name for a value: `Self-emp-inc` is `self-emp-inc`, `?` is `unknown`."""
    kept = re.sub(r"[^a-z0-9]+", "-", value.strip().lower()).strip("-")[:63].strip("-")
    return kept or "unknown"


def _join(
    groups: Mapping[str, Rows], held_out: float, seed: int, notes: list[str] | None = None
) -> Split:
    """Return the groups, by name, as one split."""
    sites = sorted(groups)
    shapes = {(groups[s].x.shape[1:], groups[s].x.dtype, groups[s].y.shape[1:]) for s in sites}
    if len(shapes) > 1:
        raise ConfigError(f"the sites' rows differ in shape or type: {sorted(map(str, shapes))}")
    heap = Rows(
        torch.cat([groups[site].x for site in sites]), torch.cat([groups[site].y for site in sites])
    )
    ends = np.cumsum([len(groups[site]) for site in sites])
    parts = np.split(np.arange(len(heap)), ends[:-1])
    return Split(heap, parts, held_out=held_out, seed=seed, names=sites, notes=notes or [])
