from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError, Corrupt, Refused
from fedml.privacy import accounting
from fedml.privacy.accounting import Event, Pure, SampledGaussian
from fedml.protocol.messages import Privacy, Training

DELTA = 1e-5
ASKED = Privacy("record", epsilon=3.0, delta=DELTA, rounds=20)

events = st.one_of(
    st.builds(
        SampledGaussian,
        sampling=st.floats(0.001, 1.0),
        noise=st.floats(0.5, 50.0),
        steps=st.integers(1, 10_000),
    ),
    st.builds(Pure, epsilon=st.floats(0.001, 5.0), releases=st.integers(1, 100)),
)


@pytest.mark.parametrize(
    ("event", "published"),
    [
        (SampledGaussian(1 / 3, 3.0, 60), 3.974),
        (SampledGaussian(1 / 64, 1.0, 3000), 5.285),
        (SampledGaussian(0.01, 0.5, 2000), 18.11),
        (SampledGaussian(1.0, 10.0, 50), 2.943),
        (SampledGaussian(1.0, 20.0, 100), 1.993),
        (SampledGaussian(0.1, 2.0, 500), 5.556),
    ],
)
def test_epsilon_is_the_privacy_loss_distributions_within_one_percent(
    event: SampledGaussian, published: float
) -> None:
    """Renyi accounting is 8-19 % above these, the Gaussian approximation up to 9 % below."""
    assert accounting.epsilon([event], DELTA) == pytest.approx(published, rel=0.01)


def test_rounds_one_by_one_cost_what_they_cost_together() -> None:
    """A fresh accountant for each round would claim 2.87 here; the truth is about 7.06."""
    round_ = SampledGaussian(0.1, 1.0, 10)
    apart = accounting.epsilon([round_] * 10, DELTA)
    assert apart == accounting.epsilon([SampledGaussian(0.1, 1.0, 100)], DELTA)
    assert apart > 2 * accounting.epsilon([round_], DELTA)


def test_no_events_cost_nothing_and_more_events_cost_more() -> None:
    few: list[Event] = [SampledGaussian(0.2, 2.0, 10), Pure(0.1)]
    assert accounting.epsilon([], DELTA) == 0.0
    assert accounting.epsilon([*few, Pure(0.1)], DELTA) > accounting.epsilon(few, DELTA)
    assert accounting.epsilon(few, DELTA) == accounting.epsilon(few[::-1], DELTA)


def test_a_pure_release_costs_its_epsilon_and_many_compose_below_their_sum() -> None:
    assert accounting.epsilon([Pure(0.5)], DELTA) == 0.5
    assert accounting.epsilon([Pure(0.1, 200)], DELTA) < 20 / 2


@given(events)
@settings(max_examples=50, deadline=None)
def test_an_event_survives_its_record(event: Event) -> None:
    record = json.loads(json.dumps(accounting.to_record(event)))
    assert accounting.from_record(record) == event


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"event": "pickle"},
        {"event": "pure"},
        {"event": "pure", "epsilon": -1.0, "releases": 1},
        {"event": "sampled-gaussian", "sampling": "1", "noise": 1.0, "steps": 1},
    ],
)
def test_a_record_we_never_wrote_is_corrupt(record: dict[str, object]) -> None:
    with pytest.raises(Corrupt, match="privacy event"):
        accounting.from_record(record)


@pytest.mark.parametrize("batch_size", [0, 16])
def test_the_rounds_of_a_run_cost_the_epsilon_asked_and_no_more(batch_size: int) -> None:
    training = Training(lr=1.0, steps=5, batch_size=batch_size)
    event = accounting.training_event(training, ASKED, public_rows=128)
    assert event.sampling == (0.125 if batch_size else 1.0)
    total = accounting.epsilon([event] * 20, DELTA)
    assert 2.99 < total <= 3.0
    assert accounting.epsilon([event] * 21, DELTA) > 3.0


def test_a_batch_larger_than_the_dataset_takes_all_rows() -> None:
    training = Training(lr=1.0, steps=1, batch_size=500)
    assert accounting.training_event(training, ASKED, public_rows=100).sampling == 1.0


def test_an_epsilon_that_no_noise_gives_is_refused_in_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"epsilon 1e-06 .* raise epsilon or lower rounds"):
        accounting.noise_multiplier(Privacy("record", 1e-6, 1e-9, rounds=1000), 0.5, 100)


def test_a_plan_too_large_to_account_for_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="plan at most 1000000"):
        accounting.noise_multiplier(Privacy("record", 3.0, DELTA, rounds=10_000), 0.5, 1000)
    with pytest.raises(ConfigError, match="is no privacy"):
        accounting.noise_multiplier(Privacy("record", 1e9, DELTA), 0.5, 10)


def test_a_generous_epsilon_still_gets_some_noise() -> None:
    noise = accounting.noise_multiplier(Privacy("record", 900.0, DELTA), 1.0, 1)
    assert noise == accounting.LEAST_NOISE


def test_training_without_a_record_guarantee_or_by_epochs_has_no_event() -> None:
    with pytest.raises(ConfigError, match="no cost to account"):
        accounting.training_event(Training(lr=1.0, steps=1), Privacy(), 10)
    with pytest.raises(ConfigError, match=r"set training\.steps"):
        accounting.training_event(Training(lr=1.0, epochs=1), ASKED, 10)
    with pytest.raises(ConfigError, match="public rows 0"):
        accounting.training_event(Training(lr=1.0, steps=1), ASKED, 0)


def test_an_evaluation_costs_what_the_run_sets_aside_for_it() -> None:
    asked = Privacy("record", 3.0, DELTA, evaluation_epsilon=0.25)
    assert accounting.evaluation_event(asked) == Pure(0.25, 1)
    with pytest.raises(Refused, match=r"set privacy\.evaluation_epsilon"):
        accounting.evaluation_event(ASKED)


def test_neither_accounting_nor_the_ledger_nor_the_list_of_recipes_loads_torch() -> None:
    code = (
        "import sys, fedml.privacy.accounting as a, fedml.privacy.ledger, fedml.learning.recipe\n"
        "a.epsilon([a.SampledGaussian(.5, 1., 2)], 1e-5); fedml.learning.recipe.installed()\n"
        "assert not {'torch', 'opacus'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
