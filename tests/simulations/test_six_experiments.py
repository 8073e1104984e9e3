"""Experiments start from their configuration, and say in one line what they lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedml.cli.compose import simulate
from fedml.errors import ConfigError
from tests.simulations.files import FOLDER, real

EXPERIMENTS = {  # a file that each needs, and settings for a round of some seconds
    "german_credit": ("german_credit/german.data", ["rounds=2"]),
    "adult": ("adult/adult.test", ["rounds=1", "training.batch_size=256"]),
    "anomaly": (None, ["rounds=2"]),
    "mnist_1000": (
        "mnist/t10k-labels-idx1-ubyte.gz",
        ["rounds=2", "training.epochs=2", "evaluation.every=1", "world.stragglers.share=0"],
    ),
    "shakespeare": (
        "tinyshakespeare/input.txt",
        ["rounds=1", "training.steps=2", "population.least=5000", "cohort.size=2"],
    ),
    "mnist_cnn": (
        "mnist/train-labels-idx1-ubyte.gz",
        ["rounds=1", "training.epochs=0", "training.steps=2", "cohort.size=2",
         "evaluation.every=0", "evaluation.at_end=false"],
    ),
}  # fmt: skip
NEED = {name: place for name, (place, _) in EXPERIMENTS.items() if place}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_an_experiment_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, settings = EXPERIMENTS[name]
    if place:
        real(monkeypatch, place)
    monkeypatch.chdir(tmp_path)
    assert simulate([f"experiment={name}", *settings, "hydra.run.dir=out"]) == 0
    summary = json.loads(Path("out", "summary.json").read_text())
    assert summary["state"] == "done"
    assert summary["rounds"] == int(settings[0].removeprefix("rounds="))
    if name != "mnist_cnn":
        assert all(0 <= score <= 1 for score in summary["scores"].values())


@pytest.mark.parametrize("name", sorted(NEED))
def test_a_file_that_is_another_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real(monkeypatch, NEED[name])
    place = Path(NEED[name])
    shutil.copytree(FOLDER / place.parent, tmp_path / place.parent)
    wrong = tmp_path / place
    wrong.chmod(0o644)
    wrong.write_bytes(b"not what it was")
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"{place.name}.*(SHA-256 is|no gzip file)") as caught:
        simulate([f"experiment={name}", "hydra.run.dir=out"])
    assert "\n" not in str(caught.value) and "unset FEDML_DATA" in str(caught.value)


@pytest.mark.parametrize("name", sorted(NEED))
def test_a_file_that_cannot_be_had_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"is not in .*cannot be fetched .*set FEDML_DATA"
    ) as caught:
        simulate([f"experiment={name}", "hydra.run.dir=out"])
    assert "\n" not in str(caught.value)
