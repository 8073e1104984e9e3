"""What a robust rule costs beside the least it has to do: a Gram product and a weighted sum."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.catalogue import Reading, Say, benchmark
from fedml.params import Params, encode, read
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies.robust import GeometricMedian

_SITES = 10
_WINDOW = 2**15  # elements of each update: of the sizes from 2^12 to 2^20 the quickest here


@benchmark("robust/geometric_median", "s")
def geometric_median(quick: bool, say: Say) -> Reading:
    """Measure the geometric median of ten updates of five million numbers, from arrival to end."""
    size, turns = (200_000, 2) if quick else (5_000_000, 7)
    rows = np.random.default_rng(0).standard_normal((_SITES, size), np.float32)
    rows[:2] += 3
    ours, least = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"site-{number}" for number in range(_SITES)]
        for path, row in zip(paths, rows, strict=True):
            path.write_bytes(b"".join(encode({"delta": Params({"w": torch.from_numpy(row)})})))
        for turn in range(turns):  # in turn: what else the machine does meets both
            ours.append(_timed(partial(_reduce, list(map(_arrived, paths)))))
            least.append(_timed(partial(_bare, rows)))
            say(f"turn {turn + 1}: {ours[-1]:.3f} s, product and sum {least[-1]:.3f} s")
    return Reading(statistics.median(ours), statistics.median(least))


def _arrived(path: Path) -> Update:
    """Return an update as a round hands it on: mapped from its site's file, and found finite."""
    delta = read(path)["delta"]
    assert delta.is_finite()
    return Update(TaskId(f"t.{path.name}"), 1, SiteId(path.name), delta, 1.0)


def _reduce(updates: Sequence[Update]) -> None:
    reduction = GeometricMedian(f=2).start()
    for update in updates:
        reduction.add(update)
    reduction.result()


def _bare(rows: NDArray[np.float32]) -> None:
    """Widen, multiply and add as any implementation must whose sums are exact to a float64."""
    n, size = rows.shape
    gram, weights, total = np.zeros((n, n)), np.full(n, 1 / n), np.empty(size, np.float32)
    wide = np.empty((n, _WINDOW))
    for start in range(0, size, _WINDOW):
        window = rows[:, start : start + _WINDOW]
        view = wide[:, : window.shape[1]]
        view[:] = window
        gram += view @ view.T
    for start in range(0, size, _WINDOW):
        window = rows[:, start : start + _WINDOW]
        view = wide[:, : window.shape[1]]
        view[:] = window
        total[start : start + _WINDOW] = weights @ view


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
