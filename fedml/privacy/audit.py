"""How private a mechanism turns out to be: what an attacker can prove from canaries' scores.

A canary is a row that was trained on, or not, by the toss of a coin; its score is what the
attacker sees of it. A mechanism that is (epsilon, delta)-private lets nobody tell the coins far
better than chance, so whoever does has shown epsilon to be larger. Bounds are proofs, up to their
confidence; the estimate proves nothing, and is near the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

from fedml.errors import ConfigError
from fedml.privacy.accounting import SampledGaussian, epsilon

_GUESSES = (10, 20, 40, 80, 160, 320, 640)  # of each kind, which the distribution-free bound tries
_MOST = 40.0  # the largest epsilon that is told from infinity
_SURE = 0.999  # of the pooled bound, so that a sound engine is not blamed by chance
_DEVIATIONS = 4.0  # by which an estimate is above the claim when it is no accident
_STRAY = 5.0  # deviations by which canaries that were not there are off 0 when it is no accident
_FEWEST = 40  # canaries


@dataclass(frozen=True)
class Scores:
    """One score for each canary, larger if it seems to have been trained on, and the truth.

    That of a canary that was not is noise around 0; only the estimate relies on it.
    """

    values: NDArray[np.float64]
    included: NDArray[np.bool_]

    def __post_init__(self) -> None:
        kinds = int(self.included.sum()), int((~self.included).sum())
        if len(self.values) != len(self.included) or min(kinds) < _FEWEST // 4:
            raise ConfigError(
                f"{len(self.values)} scores of {kinds[0]} canaries trained on and {kinds[1]} not: "
                f"an audit takes {_FEWEST} canaries or more, about half of each kind"
            )
        if not np.isfinite(self.values).all():
            raise ConfigError("a canary's score is not finite; lower the learning rate")


@dataclass(frozen=True)
class Verdict:
    """What an audit found of the `claimed` epsilon; `broken` says how it is refuted, or "".

    `distribution_free` is the largest of the runs' bounds; `gaussian` and `estimate` are of all
    their canaries together.
    """

    claimed: float
    distribution_free: float
    gaussian: float
    estimate: float
    broken: str


def distribution_free_bound(scores: Scores, delta: float, confidence: float = 0.95) -> float:
    """Return the epsilon that one run's scores prove, whatever the mechanism.

    The canaries of the highest scores are guessed in, those of the lowest out. No more than
    about ln(canaries / 3) can be shown. Source: Steinke, Nasr & Jagielski 2023, arXiv:2305.08846,
    theorem 5.2, at several numbers of guesses, with a union bound over them.
    """
    order, canaries = np.argsort(-scores.values), len(scores.values)
    tried = [kind for kind in _GUESSES if 2 * kind <= canaries]
    best = 0.0
    for kind in tried:
        first, last = order[:kind], order[-kind:]
        right = int(scores.included[first].sum() + (~scores.included[last]).sum())
        best = max(best, _least_epsilon(2 * kind, right, canaries * delta, confidence, len(tried)))
    return best


def _least_epsilon(guesses: int, right: int, delta: float, confidence: float, tried: int) -> float:
    """Return the largest epsilon under which so many right guesses are too much of a chance."""

    def excess(candidate: float) -> float:
        chance = 1 / (1 + math.exp(-candidate))
        below = binom.pmf(np.arange(right - 1, -1, -1), guesses, chance)
        means = np.cumsum(below) / np.arange(1, right + 1)
        failing = 2 * delta * float(means.max(initial=0.0))
        tail = float(binom.sf(right - 1, guesses, chance))
        return tail + failing - (1 - confidence) / tried

    if excess(0.0) >= 0:
        return 0.0
    return _MOST if excess(_MOST) < 0 else float(brentq(excess, 0.0, _MOST, xtol=1e-3))


def gaussian_bound(scores: Scores, delta: float, confidence: float = 0.95) -> float:
    """Return the epsilon that the scores prove, if each is an independent draw.

    They are where every canary moves a coordinate of its own and every row joins every step. A
    threshold is chosen on every other canary, and its two error rates are bounded on the rest
    (Clopper-Pearson); then the other way round, for a choice may be unlucky, with a union bound
    over the two. Source: Nasr et al. 2023, arXiv:2302.07956, section 4.
    """
    values, included = scores.values, scores.included
    even = np.arange(len(values)) % 2 == 0
    sure = (1 + confidence) / 2

    def mu(part: NDArray[np.bool_], threshold: float) -> float:
        hits, alarms = values[part & included] < threshold, values[part & ~included] >= threshold
        missed = _most_likely(int(hits.sum()), len(hits), sure)
        false = _most_likely(int(alarms.sum()), len(alarms), sure)
        return float(-norm.ppf(false) - norm.ppf(missed))

    def proven(chosen: NDArray[np.bool_]) -> float:
        spread = np.quantile(values[chosen], np.linspace(0.01, 0.99, 99))
        return mu(~chosen, max(spread, key=lambda t: mu(chosen, t)))

    return _epsilon(max(proven(even), proven(~even)), delta)


def _most_likely(events: int, trials: int, confidence: float) -> float:
    """Return the Clopper-Pearson upper bound of a rate, at half of what may go wrong."""
    if events >= trials:
        return 1.0
    return float(beta.ppf(1 - (1 - confidence) / 2, events + 1, trials - events))


def estimate(scores: Scores, delta: float) -> float:
    """Return the epsilon of the Gaussian mechanism whose scores would look like these.

    Source: Andrew et al. 2023, arXiv:2302.03098, algorithm 1, where too the scores of canaries
    that were not trained on have a known mean. The deviation is not taken from what is claimed,
    or less noise would not be seen.
    """
    return _epsilon(_shift(scores), delta)


def _shift(scores: Scores) -> float:
    """Return how many standard deviations training on a canary moves its score: most likely so.

    The mean of the others says nothing of it but noise, for it is known to be 0. The difference
    of the two means would have twice the variance.
    """
    inside = scores.values[scores.included]
    shift = float(inside.mean())
    square = float(np.square(scores.values - shift * scores.included).sum())
    deviation = math.sqrt(square / (len(scores.values) - 1))
    return shift / deviation if deviation > 1e-9 * abs(shift) else math.inf


def _epsilon(mu: float, delta: float) -> float:
    if mu <= 0:
        return 0.0
    return math.inf if mu > _MOST else epsilon([SampledGaussian(1.0, 1 / mu, 1)], delta)


def judge(runs: Sequence[Scores], claimed: float, delta: float) -> Verdict:
    """Return the verdict on `claimed`, given the scores of independent runs of one mechanism.

    A sound engine is blamed by the pooled bound or by the estimate in less than one audit of
    a thousand; the distribution-free bound stays far below the claim of a Gaussian mechanism.
    """
    pooled = Scores(
        np.concatenate([run.values for run in runs]), np.concatenate([run.included for run in runs])
    )
    free = max(distribution_free_bound(run, delta) for run in runs)
    gaussian, seen = gaussian_bound(pooled, delta, _SURE), estimate(pooled, delta)
    return Verdict(
        claimed, free, gaussian, seen, _refutation(pooled, claimed, delta, free, gaussian)
    )


def _refutation(pooled: Scores, claimed: float, delta: float, free: float, gaussian: float) -> str:
    worst = max(free, gaussian)
    if worst > claimed:
        return f"an attacker proves epsilon {worst:.2f}, above the {claimed:g} that is claimed"
    outside = pooled.values[~pooled.included]
    middle = float(outside.mean())
    if abs(middle) * math.sqrt(len(outside)) > _STRAY * float(outside.std()):
        return f"canaries not trained on score {middle:.3g} on average, where noise alone gives 0"
    mu, canaries = _shift(pooled), len(pooled.values)
    error = math.sqrt((2 + mu * mu / 2) / canaries)  # of mu, from a mean of half and a deviation
    if _epsilon(mu - _DEVIATIONS * error, delta) > claimed:
        return (
            f"epsilon is about {_epsilon(mu, delta):.2f}, which {canaries} canaries tell from the "
            f"{claimed:g} that is claimed"
        )
    return ""
