"""A site's worker under privacy by patient: it reads both files, and keeps a patient in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from fedml import durable
from fedml.errors import ConfigError
from fedml.learning.recipe import identify, load
from fedml.params import Params, encode
from fedml.protocol import codec
from fedml.protocol.messages import Privacy, Training
from fedml.site.worker import _do, _work
from tests.site.wire import ORDER

Kind = Literal["train", "evaluate"]
RECIPE = """
from pathlib import Path

import torch
from torch import nn
from fedml.learning.recipe import Rows

class Wards:
    labels = ("well", "ill")

    def build(self):
        return nn.Linear(2, 2)

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target)

    def score(self, output, target):
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path):
        lines = Path(path).read_text().split()
        table = torch.tensor([[float(c) for c in line.split(",")] for line in lines])
        return Rows(table[:, 1:3], table[:, 3].long(), table[:, 0].long())

    def example(self, rows):
        return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
"""
LINES = [
    f"{patient},{patient % 3},{visit},{patient % 2}" for patient in range(9) for visit in (1, 2)
]


def job(
    folder: Path,
    train: list[str],
    held_out: list[str],
    kind: Kind = "train",
) -> dict[str, object]:
    recipe = folder / "wards.py"
    recipe.write_text(RECIPE)
    files = {"wards": f"{recipe}:Wards"}
    named = identify("wards", files)
    order = replace(
        ORDER,
        kind=kind,
        recipe=named,
        training=Training(lr=0.5, steps=2, batch_size=3),
        privacy=Privacy("patient", 3.0, 1e-5, evaluation_epsilon=1e5),
    )
    durable.replace(folder / "assignment", codec.encode(order))
    model = Params(load(named, files).build().state_dict())
    (folder / "model").write_bytes(b"".join(encode({"": model})))
    for name, lines in (("train", train), ("held_out", held_out)):
        (folder / name).write_text("\n".join(lines))
    return {
        "folder": str(folder),
        "site": "bern",
        "model": str(folder / "model"),
        "slots": str(folder / "slots"),
        "private": True,
        "rows": str(folder / ("train" if kind == "train" else "held_out")),
        "train": str(folder / "train"),
        "held_out": str(folder / "held_out"),
        "public_rows": 6,
        "device": "cpu",
        "threads": 1,
        "recipe_files": files,
    }


def test_a_task_by_patient_trains_and_tells_the_public_number_alone(tmp_path: Path) -> None:
    _work(job(tmp_path, LINES[:12], LINES[12:]), tmp_path)
    outcome = durable.read_json(tmp_path / "outcome.json")
    assert outcome["weight"] == 6.0 and {*outcome["metrics"]} == {"steps", "noise_multiplier"}
    assert (tmp_path / "update.safetensors").exists()


def test_scores_count_patients(tmp_path: Path) -> None:
    _work(job(tmp_path, LINES[:12], LINES[12:], "evaluate"), tmp_path)
    assert durable.read_json(tmp_path / "outcome.json")["count"] == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_patient_in_both_files_is_refused(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(ConfigError, match="1 patients have rows to train on and rows held out"):
        _work(job(tmp_path, LINES[:13], LINES[13:], kind), tmp_path)
    assert not (tmp_path / "outcome.json").exists()


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_file_that_is_not_there_is_told_and_a_row_that_does_not_read_is_not(
    tmp_path: Path, part: str
) -> None:
    lines = {"train": LINES[:12], "held_out": LINES[12:]}
    task = job(tmp_path, lines["train"], lines["held_out"])
    (tmp_path / part).write_text("1,0,secret,1")
    assert _do(task) == 1
    word = durable.read_json(tmp_path / "error.json")
    assert (word["told"], "secret" in word["error"]) == (False, True)
    (tmp_path / part).unlink()
    assert _do(task) == 1
    assert durable.read_json(tmp_path / "error.json") == {
        "error": f"{tmp_path / part}: No such file or directory; mend it, or the policy's path",
        "told": True,
    }
