"""Rows by the person they belong to, for privacy whose unit is all that a person has."""

from __future__ import annotations

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.learning.ghosts import Units
from fedml.learning.recipe import Rows
from fedml.privacy.noise import SecureNoise

MOST_RECORDS = 16  # of one person that take part in a task


class Persons:
    """The persons of `rows`, and at most `MOST_RECORDS` rows of each, drawn once for a task.

    Raises `ConfigError` if the rows do not say whose they are.
    """

    def __init__(self, rows: Rows, noise: SecureNoise) -> None:
        _, owners = groups_of(rows).cpu().unique(return_inverse=True)
        order = noise.normal(len(rows), 1.0).argsort()  # of persons with too many rows, some
        order = order[owners[order].argsort(stable=True)]
        counts = owners.bincount()
        ranks = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[owners[order]]
        most = min(MOST_RECORDS, int(counts.max())) if len(counts) else 1
        kept = ranks < most
        self._table = torch.full((len(counts), most), -1)
        self._table[owners[order[kept]], ranks[kept]] = order[kept]

    def __len__(self) -> int:
        return len(self._table)

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        return self._table.shape[1]

    def rows_of(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Units]:
        """Return the numbers of the rows of the persons `chosen`, and how they belong together."""
        table = self._table[chosen.cpu()]
        there = table >= 0
        places = torch.where(there, there.flatten().cumsum(0).view(there.shape) - 1, -1)
        counts = there.sum(1)
        owners = torch.arange(len(table)).repeat_interleave(counts)
        shares = (1 / counts)[owners]
        return table[there].to(device), Units(*(p.to(device) for p in (places, owners, shares)))


def groups_of(rows: Rows) -> Tensor:
    """Return whose each row is; raises `ConfigError` if nobody said so."""
    if rows.groups is None:
        raise ConfigError(
            "privacy.mode 'patient': the recipe's rows do not say whose they are; let its read() "
            "return Rows(x, y, groups) with a patient's number for each row, or use mode 'record'"
        )
    return rows.groups


def check_apart(train: Rows, held_out: Rows) -> None:
    """Raise `ConfigError` if one person has rows to train on and rows held out.

    Each part is charged by itself, so a person must lie in one of them.
    """
    both = torch.isin(groups_of(train), groups_of(held_out))
    if bool(both.any()):
        raise ConfigError(
            f"{len(groups_of(train)[both].unique())} patients have rows to train on and rows held "
            "out; keep all rows of a patient in one of the two (Rows.divide does)"
        )


def means(values: Tensor, rows: Rows) -> Tensor:
    """Return the mean of a row's `values` for each person."""
    groups = groups_of(rows).to(values.device)
    _, owners, counts = groups.unique(return_inverse=True, return_counts=True)
    mean: Tensor = values.new_zeros(len(counts)).index_add_(0, owners, values) / counts
    return mean
