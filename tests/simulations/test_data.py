"""The real data sets, with the traps that lie in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from simulations import mnist
from simulations.adult.data import TEST, TRAIN, Workclasses
from simulations.adult.recipe import Adult
from simulations.german_credit.data import SOURCE, Purposes
from simulations.german_credit.recipe import GermanCredit
from simulations.heart_disease.data import SOURCES, Hospitals, pooled_test
from simulations.heart_disease.recipe import HeartDisease
from simulations.mnist_2nn.data import Mnist
from simulations.mnist_2nn.recipe import TwoLayers
from simulations.synthetic.data import Synthetic
from simulations.synthetic.recipe import Synthetic as SyntheticRecipe
from tests.simulations.data import FOLDER, needs

HEART = needs(SOURCES["va"].place)
CHOLESTEROL = 3


def counts(dealt: Mapping[SiteId, Holding]) -> dict[str, tuple[int, int]]:
    return {name: (len(one.train), len(one.held_out)) for name, one in dealt.items()}


@HEART
def test_hospitals_have_the_rows_that_flamby_has() -> None:
    assert counts(Hospitals().deal(HeartDisease(), None)) == {
        "cleveland": (199, 104),
        "hungarian": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }


@HEART
def test_each_hospital_is_standardised_by_its_own_training_rows() -> None:
    dealt = Hospitals().deal(HeartDisease(), None)
    for name, one in dealt.items():
        x = one.train.x.double()
        spread = x.std(dim=0)
        assert x.dtype == torch.float64 and float(x.mean(dim=0).abs().max()) < 1e-5
        constant = [k for k in range(13) if float(spread[k]) == 0]
        assert all(abs(float(spread[k]) - 1) < 1e-5 for k in range(13) if k not in constant)
        if name == "switzerland":  # cholesterol was not measured there: 0 in every row
            assert (
                CHOLESTEROL in constant and float(one.held_out.x[:, CHOLESTEROL].abs().max()) == 0
            )


@HEART
def test_the_pooled_test_is_on_the_scale_of_all_hospitals() -> None:
    rows = pooled_test(HeartDisease())
    assert len(rows) == 254
    assert float(rows.x[:, CHOLESTEROL].min()) < -1.5  # 0 mg/dl, "not measured", is far below


@needs(SOURCE.place)
def test_loans_are_dealt_out_by_purpose_tiny_offices_too() -> None:
    rows = GermanCredit().read(FOLDER / SOURCE.place)
    assert (len(rows), int(rows.y.sum())) == (1000, 300)
    sizes = {k: sum(v) for k, v in counts(Purposes().deal(GermanCredit(), None)).items()}
    assert sizes["television"] == 280 and sizes["retraining"] == 9 and sum(sizes.values()) == 1000
    one, other = (Purposes(seed=seed).deal(GermanCredit(), None) for seed in (1, 2))
    assert not torch.equal(one[SiteId("business")].train.x, other[SiteId("business")].train.x)


@needs(TRAIN.place)
@needs(TEST.place)
def test_people_are_dealt_out_by_workclass_with_sites_of_one_label() -> None:
    dealt = Workclasses().deal(Adult(), None)
    found = counts(dealt)
    assert sum(train for train, _ in found.values()) == 32561
    assert sum(test for _, test in found.values()) == 16281
    assert found["never-worked"][0] == 7 and found["private"][0] == 22696
    for name in ("never-worked", "without-pay"):
        assert int(dealt[SiteId(name)].train.y.sum()) == 0
    positives = sum(int(one.held_out.y.sum()) for one in dealt.values())
    assert positives == 3846


def test_adult_s_header_comment_dots_and_question_marks(tmp_path: Path) -> None:
    row = "25, ?, 226802, 11th, 7, Divorced, ?, Unmarried, Black, Male, 99, 0, 40, ?, {}\n"
    path = tmp_path / "adult.test"
    for first in ("", "|1x3 Cross validator\n", "age, workclass, fnlwgt\n"):
        path.write_text(first + row.format("<=50K.") + row.format(">50K") + "\n")
        rows = Adult().read(path)
        assert rows.y.tolist() == [0, 1] and torch.equal(rows.x[0], rows.x[1])
    assert bool(Adult().build()(rows.x).isfinite().all())


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        ("Male", "male", r"line 1: column 10 is 'male', none of Female, Male"),
        (", 40,", ", many,", r"line 1: column 13 is 'many', not a number"),
        (">50K", "rich", r"line 1: label 'rich'"),
        (", 0, 40", ", 40", r"line 1: 14 columns"),
    ],
)
def test_a_bad_line_of_adult_is_told(tmp_path: Path, find: str, put: str, message: str) -> None:
    row = "25, ?, 226802, 11th, 7, Divorced, ?, Unmarried, Black, Male, 99, 0, 40, ?, >50K\n"
    path = tmp_path / "adult.data"
    path.write_text(row.replace(find, put))
    with pytest.raises(ConfigError, match=message):
        Adult().read(path)


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        ("A43", "A47x", r"line 1: attribute 4 is 'A47x', not of A40"),
        (" 1169 ", " much ", r"line 1: attribute 5 is 'much', not a number"),
        (" 1\n", " 3\n", r"line 1: label '3'"),
        (" A201", "", r"line 1: 20 columns"),
    ],
)
def test_a_bad_line_of_german_is_told(tmp_path: Path, find: str, put: str, message: str) -> None:
    row = "A11 6 A34 A43 1169 A65 A75 4 A93 A101 4 A121 67 A143 A152 2 A173 1 A192 A201 1\n"
    path = tmp_path / "german.data"
    path.write_text(row.replace(find, put))
    with pytest.raises(ConfigError, match=message):
        GermanCredit().read(path)


@needs(mnist.SOURCES["train-images-idx3"].place)
@pytest.mark.parametrize("shards", [0, 2])
def test_mnist_is_all_dealt_out_with_the_official_test_rows(shards: int) -> None:
    dealt = Mnist(shards=shards, seed=1).deal(TwoLayers(), None)
    assert set(counts(dealt).values()) == {(600, 100)}
    train = torch.cat([one.train.y for one in dealt.values()])
    assert torch.equal(train.bincount(), mnist.training_rows().y.bincount())
    assert torch.equal(torch.cat([one.held_out.y for one in dealt.values()]), mnist.test_rows().y)
    digits = [len(one.train.y.unique()) for one in dealt.values()]
    assert (max(digits) <= 4 and min(digits) <= 2) if shards else min(digits) == 10
    assert sum(p.numel() for p in TwoLayers().build().parameters()) == 199_210


def test_impossible_mnist_populations_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "train-images-idx3-ubyte"
    broken.write_bytes(b"\0\0\10\1\0\0\0\5abc")
    with pytest.raises(ConfigError, match=r"not an idx file of \[5\] bytes"):
        mnist.read_idx(broken)
    broken.write_bytes(b"\0")
    with pytest.raises(ConfigError, match="is this an idx file of MNIST"):
        mnist.read_idx(broken)


@needs(mnist.SOURCES["train-images-idx3"].place)
def test_too_many_sites_for_mnist_are_refused() -> None:
    with pytest.raises(ConfigError, match="20000 sites of 0 shards: MNIST has 60000 rows"):
        Mnist(sites=20000).deal(TwoLayers(), None)


def test_synthetic_sites_are_the_authors_and_a_tenth_is_held_out() -> None:
    dealt = Synthetic().deal(SyntheticRecipe(), None)
    assert len(dealt) == 30
    sizes = [sum(pair) for pair in counts(dealt).values()]
    assert min(sizes) >= 50 and sum(sizes) == 22349
    assert all(train == int(0.9 * (train + test)) for train, test in counts(dealt).values())
    alike = Synthetic(alpha=0, beta=0, seed=3).deal(SyntheticRecipe(), None)
    assert not torch.equal(
        alike[SiteId("site-00")].train.x[:5], dealt[SiteId("site-00")].train.x[:5]
    )
    with pytest.raises(ConfigError, match="standard deviations, 0 or more"):
        Synthetic(alpha=-1.0)
