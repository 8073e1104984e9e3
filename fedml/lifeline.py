"""A child process that ends with its parent, however that ends: no orphans, no zombie work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, a process id, is gone; or end at once.

    On Linux; elsewhere the kernel does no such thing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)
