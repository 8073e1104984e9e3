"""W1, an image model that keeps cores busy: beside a bare loop, and beside Flower and pfl-research.

The peers are the extra `peers`; without them their benchmarks are skipped. The same race takes
W2, a model so small that only what surrounds it costs.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from benchmarks.catalogue import Reading, Say, Skipped, benchmark
from benchmarks.race import Racer, start
from fedml.simulation.executors.machine import usable_cores

_PEERS = {"pfl_research": "pfl", "flower": "flwr"}  # racer: the package it needs
_GB = 1e9
_FIRST = "start + first round s"
_STARTS, _THOROUGH = 3, 5  # how often a start is timed, in races of so many rounds or more
_TURN = 10  # rounds in a row where one takes milliseconds, or all that is timed is the start of it


@benchmark("simulation/w1", "s")
def w1(quick: bool, say: Say) -> Reading:
    """Measure a round of W1 on one worker a core; the limit is a bare loop with as many."""
    with ExitStack() as stack:
        ours, limit = (_start(stack, name, "w1", say) for name in ("ours", "limit"))
        _alternate([ours, limit], 1 if quick else 12, say)
        return _reading(ours, limit, "limit")


@benchmark("simulation/w1_bf16", "s")
def w1_bf16(quick: bool, say: Say) -> Reading:
    """Measure a round of W1 in bf16; the limit is our own fp32. Accuracies are after 20 rounds."""
    with ExitStack() as stack:
        rough, exact = (
            _start(stack, "ours", "w1", say, precision) for precision in ("bf16", "fp32")
        )
        _alternate([rough, exact], 2 if quick else 19, say)  # and the first
        reading = _reading(rough, exact, "fp32")
        scores = {"accuracy": rough.score(), "accuracy of fp32": exact.score()}
        return Reading(reading.value, reading.limit, {**reading.extra, **scores})


@benchmark("simulation/w1_vs_pfl", "s")
def w1_vs_pfl(quick: bool, say: Say) -> Reading:
    """Measure a round of W1 beside pfl-research's."""
    return _versus("pfl_research", "w1", 2 if quick else 8, say)


@benchmark("simulation/w1_vs_flower", "s")
def w1_vs_flower(quick: bool, say: Say) -> Reading:
    """Measure a round of W1 beside Flower's."""
    return _versus("flower", "w1", 2 if quick else 5, say)


@benchmark("simulation/w1_bf16_vs_pfl", "s")
def w1_bf16_vs_pfl(quick: bool, say: Say) -> Reading:
    """Measure a round of W1 in bf16 beside pfl-research's in fp32, and both accuracies."""
    return _versus("pfl_research", "w1", 2 if quick else 19, say, "bf16")


@benchmark("simulation/w2_vs_pfl", "s")
def w2_vs_pfl(quick: bool, say: Say) -> Reading:
    """Measure a round of W2 beside pfl-research's."""
    return _versus("pfl_research", "w2", 10 if quick else 100, say)


@benchmark("simulation/w2_vs_flower", "s")
def w2_vs_flower(quick: bool, say: Say) -> Reading:
    """Measure a round of W2 beside Flower's."""
    return _versus("flower", "w2", 2 if quick else 2 * _TURN, say)


def _versus(peer: str, workload: str, rounds: int, say: Say, precision: str = "fp32") -> Reading:
    package = _PEERS[peer]
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is missing: pip install 'fedml-consortium[peers]'")
    turn = min(_TURN, rounds) if workload == "w2" else 1
    firsts: dict[str, list[float]] = {"ours": [], peer: []}
    for again in range(1 if rounds < _THOROUGH else _STARTS):
        with ExitStack() as stack:
            ours = _start(stack, "ours", workload, say, precision)
            theirs = _start(stack, peer, workload, say)
            for racer in (ours, theirs):
                firsts[racer.name].append(racer.first)
            if again == 0:
                _alternate([ours, theirs], rounds, say, turn)
                raced = ours, theirs
                scores = {"accuracy": ours.score(), f"accuracy of {package}": theirs.score()}
    reading = _reading(*raced, package)
    starts = {name: statistics.median(times) for name, times in firsts.items()}
    told = {_FIRST: starts["ours"], f"{_FIRST} of {package}": starts[peer]}
    return Reading(reading.value, reading.limit, {**reading.extra, **told, **scores})


def _start(stack: ExitStack, name: str, workload: str, say: Say, precision: str = "fp32") -> Racer:
    # W2 is one process's work for pfl: four are slower
    workers = 1 if workload == "w2" and name == "pfl_research" else usable_cores()
    racer = start(stack, name, workload, workers, precision)
    say(f"  {name} {precision}: start and first round {racer.first:.2f} s")
    return racer


def _alternate(racers: Sequence[Racer], rounds: int, say: Say, turn: int = 1) -> None:
    """Let racers do `rounds` in turns of `turn`, and every second time in the other order."""
    for number in range(rounds // turn):
        for racer in racers[:: 1 if number % 2 else -1]:
            racer.rounds(turn)
    for racer in racers:
        low, middle = min(racer.seconds), statistics.median(racer.seconds)
        say(f"  {racer.name}: median {middle:.4g} s, least {low:.4g} s over {rounds} rounds")


def _reading(ours: Racer, other: Racer, name: str) -> Reading:
    """Return median seconds a round, and beside them what else is worth comparing."""

    def both(title: str, of: Callable[[Racer], float]) -> dict[str, float]:
        return {title: of(ours), f"{title} of {name}": of(other)}

    return Reading(
        statistics.median(ours.seconds),
        statistics.median(other.seconds),
        {
            **both("least s", lambda racer: min(racer.seconds)),
            **both("CPU s", lambda racer: statistics.median(racer.cpu)),
            **both(_FIRST, lambda racer: racer.first),
            **both("GB", lambda racer: racer.peak / _GB),
        },
    )
