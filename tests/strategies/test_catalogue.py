"""A strategy travels by name and settings; whatever is not in the table is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fedml.errors import ConfigError
from fedml.strategies import FedAdam, FedAvg, FedProx, build, describe


def test_every_setting_is_written_out() -> None:
    assert describe(FedProx(mu=0.5)) == {
        "name": "fedprox",
        "mu": 0.5,
        "server_lr": 1.0,
        "reducer": {"name": "weighted-mean"},
    }


def test_settings_left_out_take_their_defaults() -> None:
    assert build({"name": "fedadam", "tau": 0.1}) == FedAdam(tau=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fedsgd"}, "'fedsgd' is not installed; there are cyclic, ditto"),
        ({}, "needs a name; there are"),
        ({"_target_": "os.system"}, "needs a name"),
        ({"name": "os.system", "command": "true"}, "'os.system' is not installed"),
        ({"name": "fedprox", "nu": 1.0}, "fedprox.nu is unknown; there are mu, server_lr"),
        ({"name": "fedprox", "mu": "1"}, "fedprox.mu '1': must be a number"),
        ({"name": "fedprox", "mu": True}, "fedprox.mu True: must be a number"),
        ({"name": "fedprox", "mu": -1}, r"fedprox.mu -1.0: must be 0 or more"),
        ({"name": "fedavg", "reducer": {"name": "eval"}}, "reducer 'eval' is not installed"),
        ({"name": "fedavg", "reducer": "mean"}, "reducer 'mean': needs a name"),
    ],
)
def test_what_is_not_in_the_table_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings)


@dataclass(frozen=True)
class Theirs(FedAvg):
    """A strategy of another package."""


def test_a_strategy_that_is_not_installed_cannot_be_described() -> None:
    with pytest.raises(ConfigError, match="Theirs is not installed"):
        describe(Theirs())
