"""What private training will cost, before anything runs: noise, steps, and epsilon by round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedml.privacy import accounting, renyi
from fedml.privacy.accounting import ADJACENCY, SampledGaussian, training_event
from fedml.protocol.messages import Privacy, Training


@dataclass(frozen=True)
class Forecast:
    """The cost of a run to each of a site's rows, at `delta`, for neighbours as `adjacency` says.

    `epsilon` is by privacy loss distributions, right for a run that is planned ahead; `filtered`
    is what a filter needs for the same events when nothing was (see `renyi`). `noise` is the
    standard deviation of each step's noise in units of the clip, `blur` that of the noise on the
    mean gradient, in the same units. `steps` are those of all `rounds` together.
    """

    rows: int
    rounds: int
    steps: int
    sampling: float
    noise: float
    blur: float
    asked: float
    delta: float
    epsilon: float
    filtered: float
    adjacency: str = ADJACENCY


def forecast(training: Training, privacy: Privacy, rows: int) -> Forecast:
    """Return what `training` under `privacy` costs a site that declares `rows` rows.

    Raises `ConfigError` as `training_event` does.
    """
    event = training_event(training, privacy, rows)
    whole = SampledGaussian(event.sampling, event.noise, event.steps * privacy.rounds)
    return Forecast(
        rows,
        privacy.rounds,
        whole.steps,
        event.sampling,
        event.noise,
        event.noise / (event.sampling * rows),
        privacy.epsilon,
        privacy.delta,
        accounting.epsilon([whole], privacy.delta),
        renyi.epsilon([whole], privacy.epsilon, privacy.delta),
    )


def course(made: Forecast, points: int = 50) -> Iterator[tuple[int, float, float]]:
    """Yield some rounds, the last among them, with the epsilon and the filtered one until then."""
    each = made.steps // made.rounds
    for round_ in sorted({-(-made.rounds * k // points) for k in range(1, points + 1)}):
        event = SampledGaussian(made.sampling, made.noise, each * round_)
        filtered = renyi.epsilon([event], made.asked, made.delta)
        yield round_, accounting.epsilon([event], made.delta), filtered
