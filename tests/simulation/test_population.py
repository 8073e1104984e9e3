"""Populations deal every row out once, and the same way for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.recipes.breast_cancer import FEATURES
from fedml.simulation.population import IID, DataFile, Dirichlet, Files, Population, ShippedData
from tests.simulation.worlds import recipe

DATA = ShippedData("breast_cancer")
ALL = DATA.rows(recipe())


def rows_of(population: Population) -> list[Rows]:
    holdings = population.deal(recipe(), DATA).values()
    return [part for one in holdings for part in (one.train, one.held_out)]


def test_the_shipped_data_is_all_there() -> None:
    assert len(ALL) == 569
    assert int(ALL.y.sum()) == 212  # malignant


@pytest.mark.parametrize("population", [IID(7), Dirichlet(7, alpha=0.3)])
def test_each_row_goes_to_one_site_once(population: Population) -> None:
    dealt = torch.cat([part.x for part in rows_of(population)])
    assert sorted(map(tuple, dealt.tolist())) == sorted(map(tuple, ALL.x.tolist()))


@pytest.mark.parametrize("kind", [IID, Dirichlet])
def test_a_seed_decides(kind: type[IID] | type[Dirichlet]) -> None:
    one, again, other = (rows_of(kind(3, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a.x, b.x) for a, b in zip(one, other, strict=True))


def test_a_fifth_is_held_out() -> None:
    for site in IID(5).deal(recipe(), DATA).values():
        assert len(site.held_out) == round(0.2 * (len(site.train) + len(site.held_out)))


def test_names_sort_in_their_order() -> None:
    names = list(IID(11).deal(recipe(), DATA))
    assert names == sorted(names)
    assert names[0] == "site-00"


def test_label_skew_shows() -> None:
    def shares(alpha: float) -> list[float]:
        dealt = Dirichlet(5, alpha=alpha).deal(recipe(), DATA).values()
        return [float(one.train.y.float().mean()) for one in dealt]

    even, uneven = shares(1000.0), shares(0.1)
    assert max(uneven) - min(uneven) > max(0.5, max(even) - min(even))


def test_files_make_the_natural_split(tmp_path: Path) -> None:
    def site(name: str, count: int) -> str:
        lines = [",".join([*FEATURES, "malignant"])]
        lines += [",".join(["1.0"] * 30 + [str(k % 2)]) for k in range(count)]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    files = {"quito": site("quito", 10), "bern": site("bern", 20)}
    holdings = Files(files).deal(recipe(), None)
    assert list(holdings) == ["bern", "quito"]
    assert [len(one.train) for one in holdings.values()] == [16, 8]
    assert len(DataFile(files["bern"]).rows(recipe())) == 20


@pytest.mark.parametrize(
    ("population", "message"),
    [
        (IID(0), "569 rows cannot go to 0 sites"),
        (IID(600), "569 rows cannot go to 600 sites"),
        (Dirichlet(600), "cannot go to 600 sites"),
        (Files({}), "population.files is empty"),
        (Files({"Bern": "x.csv"}), "site 'Bern'"),
        (IID(3, held_out=1.0), "population.held_out 1.0"),
    ],
)
def test_a_population_that_cannot_be_says_why(population: Population, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        population.deal(recipe(), DATA)


def test_dealing_needs_data() -> None:
    with pytest.raises(ConfigError, match="set data, or population=files"):
        IID(3).deal(recipe(), None)


def test_data_that_is_not_shipped_is_refused() -> None:
    with pytest.raises(ConfigError, match="ships no dataset 'lung'"):
        ShippedData("lung").rows(recipe())
