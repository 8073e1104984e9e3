"""Rows of several sites as one tensor, and the batches that a cohort's steps take from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows, is_finite


@dataclass(frozen=True)
class RowStack:
    """Rows of several sites: `x` and `y` are [sites, n, ...], a site's own the first `counts`.

    What stands behind a site's own rows is filling, which nobody reads.
    """

    x: Tensor
    y: Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.x.shape[:2])
        fits = shape == tuple(self.y.shape[:2]) and shape[:1] == (len(self.counts),)
        if not fits or max(self.counts, default=0) > shape[1]:
            raise ConfigError(
                f"inputs {list(self.x.shape)} and targets {list(self.y.shape)} do not hold the "
                f"rows of {len(self.counts)} sites"
            )
        for name, values in (("inputs", self.x), ("targets", self.y)):
            if not is_finite(values):
                raise ConfigError(f"{name} of a cohort hold NaN or infinity; mend the data")

    @staticmethod
    def of(sites: Sequence[Rows]) -> RowStack:
        """Copy the rows of `sites`, one at least, whose rows have equal shapes and dtypes."""
        counts = tuple(len(rows) for rows in sites)
        x, y = (pad_sequence([getattr(r, part) for r in sites], batch_first=True) for part in "xy")
        return RowStack(x, y, counts)

    def to(self, device: torch.device) -> RowStack:
        """Return the same rows on `device`."""
        if self.x.device == device == self.y.device:
            return self
        return RowStack(self.x.to(device), self.y.to(device), self.counts)


@dataclass(frozen=True)
class Part:
    """Batches of equal length, of the sites `sites`; see `Gradient` for `counts`."""

    sites: slice | Tensor
    x: Tensor
    y: Tensor
    counts: Tensor | None = None


def gather(rows: RowStack, batch: Sequence[Tensor | slice], *, padded: bool) -> list[Part]:
    """Return one step's batch of each of the first sites.

    Batches of unequal length are filled up, if they may be `padded`, with copies of a row that
    count nothing, or else fall into parts.
    """
    active = len(batch)
    if all(isinstance(one, slice) for one in batch) and len({*rows.counts[:active]}) == 1:
        width = rows.counts[0]
        return [Part(slice(active), rows.x[:active, :width], rows.y[:active, :width])]
    places = [
        torch.arange(count) if isinstance(one, slice) else one
        for one, count in zip(batch, rows.counts, strict=False)
    ]
    lengths = torch.tensor([len(one) for one in places])
    if len(lengths.unique()) == 1:
        return [_part(rows, slice(active), torch.stack(places))]
    if padded:
        index = pad_sequence(places, batch_first=True, padding_value=-1)
        own = index >= 0
        index = torch.where(own, index, index[:, :1])
        return [_part(rows, slice(active), index, own / lengths[:, None])]
    parts = []
    for length in lengths.unique().tolist():
        sites = (lengths == length).nonzero().squeeze(1)
        parts.append(_part(rows, sites, torch.stack([places[site] for site in sites.tolist()])))
    return parts


def _part(
    rows: RowStack, sites: slice | Tensor, index: Tensor, counts: Tensor | None = None
) -> Part:
    device = rows.x.device
    owner = torch.arange(len(rows.counts))[sites].to(device)[:, None]
    index = index.to(device)
    if counts is not None:
        counts = counts.to(device)
    return Part(sites, rows.x[owner, index], rows.y[owner, index], counts)
