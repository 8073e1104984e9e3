"""A private training step beside a plain one: time by turns in one process, memory in processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.catalogue import Reading, Say, benchmark

_MB = 1e6


@benchmark("privacy/dp_mlp", "ms")
def dp_mlp(quick: bool, say: Say) -> Reading:
    """Measure a private step of the perceptron 784-256-128-10; the limit is torch's plain SGD."""
    return _reading("mlp", (1, 10) if quick else (6, 25), 2 if quick else 10, say)


@benchmark("privacy/dp_cnn", "ms")
def dp_cnn(quick: bool, say: Say) -> Reading:
    """Measure a private step of W1's network; the limit is torch's plain SGD."""
    return _reading("cnn", (1, 1) if quick else (3, 4), 2 if quick else 10, say)


def _reading(net: str, turns: tuple[int, int], weighed: int, say: Say) -> Reading:
    from benchmarks.private_steps import STEPS, race

    times = {kind: statistics.median(some) * 1e3 for kind, some in race(net, *turns).items()}
    extra = {f"{kind} ms": times[kind] for kind in ("hooks", "ghost")}
    for kind in STEPS:
        say(
            f"  {kind}: {times[kind]:.2f} ms of CPU, {times[kind] / times['plain']:.2f} times plain"
        )
    for kind in STEPS:
        extra[f"{kind} MB"] = _weigh(net, kind, weighed) / _MB
    return Reading(times["ours"], times["plain"], extra)


def _weigh(net: str, kind: str, steps: int) -> int:
    command = [sys.executable, "-m", "benchmarks.private_steps", net, kind, str(steps)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(told.split()[-1])
