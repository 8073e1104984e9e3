"""`fedml site allow`: a dataset and its mode come into the policy, or one line says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedml.cli.main import app
from fedml.errors import ConfigError
from fedml.site.policy import TEMPLATE, Dataset, read_policy


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "policy.toml").write_text(TEMPLATE)
    return tmp_path


def allow(site: Path, *more: str) -> str:
    fixed = ("--recipe", "breast_cancer", "--train", "train.csv", "--rows", "100")
    command = ["site", "allow", str(site), "--dataset", "rows", *fixed, *more]
    done = CliRunner().invoke(app, command)
    if isinstance(done.exception, ConfigError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def allowed(site: Path) -> Dataset:
    return read_policy(site / "policy.toml").datasets["rows"]


@pytest.mark.parametrize(
    ("words", "mode", "epsilon", "site_epsilon"),
    [
        ("--epsilon 3", "record", 3.0, 0.0),
        ("--epsilon 3 --patients 40", "patient", 3.0, 0.0),
        ("--epsilon 3 --privacy record_distributed", "record_distributed", 3.0, 0.0),
        ("--site-epsilon 2 --privacy site_distributed", "site_distributed", 0.0, 2.0),
        ("--site-epsilon 2 --privacy site_central", "site_central", 0.0, 2.0),
        ("--privacy none", "none", 0.0, 0.0),
    ],
)
def test_each_mode_comes_into_the_policy(
    site: Path, words: str, mode: str, epsilon: float, site_epsilon: float
) -> None:
    said = allow(site, *words.split())
    found = allowed(site)
    assert (found.privacy, found.epsilon, found.site_epsilon) == (mode, epsilon, site_epsilon)
    assert f"in mode {mode}: " in said


def test_a_cap_for_one_run_comes_into_the_policy(site: Path) -> None:
    allow(site, "--epsilon", "3", "--run-epsilon", "1")
    assert allowed(site).run_epsilon == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "epsilon 0.0: privacy 'record' needs a budget"),
        ("--epsilon 3 --privacy site_central", "site_epsilon 0.0: privacy 'site_central' needs"),
        ("--epsilon 3 --privacy patient", "needs `patients`"),
        ("--epsilon 3 --run-epsilon 0", "run_epsilon 0.0: a cap is above 0"),
    ],
)
def test_what_would_be_odd_is_one_line_and_leaves_the_policy_alone(
    site: Path, words: str, message: str
) -> None:
    before = (site / "policy.toml").read_bytes()
    with pytest.raises(ConfigError, match=message):
        allow(site, *words.split())
    assert (site / "policy.toml").read_bytes() == before
