from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from simulations.adult.data import Offices
from simulations.adult.recipe import COLUMNS, Adult
from tests.simulations.files import real

ROWS = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male,"
    " 2174, 0, 40, United-States, <=50K\n"
    "40, ?, 121772, Assoc-voc, 11, Married-civ-spouse, ?, Husband, Asian-Pac-Islander, Male,"
    " 0, 0, 40, ?, >50K\n"
    "31, Private, 1, HS-grad, 9, Divorced, Sales, Unmarried, Black, Female,"
    " 0, 0, 50, Cuba, >50K\n"
)
HEADER = (
    "age, workclass, fnlwgt, education, education-num, marital-status, occupation, relationship,"
    " race, sex, capital-gain, capital-loss, hours-per-week, native-country, classification\n"
)
REMARK = "|1x3 Cross validator\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adult.test"
    path.write_text(ROWS)
    return path


def test_the_real_files_have_the_rows_and_labels_that_are_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test = (
        Adult().read(real(monkeypatch, f"adult/adult.{part}")) for part in ("data", "test")
    )
    assert (len(train), len(test)) == (32561, 16281)
    assert train.y.bincount().tolist() == [24720, 7841]
    assert test.y.bincount().tolist() == [12435, 3846]
    inputs = Adult().build().get_submodule("0")(train.x)
    assert float(inputs.abs().max()) < 4


@pytest.mark.parametrize(
    "text",
    [
        HEADER + ROWS,
        REMARK + ROWS.replace("50K\n", "50K.\n") + "\n",
        ROWS.replace("50K\n", "50K. \n"),
        ROWS.replace("50K\n", "50K  \n"),
        ROWS.replace(", ", ","),
    ],
    ids=["header", "as the official test file", "dots", "blanks", "no blanks"],
)
def test_every_form_of_the_files_reads_alike(path: Path, text: str) -> None:
    plain = Adult().read(path)
    assert plain.y.tolist() == [0, 1, 1]
    path.write_text(text)
    rows = Adult().read(path)
    assert torch.equal(rows.x, plain.x) and torch.equal(rows.y, plain.y)


def test_a_line_becomes_twelve_numbers_and_unknown_is_a_level(path: Path) -> None:
    rows = Adult().read(path)
    assert rows.x[0].tolist() == [39, 5, 13, 2, 8, 3, 0, 1, 2174, 0, 40, 0]
    assert rows.x[1].tolist() == [40, 8, 11, 0, 14, 2, 1, 1, 0, 0, 40, 2]
    assert rows.x[2, -1] == 1  # another country
    assert len(COLUMNS) == 12


def test_offices_are_workclasses_and_two_have_a_single_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real(monkeypatch, "adult/adult.data")
    dealt = Offices().deal(Adult(), None)
    sizes = {site: len(one.train) for site, one in dealt.items()}
    assert sizes == {
        "private": 22696, "self-emp-not-inc": 2541, "self-emp-inc": 1116, "federal-gov": 960,
        "local-gov": 2093, "state-gov": 1298, "without-pay": 14, "never-worked": 7,
        "unknown": 1836,
    }  # fmt: skip
    assert sum(len(one.held_out) for one in dealt.values()) == 16281
    single = {site for site, one in dealt.items() if len(one.train.y.unique()) == 1}
    assert single == {"without-pay", "never-worked"}
    (one,) = Offices(together=True).deal(Adult(), None).values()
    assert (len(one.train), len(one.held_out)) == (32561, 16281)


@pytest.mark.parametrize(
    ("find", "put", "line"),
    [
        (" 40, United-States,", "", "line 1: 13 columns; the files of UCI Adult have 15"),
        ("State-gov", "Retired", "line 1: workclass 'Retired' is none of Private"),
        ("40, ?", "forty, ?", "line 2: age 'forty' is no number"),
        ("<=50K", "50K", "line 1: label '50K'; it is <=50K or >50K"),
        ("2174", "-1", "line 1: capital-gain '-1' is out of range"),
    ],
)
def test_a_bad_line_is_told_by_path_and_number(path: Path, find: str, put: str, line: str) -> None:
    path.write_text(ROWS.replace(find, put, 1))
    with pytest.raises(ConfigError, match=rf"adult\.test, {line}") as caught:
        Adult().read(path)
    assert "\n" not in str(caught.value)


def test_files_without_rows_or_text_are_refused(path: Path) -> None:
    path.write_text(HEADER)
    with pytest.raises(ConfigError, match="no rows"):
        Adult().read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"is this adult\.data or adult\.test"):
        Adult().read(path)
    with pytest.raises(ConfigError, match="No such file"):
        Adult().read(path.with_name("gone"))
