from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from simulations.columns import Kind, by_level
from simulations.german_credit.data import OFFICES, Offices
from simulations.german_credit.recipe import COLUMNS, GermanCredit
from tests.simulations.files import real

PLACE = "german_credit/german.data"
LINE = (
    "A11 6 A34 A43 1169 A65 A75 4 A93 A101 4 A121 67 A143 A152 2 A173 1 A192 A201 1\n"
    "A12 48 A32 A410 5951 A61 A73 2 A92 A101 2 A121 22 A143 A152 1 A173 1 A191 A201 2\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "german.data"
    path.write_text(LINE)
    return path


def test_the_real_file_has_a_thousand_loans_of_which_300_are_bad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = GermanCredit().read(real(monkeypatch, PLACE))
    assert rows.x.shape == (1000, 20)
    assert rows.y.bincount().tolist() == [700, 300]
    counts = {level: len(part) for level, part in by_level(COLUMNS, "purpose", rows).items()}
    assert counts == {
        "A40": 234, "A41": 103, "A42": 181, "A43": 280, "A44": 12, "A45": 22, "A46": 50,
        "A48": 9, "A49": 97, "A410": 12,
    }  # fmt: skip


def test_a_line_becomes_numbers_and_places_of_levels(path: Path) -> None:
    rows = GermanCredit().read(path)
    assert rows.y.tolist() == [0, 1]
    assert rows.x[0].tolist() == [
        0, 6, 4, 3, 1169, 4, 4, 4, 2, 0, 4, 0, 67, 2, 1, 2, 2, 1, 1, 0
    ]  # fmt: skip
    assert COLUMNS[3].name == "purpose" and rows.x[1, 3] == 10


def test_the_model_sees_a_one_for_each_level_and_scaled_measures(path: Path) -> None:
    inputs = GermanCredit().build().get_submodule("0")(GermanCredit().read(path).x)
    kinds = sum(isinstance(column, Kind) for column in COLUMNS)
    levels = inputs[:, -sum(len(c.levels) for c in COLUMNS if isinstance(c, Kind)) :]
    assert levels.sum(dim=1).tolist() == [kinds, kinds]
    assert inputs[:, 0].tolist() == [pytest.approx((6 - 24) / 24), 1.0]  # months
    assert float(inputs.abs().max()) < 3


def test_every_loan_goes_to_the_office_of_its_purpose_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = GermanCredit().read(real(monkeypatch, PLACE))
    dealt = Offices(seed=3).deal(GermanCredit(), None)
    assert set(dealt) == set(OFFICES.values()) - {"vacation"}
    assert sorted(
        tuple(row)
        for one in dealt.values()
        for row in torch.cat([one.train.x, one.held_out.x]).tolist()
    ) == sorted(map(tuple, every.x.tolist()))
    for office, one in dealt.items():
        purposes = {int(code) for code in one.train.x[:, 3].tolist()}
        kind = COLUMNS[3]
        assert isinstance(kind, Kind)
        assert {OFFICES[kind.levels[code]] for code in purposes} == {office}
        assert len(one.held_out) == round(0.2 * (len(one.train) + len(one.held_out)))


def test_together_holds_out_the_very_rows_that_the_offices_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real(monkeypatch, PLACE)
    apart = Offices(seed=1).deal(GermanCredit(), None).values()
    (one,) = Offices(seed=1, together=True).deal(GermanCredit(), None).values()
    assert torch.equal(one.held_out.x, torch.cat([office.held_out.x for office in apart]))
    assert len(one.train) == sum(len(office.train) for office in apart)


def test_another_seed_holds_out_other_loans(monkeypatch: pytest.MonkeyPatch) -> None:
    real(monkeypatch, PLACE)
    held = [
        Offices(seed=seed).deal(GermanCredit(), None)["television"].held_out.x  # type: ignore[index]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_cost_follows_the_matrix_of_the_documentation() -> None:
    sure, unsure = [4.0, -4.0], [1.0, 0.0]  # chances of a bad risk: 0.0003 and 0.27
    output = torch.tensor([sure, sure, unsure, unsure])
    target = torch.tensor([0, 1, 0, 1])
    scores = GermanCredit().score(output, target)
    assert scores["cost"].tolist() == [0.0, 1.0, pytest.approx(0.2), 0.0]
    assert scores["accuracy"].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("find", "put", "line"),
    [
        ("A11 6", "6", r"line 1: 20 columns; german\.data has 21"),
        ("A11 6", "A15 6", r"line 1: checking_account 'A15' is none of A11, A12"),
        ("A12 48", "A12 long", r"line 2: months 'long' is no number"),
        ("A201 2", "A201 0", r"line 2: label '0'; it is 1 \(good\) or 2 \(bad\)"),
        ("1169", "-5", r"line 1: amount '-5' is out of range"),
        ("1169", "nan", r"line 1: amount 'nan' is out of range"),
    ],
)
def test_a_bad_line_is_told_by_path_and_number(path: Path, find: str, put: str, line: str) -> None:
    path.write_text(LINE.replace(find, put, 1))
    with pytest.raises(ConfigError, match=rf"german\.data, {line}") as caught:
        GermanCredit().read(path)
    assert "\n" not in str(caught.value)


def test_files_without_rows_or_text_and_impossible_shares_are_refused(path: Path) -> None:
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no rows"):
        GermanCredit().read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"is this german\.data"):
        GermanCredit().read(path)
    with pytest.raises(ConfigError, match="No such file"):
        GermanCredit().read(path.with_name("gone"))
    with pytest.raises(ConfigError, match=r"held_out 1\.0"):
        Offices(held_out=1.0)
