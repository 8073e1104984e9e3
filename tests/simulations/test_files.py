"""Every experiment says in one line which file is wrong, or cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedml.cli.simulate import simulate
from fedml.errors import ConfigError
from tests.simulations.data import FOLDER, needs

NEEDS = {  # a file that an experiment needs; two come with scikit-learn, one is drawn
    "adult": "adult/adult.test",
    "german_credit": "german_credit/german.data",
    "heart_disease": "heart_disease_uci/processed.va.data",
    "mnist_1000": "mnist/t10k-labels-idx1-ubyte.gz",
    "mnist_2nn": "mnist/t10k-images-idx3-ubyte.gz",
    "mnist_cnn": "mnist/train-labels-idx1-ubyte.gz",
    "shakespeare": "tinyshakespeare/input.txt",
}


def needed(names: list[str]) -> list[object]:
    return [
        pytest.param(name, marks=[needs(NEEDS[name])] if name in NEEDS else []) for name in names
    ]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        simulate([f"experiment={name}", "tracking=none", "hydra.run.dir=out"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", needed(sorted(NEEDS)))
def test_a_file_that_is_another_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(NEEDS[name])
    wrong = tmp_path / place
    wrong.parent.mkdir()
    for file in (FOLDER / place.parent).iterdir():
        shutil.copyfile(file, wrong.with_name(file.name))
    wrong.write_bytes(b"not what it was")
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))
    told = refusal(name)
    assert str(wrong) in told and "unset FEDML_DATA" in told
    assert "SHA-256 is" in told or "no gzip file" in told


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_file_that_cannot_be_had_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    told = refusal(name)
    assert "cannot be fetched" in told and "set FEDML_DATA to a folder that has it" in told
