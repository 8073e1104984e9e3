"""Tensors in memory that two processes share, written by one and read by the other.

A `Sheet` holds named `Params` as the bytes of a safetensors file, so reading copies nothing. It
has no name in any folder: what it takes goes back to the system with the last process that maps
it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping

import numpy as np

from fedml.params import Params, decode, encode


def _open_memory() -> int:
    """Return a descriptor of memory that starts empty."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedml")
    with tempfile.TemporaryFile() as file:  # not Linux: a file without a name
        return os.dup(file.fileno())


class Sheet:
    """A stretch of shared memory; whoever receives its `descriptor` can map it too."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)

    @classmethod
    def new(cls, size: int) -> Sheet:
        """Return an empty sheet of `size` bytes."""
        descriptor = _open_memory()
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    def close_descriptor(self) -> None:
        """Give up the descriptor; what is mapped stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def write(self, parts: Mapping[str, Params]) -> int:
        """Store `parts`; return how many bytes they took."""
        target, end = np.frombuffer(self._memory, np.uint8), 0
        for piece in encode(parts):
            start, end = end, end + piece.nbytes
            target[start:end] = np.frombuffer(piece, np.uint8)
        return end

    def read(self, length: int, done: Callable[[], None] = lambda: None) -> dict[str, Params]:
        """Return views of what was written; `done` is called once nobody holds any of them."""
        held = np.frombuffer(self._memory, np.uint8, length)
        weakref.finalize(held, done).atexit = False
        return decode(held.data)


def bytes_of(parts: Mapping[str, Params]) -> int:
    """Return how many bytes a sheet for `parts` needs."""
    return sum(piece.nbytes for piece in encode(parts))
