"""What this machine lends a simulation: its cores, and how its memory is allocated."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fedml import pages

_CGROUP = Path("/sys/fs/cgroup")
_KEPT, _PAD = 2**30, 2**26  # a step allocates what the step before it freed


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use: its affinity, and its container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Return the container's limit in cores, infinity if there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return float("inf") if not cgroup.is_dir() else _old_quota(cgroup / "cpu")
    return float("inf") if quota == "max" else int(quota) / int(period)


def _old_quota(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return float("inf")
    return quota / period if quota > 0 else float("inf")


def tune_allocator() -> None:
    """Let this process keep the memory it frees, and take tensors from it."""
    pages.keep_freed(_KEPT, pad=_PAD)
