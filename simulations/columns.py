"""Tables of measures and kinds: how a cell becomes a number, and a raw row a model's input.

A row keeps every column as one number: a measure as it is, a kind as its level's place in a
published list. The model's first layer scales the one and spreads out the other, by public
constants alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows


@dataclass(frozen=True)
class Measure:
    """A number; `centre` and `half` are a public range's middle and half width.

    With `logarithmic` they are those of log(1 + value), and values are 0 or more.
    """

    name: str
    centre: float
    half: float
    logarithmic: bool = False

    def number(self, cell: str) -> float:
        """Return the cell's value; raises `ConfigError` if it is none."""
        try:
            value = float(cell)
        except ValueError as error:
            raise ConfigError(f"{self.name} {cell!r} is no number") from error
        if not math.isfinite(value) or (self.logarithmic and value < 0):
            raise ConfigError(f"{self.name} {cell!r} is out of range")
        return value


@dataclass(frozen=True)
class Kind:
    """One of the `levels` that the dataset's documentation lists."""

    name: str
    levels: tuple[str, ...]

    def number(self, cell: str) -> float:
        """Return the level's place; raises `ConfigError` if it is not listed."""
        if cell not in self.levels:
            listed = ", ".join(self.levels)
            raise ConfigError(f"{self.name} {cell!r} is none of {listed}")
        return float(self.levels.index(cell))


Column = Measure | Kind


def by_level(columns: Sequence[Column], name: str, rows: Rows) -> dict[str, Rows]:
    """Return the rows of each level of the kind `name`, without those levels that have none."""
    at = [column.name for column in columns].index(name)
    kind = columns[at]
    assert isinstance(kind, Kind)
    parts = {
        level: rows.take((rows.x[:, at] == code).nonzero()[:, 0])
        for code, level in enumerate(kind.levels)
    }
    return {level: part for level, part in parts.items() if len(part)}


def width(columns: Sequence[Column]) -> int:
    """Return how many inputs `Spread` makes of a row."""
    return sum(len(c.levels) if isinstance(c, Kind) else 1 for c in columns)


def made_up(columns: Sequence[Column], rows: int) -> Tensor:
    """Return rows drawn evenly from the public ranges and levels, the same each time."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(rows, len(columns), generator=generator)
    parts: list[Tensor] = []
    for column, share in zip(columns, drawn.T, strict=True):
        if isinstance(column, Kind):
            parts.append((share * len(column.levels)).floor())
        else:
            value = column.centre + column.half * (2 * share - 1)
            parts.append(value.clamp(min=0).expm1() if column.logarithmic else value)
    return torch.stack(parts, dim=1)


class Spread(nn.Module):
    """From raw rows [n, columns] to inputs [n, width]: measures scaled, a 0 or 1 a level."""

    middle: Tensor
    reach: Tensor
    levels: Tensor

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        measures = [c for c in columns if isinstance(c, Measure)]
        kinds = [c for c in columns if isinstance(c, Kind)]
        self.plain = [k for k, c in enumerate(columns) if c in measures and not _logged(c)]
        self.logged = [k for k, c in enumerate(columns) if c in measures and _logged(c)]
        order = [columns[k] for k in (*self.plain, *self.logged)]
        self.kinds = [
            k for k, c in enumerate(columns) if isinstance(c, Kind) for _ in range(len(c.levels))
        ]
        constants = {  # buffers that do not travel
            "middle": [c.centre for c in order if isinstance(c, Measure)],
            "reach": [c.half for c in order if isinstance(c, Measure)],
            "levels": [float(level) for c in kinds for level in range(len(c.levels))],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs that raw rows make."""
        measures = torch.cat([x[..., self.plain], x[..., self.logged].log1p()], dim=-1)
        chosen = (x[..., self.kinds] == self.levels).to(x.dtype)
        return torch.cat([(measures - self.middle) / self.reach, chosen], dim=-1)


def _logged(column: Column) -> bool:
    return isinstance(column, Measure) and column.logarithmic
