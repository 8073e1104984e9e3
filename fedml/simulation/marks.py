"""Marks that tell simulated updates apart in receipts: 64 hex digits, like a digest.

Of small updates it is the SHA-256. Of large ones it is made of their XXH3, at the speed of
memory: nobody forges bytes that never leave his machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fedml.params import Params
from fedml.protocol.tasks import Stack, Update

_SMALL = 2**14  # bytes of an update that SHA-256 is quick enough for


def mark_of(update: Update) -> str:
    """Return the mark of an update's delta and slots; no two that differ have the same."""
    parts = (("", update.delta), *sorted(update.slots.items()))
    if sum(part.layout.bytes for _, part in parts) <= _SMALL:
        raw = [_raw(buffer)[None] for _, part in parts for buffer in part.buffers.values()]
        return _digests(_names(parts), raw)[0]
    return _sealed(_names(parts), [_sum(part) for _, part in parts])


def marks_of(stack: Stack) -> tuple[str, ...]:
    """Return the mark of each row; "" on an accelerator, for fetching it would cost a round."""
    parts = (("", stack.delta), *sorted(stack.slots.items()))
    if any(b.device.type != "cpu" for _, part in parts for b in part.buffers.values()):
        return ("",) * len(stack)
    if sum(part.layout.bytes for _, part in parts) <= _SMALL:
        raw = [_raw(buffer) for _, part in parts for buffer in part.buffers.values()]
        return tuple(_digests(_names(parts), raw))
    names = _names(parts)
    rows = range(len(stack))
    return tuple(_sealed(names, [_sum(part.row(row)) for _, part in parts]) for row in rows)


def _names(parts: Sequence[tuple[str, Params]]) -> bytes:
    return "\0".join(name for name, _ in parts).encode()


def _raw(buffer: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = buffer.detach().cpu().contiguous().view(torch.uint8).numpy()
    return found


def _digests(names: bytes, matrices: Sequence[NDArray[np.uint8]]) -> list[str]:
    """Return the SHA-256 of each row of `matrices`, each [rows, bytes], taken side by side."""
    whole = np.concatenate(matrices, axis=1) if len(matrices) > 1 else matrices[0]
    start, found = hashlib.sha256(names), []
    for row in whole:
        total = start.copy()
        total.update(row)
        found.append(total.hexdigest())
    return found


def _sealed(names: bytes, sums: Sequence[str]) -> str:
    return hashlib.sha256(b"\0".join([names, *(one.encode() for one in sums)])).hexdigest()


def _sum(part: Params) -> str:
    """Return the XXH3 of a part's values, remembered with them."""
    known = part.known.get("xxh3")
    if not isinstance(known, str):
        total = xxhash.xxh3_128()
        for buffer in part.buffers.values():
            total.update(_raw(buffer).data)
        part.known["xxh3"] = known = total.hexdigest()
    return known
