from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from fedml.recipes.heart_disease import CHOLESTEROL, FEATURES, SCALES, HeartDisease

RECIPE = HeartDisease()
FOLDER = Path(os.environ.get("FEDML_DATA", "../shared/data")) / "heart_disease_uci"
HOSPITALS = [
    ("cleveland", 303, 139),
    ("hungarian", 261, 98),
    ("switzerland", 46, 45),
    ("va", 130, 101),
]
LINES = (
    "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0\n"
    "67.0,1.0,4.0,160.0,0.0,0.0,0.0,108.0,1.0,1.5,2.0,?,?,2\n"
    "41,0,2,?,204,0,2,172,0,1.4,1,0,3,0\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "processed.ward.data"
    path.write_text(LINES)
    return path


def test_a_raw_file_becomes_thirteen_features_and_incomplete_rows_go(path: Path) -> None:
    rows = RECIPE.read(path)
    assert rows.x.tolist() == [
        [63, 1, 145, 233, 1, 150, 0, pytest.approx(2.3), 0, 0, 0, 0, 1],
        [67, 1, 160, 0, 0, 108, 1, 1.5, 0, 0, 1, 0, 0],
    ]
    assert rows.y.tolist() == [0, 1]
    other = path.with_name("ward.csv")
    other.write_text(LINES)
    assert torch.equal(RECIPE.read(other).x, rows.x)


@pytest.mark.parametrize(("hospital", "count", "diseased"), HOSPITALS)
def test_real_files_give_the_rows_that_are_published(
    hospital: str, count: int, diseased: int
) -> None:
    file = FOLDER / f"processed.{hospital}.data"
    if not file.exists():
        pytest.skip(f"{file} is not there; set FEDML_DATA")
    rows = RECIPE.read(file)
    assert (len(rows), int(rows.y.sum())) == (count, diseased)
    assert rows.x.shape == (count, len(FEATURES))
    assert float(RECIPE.build()[0](rows.x).abs().max()) < 5  # type: ignore[index]


def test_unmeasured_cholesterol_counts_as_the_public_constant() -> None:
    scale = RECIPE.build()[0]  # type: ignore[index]
    rows = RECIPE.example(2)
    rows[0, 3], rows[1] = 0.0, rows[0]
    rows[1, 3] = CHOLESTEROL
    assert torch.equal(scale(rows)[0], scale(rows)[1])
    assert SCALES["cholesterol"][0] == CHOLESTEROL


@pytest.mark.parametrize(
    ("find", "put", "line"),
    [
        ("63.0", "old", r"line 1: could not convert string to float: 'old'"),
        (",2\n", "\n", r"line 2: 13 columns; the UCI files have 14"),
        ("1.0,4.0,", "1.0,7.0,", r"line 2: chest pain 7 is not 1-4"),
        ("145.0", "inf", r"line 1: .*infinite"),
    ],
)
def test_a_bad_line_is_told_by_path_and_number(path: Path, find: str, put: str, line: str) -> None:
    path.write_text(LINES.replace(find, put, 1))
    with pytest.raises(ConfigError, match=rf"processed\.ward\.data, {line}"):
        RECIPE.read(path)


def test_a_file_without_a_complete_row_is_refused(path: Path) -> None:
    path.write_text(LINES.splitlines()[2])
    with pytest.raises(ConfigError, match="1 rows, none of them complete"):
        RECIPE.read(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="0 rows"):
        RECIPE.read(path)
    with pytest.raises(ConfigError, match="No such file"):
        RECIPE.read(path.with_name("gone"))
