from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer

from fedml.errors import ConfigError
from fedml.learning.evaluation import evaluate, mean_scores
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update
from fedml.recipes.breast_cancer import FEATURES, RANGES, BreastCancer
from fedml.recipes.partition import dirichlet_label_skew

torch.set_num_threads(1)

RECIPE = BreastCancer()
DATA = load_breast_cancer()


def write(path: Path, *, label: str = "malignant", rows: int = 569, order: int = 1) -> Path:
    header = [*FEATURES, label][::order]
    malignant = 1 - DATA.target
    labels = malignant if label == "malignant" else DATA.target
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(header)
        for x, y in list(zip(DATA.data, labels, strict=True))[:rows]:
            out.writerow([*map(float, x), int(y)][::order])
    return path


def test_features_and_ranges_are_those_that_scikit_learn_publishes() -> None:
    assert [name.replace(" ", "_") for name in DATA.feature_names] == list(FEATURES)
    table = DATA.DESCR.split("Min    Max")[1].splitlines()
    published = [line.split(":")[1].split() for line in table if ":  " in line][: len(FEATURES)]
    assert [(float(low), float(high)) for low, high in published] == list(RANGES.values())


def test_a_file_becomes_rows_whatever_its_columns_order_and_label(tmp_path: Path) -> None:
    rows = RECIPE.read(write(tmp_path / "a.csv"))
    assert torch.allclose(rows.x.double(), torch.tensor(DATA.data), rtol=1e-6)
    assert rows.y.tolist() == (1 - DATA.target).tolist()
    for label, order in (("target", 1), ("malignant", -1)):
        other = RECIPE.read(write(tmp_path / "b.csv", label=label, order=order))
        assert torch.equal(other.x, rows.x) and torch.equal(other.y, rows.y)


@pytest.mark.parametrize(
    ("find", "put", "line"),
    [
        ("mean_area", "area", r"no column mean_area; the header must name all 30"),
        ("malignant", "label", r"one column 'malignant' or 'target'"),
        ("17.99", "large", r"line 2: could not convert string to float: 'large'"),
        ("20.57", "", r"line 3: could not convert"),
        ("17.99", "nan", r"line 2: NaN or infinity"),
        (",1\r\n", ",2\r\n", r"line 2: label 2; it is 0 or 1"),
    ],
)
def test_a_bad_file_is_told_by_path_and_line(
    tmp_path: Path, find: str, put: str, line: str
) -> None:
    path = write(tmp_path / "ward.csv", rows=3)
    path.write_bytes(path.read_bytes().replace(find.encode(), put.encode(), 1))
    with pytest.raises(ConfigError, match=rf"ward\.csv.*{line}"):
        RECIPE.read(path)


def test_an_absent_an_empty_and_a_binary_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv: .*No such file"):
        RECIPE.read(tmp_path / "gone.csv")
    with pytest.raises(ConfigError, match="a header and no rows"):
        RECIPE.read(write(tmp_path / "none.csv", rows=0))
    (tmp_path / "void.csv").write_bytes(b"")
    with pytest.raises(ConfigError, match="no column mean_radius, mean_texture"):
        RECIPE.read(tmp_path / "void.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(ConfigError, match="is this the CSV file"):
        RECIPE.read(tmp_path / "binary.csv")


def test_scaling_keeps_within_bounds_whatever_it_is_given() -> None:
    scale = RECIPE.build()[0]  # type: ignore[index]
    scaled = scale(torch.tensor(DATA.data, dtype=torch.float32))
    assert float(scaled.min()) >= -1 and float(scaled.max()) <= 1
    wild = torch.cat([torch.full((1, 30), v) for v in (0.0, -5.0, 1e30)])
    assert torch.equal(scale(wild).abs(), torch.ones(3, 30))


def _held_out(sites: int, seed: int) -> tuple[list[Rows], list[Rows]]:
    rows = Rows(torch.tensor(DATA.data).float(), torch.tensor(1 - DATA.target))
    dealt = dirichlet_label_skew(np.asarray(rows.y), sites, 0.5, seed)
    pairs = [rows.take(torch.from_numpy(mine)).divide(0.25, seed=seed) for mine in dealt]
    return [trained for trained, _ in pairs], [held for _, held in pairs]


def _learn(sites: list[Rows], trainer: Trainer, rounds: int) -> Params:
    params = Params(RECIPE.build().state_dict())
    for round_ in range(1, rounds + 1):
        updates: list[Update] = []
        for number, rows in enumerate(sites):
            site = SiteId(f"site-{number}")
            task = Task(TaskId("t"), RunId("r"), round_, site, "train", Brief(params))
            updates.append(trainer.train(task, rows, {}, seed=0, public_rows=len(rows))[0])
        weight = math.fsum(update.weight for update in updates)
        for update in updates:
            params = params + update.delta * (update.weight / weight)
    return params


def _accuracy(params: Params, held: list[Rows]) -> float:
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "evaluate", Brief(params))
    return mean_scores([evaluate(RECIPE, task, rows, Privacy()) for rows in held])["accuracy"]


def test_four_skewed_sites_learn_together_under_privacy_what_none_learns_alone() -> None:
    """Epsilon 3 a site, over the whole run. Of 3000 noise draws the lowest accuracy was .960."""
    asked = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=20)
    trainer = Trainer(RECIPE, Training(lr=0.5, steps=5), asked)
    trained, held = _held_out(4, seed=596)
    assert [len(rows) for rows in trained] == [110, 111, 102, 97]
    together = _accuracy(_learn(trained, trainer, 20), held)
    alone = [_accuracy(_learn([rows], trainer, 20), held) for rows in trained]
    assert together >= 0.94
    assert together > max(alone)


def test_without_privacy_the_same_sites_do_as_well_as_published_baselines() -> None:
    trained, held = _held_out(4, seed=596)
    trainer = Trainer(RECIPE, Training(lr=0.5, steps=20), Privacy())
    assert _accuracy(_learn(trained, trainer, 20), held) >= 0.965
