"""Pages of memory: each that the kernel hands out costs more than what is copied into it.

So what is large comes in large pages, and what is freed stays for what is allocated next.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

_TRIM, _PAD, _MMAP, _ARENAS = -1, -2, -3, -8  # parameters of mallopt(3)
_LARGEST = 2**25  # bytes up to which memory comes from the heap: more glibc does not take


def keep_freed(most: int, *, pad: int = 0, arenas: int = 0) -> None:
    """Let this process keep up to about `most` freed bytes in each of its heaps.

    A heap grows by `pad` bytes more than is asked for; there are at most `arenas`, 0 for as many
    as malloc likes. Where malloc is not glibc's, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    settings = {_TRIM: most, _MMAP: min(most, _LARGEST), _PAD: pad, _ARENAS: arenas}
    for parameter, value in settings.items():
        if value:
            mallopt(parameter, value)


def large(size: int) -> mmap.mmap:
    """Return `size` zeroed bytes, in large pages where there are any; parts can be given back."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
