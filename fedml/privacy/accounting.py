"""What a release costs in privacy: events, whose meaning never changes, and their epsilon.

A site's ledger stores events, not epsilons, so that a better accountant may re-read the past.
Neighbours differ by one unit, added or removed (`ADJACENCY`). Epsilon is an upper bound by privacy
loss distributions (Koskela et al. 2020, arXiv:1906.03049, as in Google's dp_accounting), for events
that were fixed ahead, as a run's plan fixes them; `renyi` has the filter for those that were not.

No torch here: the site's daemon imports this module.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fedml.durable import Record
from fedml.errors import ConfigError, Corrupt, Refused
from fedml.protocol.messages import Privacy, PrivacyMode, Training

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Unit = Literal["record", "patient", "site"]  # whom epsilon is about
ADJACENCY = "add/remove one"  # of the unit; replacing one costs up to twice as much
GRID = 1e-3  # step of the privacy loss grid; losses are rounded so that epsilon is never too low
LEAST_NOISE, MOST_NOISE, MOST_EPSILON = 0.3, 1e6, 1000.0  # what calibration will consider
MOST_STEPS = 10**6  # of a whole run; calibrating that takes seconds
PLANNED = 0.95  # of delta, for what a plan fixes ahead; the rest is for what is asked beside it


@dataclass(frozen=True)
class SampledGaussian:
    """`steps` noisy sums: each row joins with probability `sampling`, clipped to norm 1.

    `noise` is the standard deviation of the Gaussian noise on each sum, in units of the clip.
    """

    sampling: float
    noise: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling <= 1 and 0 < self.noise < math.inf and self.steps >= 1):
            raise ConfigError(
                f"sampling {self.sampling}, noise {self.noise}, steps {self.steps}: "
                "0 < sampling <= 1, noise > 0, steps >= 1"
            )


@dataclass(frozen=True)
class Pure:
    """`releases` answers, each of them `epsilon`-differentially private with delta 0."""

    epsilon: float
    releases: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and self.releases >= 1):
            raise ConfigError(
                f"epsilon {self.epsilon}, releases {self.releases}: epsilon > 0, releases >= 1"
            )


Event = SampledGaussian | Pure


def to_record(event: Event) -> Record:
    """Return `event` as a JSON object that `from_record` reads back, for ever."""
    match event:
        case SampledGaussian(sampling, noise, steps):
            name = "sampled-gaussian"
            return {"event": name, "sampling": sampling, "noise": noise, "steps": steps}
        case Pure(epsilon, releases):
            return {"event": "pure", "epsilon": epsilon, "releases": releases}


def from_record(record: Mapping[str, object]) -> Event:
    """Return the event of a record; raises `Corrupt` if it is none that we ever wrote."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    try:
        match record.get("event"):
            case "sampled-gaussian":
                steps = int(numbers["steps"])
                return SampledGaussian(float(numbers["sampling"]), float(numbers["noise"]), steps)
            case "pure":
                return Pure(float(numbers["epsilon"]), int(numbers["releases"]))
            case other:
                raise Corrupt(f"privacy event {other!r}: use a newer fedml, or restore a backup")
    except (KeyError, ConfigError) as error:
        raise Corrupt(f"privacy event {dict(record)}: {error}") from error


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Return the epsilon, at `delta`, of all `events` together; 0 of none.

    The order of events does not matter, and equal ones merge, so asking again is cheap.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta}: must lie between 0 and 1")
    return _epsilon(*_merge(events), delta)


def noise_multiplier(privacy: Privacy, sampling: float, steps: int) -> float:
    """Return the least noise with which all rounds cost at most `privacy.epsilon`.

    `steps` are those of one round; `privacy.rounds` says how many rounds there are. They cost
    that at `PLANNED` of the delta, as a site's ledger counts it (see `renyi`), so a run planned
    for a whole budget fits it. Never below `LEAST_NOISE`, however large the epsilon. Raises
    `ConfigError` if no noise suffices.
    """
    delta = PLANNED * privacy.delta
    return _calibrate(privacy.epsilon, delta, sampling, steps * privacy.rounds)


def training_event(training: Training, privacy: Privacy, public_rows: int) -> SampledGaussian:
    """Return what one round of private training costs the unit at a site of `public_rows` rows.

    Public, because sampling and noise may not depend on the number of rows there really are. In
    mode "patient" a row is a patient, here and in the event.
    In mode `record_distributed` it is what the sum of all sites' updates costs. That is known to
    each site only if all of them take all their rows, in one step: then all add the same noise.
    """
    if unit_of(privacy.mode) == "site":  # each site takes part in the sum, and all know it
        return SampledGaussian(1.0, noise_multiplier(privacy, 1.0, 1), 1)
    if privacy.mode == "none":
        raise ConfigError(f"privacy.mode {privacy.mode!r} has no cost to account; use 'record'")
    if privacy.mode == "record_distributed" and (training.batch_size or training.steps != 1):
        raise ConfigError(
            f"training.steps {training.steps}, batch_size {training.batch_size} in mode "
            "record_distributed: each step is a round over all rows, set steps=1 and batch_size=0"
        )
    if training.steps < 1:
        raise ConfigError(
            f"training.epochs {training.epochs} under privacy: set training.steps instead, "
            "for an epoch is as long as the private number of rows"
        )
    if public_rows < 1:
        raise ConfigError(f"public rows {public_rows}: a site declares at least 1")
    sampling = min(1.0, training.batch_size / public_rows) if training.batch_size else 1.0
    noise = noise_multiplier(privacy, sampling, training.steps)
    return SampledGaussian(sampling, noise, training.steps)


def own_share(event: SampledGaussian, privacy: Privacy) -> SampledGaussian:
    """Return `event` with the noise that one site adds to its own sum.

    All of it, or where sites share noise what makes it whole at `sharers` sites, for variances
    add up. Source: Kairouz, Liu & Steinke 2021, arXiv:2102.06387, section 4.
    """
    return replace(event, noise=event.noise / math.sqrt(max(1, privacy.sharers)))


def unit_of(mode: PrivacyMode) -> Unit:
    """Return whose presence a mode hides, and so which of a dataset's ledgers it is charged to."""
    units: dict[PrivacyMode, Unit] = {
        "site_central": "site",
        "site_distributed": "site",
        "patient": "patient",
    }
    return units.get(mode, "record")


def evaluation_event(privacy: Privacy) -> Pure:
    """Return what one evaluation costs a held-out row; raises `Refused` if none is allowed."""
    if unit_of(privacy.mode) == "site":
        raise Refused(f"scores are not noised under {privacy.mode}: set evaluation.at_end=false")
    if privacy.evaluation_epsilon == 0:
        raise Refused("no scores leave this site: set privacy.evaluation_epsilon above 0")
    return Pure(privacy.evaluation_epsilon, 1)


def _merge(events: Iterable[Event]) -> tuple[float, tuple[Event, ...]]:
    """Return the mu of all unsampled Gaussians as one of noise 1/mu, and the other events."""
    counts: Counter[tuple[float, float]] = Counter()  # a Pure's second number is 0
    for event in events:
        match event:
            case SampledGaussian(sampling, noise, steps):
                counts[sampling, noise] += steps
            case Pure(cost, releases):
                counts[cost, 0.0] += releases
    whole = [key for key in counts if key[0] == 1 and key[1] > 0]
    squared = math.fsum(counts.pop(key) / key[1] ** 2 for key in sorted(whole))
    return math.sqrt(squared), tuple(
        SampledGaussian(first, noise, count) if noise else Pure(first, count)
        for (first, noise), count in sorted(counts.items())
    )


@functools.lru_cache(maxsize=4096)
def _epsilon(mu: float, events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return _gaussian_epsilon(mu, delta)
    pure = [event for event in events if isinstance(event, Pure)]
    only_pure = mu == 0 and len(pure) == len(events)
    simple = math.fsum(e.epsilon * e.releases for e in pure) if only_pure else math.inf
    if only_pure and len(pure) == pure[0].releases == 1:
        return simple
    parts = [_losses(event) for event in events] + ([_gaussian_losses(mu)] if mu else [])
    total = functools.reduce(lambda a, b: a.compose(b), parts)
    return min(simple, float(total.get_epsilon_for_delta(delta)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon of a Gaussian mechanism with sensitivity over noise `mu`.

    Source: Balle & Wang 2018, arXiv:1805.06530, theorem 8.
    """
    from scipy.special import log_ndtr

    def excess(epsilon: float) -> float:
        """Return by how much delta is missed; falls as epsilon grows."""
        first, second = log_ndtr(mu / 2 - epsilon / mu), log_ndtr(-mu / 2 - epsilon / mu)
        return float(math.exp(first) * -math.expm1(min(0.0, epsilon + second - first))) - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))  # Renyi's bound
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _gaussian_losses(mu: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution  # slow to import

    return privacy_loss_distribution.from_gaussian_mechanism(
        1 / mu, value_discretization_interval=GRID
    )


@functools.lru_cache(maxsize=64)
def _losses(event: Event) -> PrivacyLossDistribution:
    from dp_accounting.pld import common, privacy_loss_distribution  # slow to import

    match event:
        case SampledGaussian(sampling, noise, steps):
            return privacy_loss_distribution.from_gaussian_mechanism(
                noise, sampling_prob=sampling, value_discretization_interval=GRID
            ).self_compose(steps)
        case Pure(cost, releases):
            return privacy_loss_distribution.from_privacy_parameters(
                common.DifferentialPrivacyParameters(cost, 0.0),
                value_discretization_interval=GRID,
            ).self_compose(releases)


@functools.lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sampling: float, steps: int) -> float:
    def cost(noise: float) -> float:
        return epsilon([SampledGaussian(sampling, noise, steps)], delta)

    if target > MOST_EPSILON:
        raise ConfigError(f"epsilon {target} is no privacy; ask for at most {MOST_EPSILON:.0f}")
    if steps > MOST_STEPS:  # a coordinator could keep a site's daemon computing for ever
        raise ConfigError(f"{steps} private steps in all; plan at most {MOST_STEPS}")
    high = math.sqrt(steps)  # from above, for the loss grid grows as epsilon does
    while _gaussian_epsilon(math.sqrt(steps) / high, delta) > target:
        high *= 2
        if high > MOST_NOISE:
            raise ConfigError(
                f"epsilon {target} at delta {delta}, sampling {sampling:.4g}, {steps} steps: no "
                f"noise up to {MOST_NOISE:.0f} suffices; raise epsilon or lower rounds and steps"
            )
    low = high / 2
    while cost(low) <= target:
        if low < LEAST_NOISE:
            return LEAST_NOISE
        low, high = low / 2, low
    while high / low > 1 + 1e-4:  # epsilon falls as noise grows
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return max(high, LEAST_NOISE)
