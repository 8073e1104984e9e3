"""Many models of one layout as one value: a matrix [models, size] for each dtype, a model a row.

Elementwise arithmetic on a stack is the arithmetic of `Params` on every row, so an algorithm
that is elementwise runs at a whole cohort of sites in a few operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Self

import torch
from torch import Tensor

from fedml.errors import MalformedUpdate
from fedml.params import Layout, Params


class Stacked(Params):
    """Rows of `Params`: `stack[name]` is [rows, *shape], `layout` is that of a single row.

    Only stacks of equally many rows combine with each other. What is not elementwise (a norm,
    a digest) is asked of a row, and raises `TypeError` here.
    """

    __slots__ = ()

    def __init__(self, rows: Sequence[Params]) -> None:
        """Copy `rows`, one at least, into a stack; raises `MalformedUpdate` if layouts differ."""
        first = rows[0]
        for row in rows:
            first.check_like(row)
        self._set(
            first.layout,
            {dtype: torch.stack([row.buffers[dtype] for row in rows]) for dtype in first.buffers},
        )

    @classmethod
    def over(cls, layout: Layout, buffers: Mapping[torch.dtype, Tensor]) -> Self:
        """Wrap matrices without a copy; each has `layout.sizes` columns, all as many rows."""
        found = {dtype: buffer.shape[1:] for dtype, buffer in buffers.items()}
        fits = found == {dtype: torch.Size([size]) for dtype, size in layout.sizes.items()}
        if not fits or len({len(buffer) for buffer in buffers.values()}) > 1:
            shapes = {dtype: list(buffer.shape) for dtype, buffer in buffers.items()}
            raise MalformedUpdate(f"matrices {shapes} do not fit the layout's {dict(layout.sizes)}")
        stack = cls.__new__(cls)
        stack._set(layout, buffers)
        return stack

    @classmethod
    def repeat(cls, params: Params, rows: int) -> Self:
        """Return `rows` times the same `params`, without a copy: not to be written to."""
        return cls.over(params.layout, {d: b.expand(rows, -1) for d, b in params.buffers.items()})

    @property
    def rows(self) -> int:
        """How many models there are."""
        return len(next(iter(self.buffers.values())))

    def __getitem__(self, name: str) -> Tensor:
        dtype, start, end, shape = self.layout.places[name]
        return self.buffers[dtype][:, start:end].reshape(self.rows, *shape)

    def row(self, number: int) -> Params:
        """Return one model, a view."""
        return Params.over(self.layout, {d: b[number] for d, b in self.buffers.items()})

    def take(self, rows: Sequence[int]) -> Self:
        """Return the models at `rows`, a copy."""
        places = {d: torch.tensor(rows, dtype=torch.long, device=b.device) for d, b in self._all()}
        return self.over(self.layout, {d: b[places[d]] for d, b in self._all()})

    def head(self, rows: int) -> Self:
        """Return the first `rows` models, views."""
        return self.over(self.layout, {d: b[:rows] for d, b in self._all()})

    def finite_rows(self) -> list[bool]:
        """Return for each row whether no floating element is NaN or infinite."""
        if self.is_finite():
            return [True] * self.rows
        parts = [b.isfinite().all(1).cpu() for d, b in self._all() if d.is_floating_point]
        return torch.stack(parts).all(0).tolist()

    def norm(self) -> NoReturn:
        """Raise `TypeError`: rows have norms, and a stack has none."""
        raise TypeError("a stack has no norm; ask its rows")

    def digest(self) -> NoReturn:
        """Raise `TypeError`: rows have digests, and a stack has none."""
        raise TypeError("a stack has no digest; ask its rows")

    def _all(self) -> Sequence[tuple[torch.dtype, Tensor]]:
        return list(self.buffers.items())
