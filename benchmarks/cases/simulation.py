"""Simulated rounds: W2, logistic regression at a crowd, and what becomes of it as the crowd grows.

W2's limit is a stacked loop that does the same arithmetic on the same rows and nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import torch

from benchmarks import convolution, logistic
from benchmarks.catalogue import Reading, Say, benchmark
from fedml.errors import TaskFailed

_PASSES = 5
_CROWDS = (10**3, 10**4, 10**5, 10**6)
_MOST_BYTES = 1.5e9


@benchmark("simulation/w2", "ms")
def w2(quick: bool, say: Say) -> Reading:
    """Measure the median of a round with 10,000 users, in the quietest of a few passes."""
    rounds, threads = 50 if quick else 300, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        logistic.play(10**4, 20)
        limits, ours = [], []
        for _ in range(1 if quick else _PASSES):
            limits.append(statistics.median(logistic.stacked_loop(10**4, rounds)))
            timing = logistic.play(10**4, rounds)
            ours.append(statistics.median(timing.rounds))
    finally:
        torch.set_num_threads(threads)
    say(f"  stacked loop: {_ms(limits)}")
    say(f"  rounds:       {_ms(ours)}; start and first round {timing.start * 1e3:.0f} ms")
    return Reading(min(ours) * 1e3, min(limits) * 1e3)


@benchmark("simulation/scale", "ms")
def scale(quick: bool, say: Say) -> Reading:
    """Measure W2's round with 10^3 to 10^6 users: the slowest crowd's, beside the fastest's.

    Each is the least of a few fresh processes' fastest tenth of rounds, which other work on the
    machine disturbs least. Raises `TaskFailed` if memory exceeds 1.5 GB.
    """
    rounds = 50 if quick else 300
    best = dict.fromkeys(_CROWDS, float("inf"))
    for _ in range(1 if quick else 3):
        for users in _CROWDS:
            seconds, peak = _alone(users, rounds)
            best[users] = min(best[users], seconds)
            say(f"  {users:>9,} users: {seconds * 1e3:.2f} ms a round, {peak / 1e6:.0f} MB at most")
            if peak > _MOST_BYTES:
                raise TaskFailed(f"{users} users took {peak / 1e9:.2f} GB; the bound is 1.5 GB")
    return Reading(max(best.values()) * 1e3, min(best.values()) * 1e3)


def _alone(users: int, rounds: int) -> tuple[float, float]:
    """Return the seconds that a tenth of the rounds stay below, and the peak memory."""
    command = [sys.executable, "-m", "benchmarks.logistic", str(users), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise TaskFailed(f"{users} users: {lines[-1] if lines else 'ended without a word'}")
    told = json.loads(done.stdout)
    return statistics.quantiles(told["rounds"], n=10)[0], float(told["peak"])


def _ms(seconds: list[float]) -> str:
    return f"medians {', '.join(f'{one * 1e3:.2f}' for one in seconds)} ms"


if torch.cuda.is_available():

    @benchmark("simulation/w1_cuda", "s")
    def w1_cuda(quick: bool, say: Say) -> Reading:
        """Measure a W1 round, all sites at once; the limit is a loop over sites on that GPU."""
        rounds = 3 if quick else 10
        loop, ours = convolution.measure("cuda", rounds)
        say(f"  {torch.cuda.get_device_name()}: loop {loop:.3g} s, at once {ours:.3g} s a round")
        return Reading(ours, loop)
