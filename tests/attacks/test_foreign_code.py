"""Neither a configuration nor a plan can make anybody run code that was not installed as ours."""

from __future__ import annotations

import json

import pytest

from fedml.cli.compose import compose_plan, simulate
from fedml.errors import ConfigError, FedmlError
from fedml.rounds import Plan
from tests.rounds.worlds import plan

FOREIGN = [
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "fedml.durable.os.remove",
    "fedml.params.torch.load",
    "fedml_evil.Strategy",
    "simulations_evil.Strategy",
    "fedml.",
    "fedml",
]


@pytest.mark.parametrize(
    ("place", "target"),
    [
        *(("strategy", target) for target in FOREIGN),
        *((place, "os.system") for place in ("privacy", "recipe", "population", "executor")),
    ],
)
def test_a_configuration_cannot_name_a_foreign_target(
    target: str, place: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(FedmlError):
        simulate([f"{place}._target_={target}"])
    if place in ("strategy", "privacy", "recipe"):  # a plan builds nothing else
        with pytest.raises(FedmlError):
            compose_plan("simulate", [f"{place}._target_={target}"])


def test_a_target_hidden_in_a_list_or_below_is_found(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    for hidden in (
        "gates=[{_target_: os.getcwd}]",
        "+strategy.reducer={_target_: os.getcwd}",
        "+population.extra=[[{_target_: os.getcwd}]]",
    ):
        with pytest.raises(ConfigError, match=r"only names below fedml\. or simul"):
            simulate([hidden])


@pytest.mark.parametrize(
    "strategy",
    [
        {"_target_": "os.system", "command": "true"},
        {"name": "os.system"},
        {"name": "fedavg", "_target_": "os.system"},
        {"name": "fedavg", "reducer": {"_target_": "os.system"}},
        {"name": "fedavg", "__class__": "os.system"},
        {"name": ["fedavg"]},
        "fedavg",
        None,
    ],
)
def test_a_plan_cannot_smuggle_in_a_class(strategy: object) -> None:
    raw = json.loads(plan().to_json())
    raw["strategy"] = strategy
    with pytest.raises(ConfigError):
        Plan.from_json(json.dumps(raw))
