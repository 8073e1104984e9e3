"""What a run will cost is what the ledger will say that it cost."""

from __future__ import annotations

import pytest

from fedml.privacy import accounting
from fedml.privacy.forecast import course, forecast
from fedml.protocol.messages import Privacy, Training

TRAINING = Training(lr=1.0, steps=10, batch_size=50)
ASKED = Privacy("record", 3.0, 1e-5, rounds=20)


def test_a_forecast_is_what_the_rounds_will_be_charged() -> None:
    made = forecast(TRAINING, ASKED, 500)
    event = accounting.training_event(TRAINING, ASKED, 500)
    assert (made.sampling, made.noise, made.steps) == (0.1, event.noise, 200)
    assert made.epsilon == accounting.epsilon([event] * 20, 1e-5)
    assert made.epsilon <= 3.0 < made.filtered
    assert made.blur == pytest.approx(event.noise / 50)
    assert made.adjacency == "add/remove one"


def test_the_course_grows_to_the_whole_cost() -> None:
    made = forecast(TRAINING, ASKED, 500)
    points = list(course(made, 5))
    assert [round_ for round_, _, _ in points] == [4, 8, 12, 16, 20]
    assert points[-1][1:] == (made.epsilon, made.filtered)
    assert points == sorted(points, key=lambda point: point[1])
    assert [r for r, _, _ in course(made, 50)] == list(range(1, 21))
