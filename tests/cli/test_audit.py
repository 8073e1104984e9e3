"""`fedml privacy audit`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedml.cli.main import app
from fedml.errors import ConfigError, FedmlError
from tests.attacks.sabotage import scale

torch.set_num_threads(1)

SMALL = ("privacy", "audit", "--canaries", "600", "--sites", "2", "--rounds", "2", "--seeds", "2")


def test_a_claim_that_stands_is_shown_seed_by_seed() -> None:
    done = CliRunner().invoke(app, [*SMALL, "--epsilon", "2"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == ["seed", "proven,", "any", "mechanism", "proven,", "Gaussian",
                                "estimate"]  # fmt: skip
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "all 1200 canaries" in lines[3] and "claimed 2 (delta 1e-05, one row" in lines[3]
    assert lines[-1] == "the claim stands"


def test_a_claim_that_is_refuted_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    scale(monkeypatch, noise=0.0)
    done = CliRunner().invoke(app, [*SMALL])
    assert done.exit_code == 1
    assert "error: the claim is refuted: an attacker proves epsilon" in done.output
    told = CliRunner().invoke(app, [*SMALL, "--json"])
    assert told.exit_code == 1
    assert json.loads(told.output.splitlines()[0])["distribution_free"] > 3


def test_a_recipe_of_your_own_is_audited(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\n"
        "from fedml.recipes.breast_cancer import BreastCancer\n\n"
        "class Mine(BreastCancer):\n"
        "    def build(self):\n"
        "        return torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.Tanh(),\n"
        "                                   torch.nn.Linear(8, 2))\n"
    )
    done = CliRunner().invoke(app, [*SMALL, "--recipe", "mine", "--file", f"{source}:Mine"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (("--seeds", "0"), "--seeds 0: give 1 to 1000"),
        (("--recipe", "none"), "no recipe 'none' here"),
        (("--canaries", "10"), "40 canaries or more"),
        (("--epsilon", "0"), "epsilon > 0"),
    ],
)
def test_senseless_options_are_refused_in_one_line(option: tuple[str, str], line: str) -> None:
    done = CliRunner().invoke(app, [*SMALL, *option])
    assert isinstance(done.exception, FedmlError)
    assert line in str(done.exception) and "\n" not in str(done.exception)
    assert isinstance(done.exception, ConfigError) or option[0] == "--recipe"
