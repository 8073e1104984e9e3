"""A round that only moves bytes: what it costs beside bare gRPC, and how much memory it takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import federation, wire
from benchmarks.catalogue import Reading, Say, benchmark

_MB = 10**6


@benchmark("transport/1MB", "s")
def small(quick: bool, say: Say) -> Reading:
    """Measure the median round of a 1 MB model and four sites."""
    return _round(1 * _MB, 1 if quick else 60, say)


@benchmark("transport/100MB", "s")
def large(quick: bool, say: Say) -> Reading:
    """Measure the median round of a 100 MB model and four sites."""
    return _round((20 if quick else 100) * _MB, 1 if quick else 12, say)


@benchmark("transport/500MB", "s")
def huge(quick: bool, say: Say) -> Reading:
    """Measure the median round of a 500 MB model and four sites."""
    return _round(500 * _MB, 1 if quick else 3, say)


@benchmark("transport/memory", "MB")
def memory(quick: bool, say: Say) -> Reading:
    """Measure how far four updates of 100 MB raise the coordinator's memory; the limit is one."""
    return _raised(4, 20 if quick else 100, 1 if quick else 6, say)


@benchmark("transport/memory32", "MB")
def memory_of_many(quick: bool, say: Say) -> Reading:
    """Measure the same with 32 sites."""
    return _raised(32, 20 if quick else 100, 1 if quick else 2, say)


def _raised(sites: int, megabytes: int, rounds: int, say: Say) -> Reading:
    size = megabytes * _MB
    account = federation.play(size, rounds, say, count=sites)
    return Reading((account.peak - account.before) / _MB, size / _MB)


@benchmark("transport/sites", "s")
def sites(quick: bool, say: Say) -> Reading:
    """Measure a 1 MB round with 1,000 sites connected, and what they cost while idle.

    The limit is four connections' time for the same bytes over bare gRPC.
    """
    count = 50 if quick else 1000
    wire_round = statistics.median(wire.rounds(1 * _MB, 1 if quick else 20).periods)
    limit = wire_round * count / wire.CLIENTS
    crowd = federation.crowd(count, 1 * _MB, 2 if quick else 60, say)
    receipt = crowd.receipt
    extra = {
        "sites counted": float(len(receipt.counted)),
        "idle share of a core": crowd.idle,
        "KB a site": crowd.held / count / 1e3,
        "peak MB": crowd.peak / _MB,
        "seconds to connect": crowd.connecting,
    }
    return Reading(receipt.closed - receipt.opened, limit, extra)


def _round(size: int, rounds: int, say: Say) -> Reading:
    """Return the median time of a round, and of the same bytes over bare gRPC."""
    bare = wire.rounds(size, rounds)
    say(f"  bare gRPC: {_spread(bare.periods)}")
    account = federation.play(size, rounds, say)
    say(f"  rounds:    {_spread(account.periods)}")
    extra = {
        "least": min(account.periods),
        "least of the limit": min(bare.periods),
        "CPU seconds": account.cpu,
        "the coordinator's": account.cpu_here,
        "CPU seconds of the limit": bare.cpu,
        "MB above the idle coordinator": (account.peak - account.before) / _MB,
    }
    return Reading(statistics.median(account.periods), statistics.median(bare.periods), extra)


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"median {middle:.4g} s, {low:.4g} to {high:.4g} s over {len(seconds)} rounds"
