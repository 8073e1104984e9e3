"""Populations deal every row out once, the same way for the same seed, and skewed as they say."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows, identify, load
from fedml.protocol.messages import SiteId
from fedml.recipes.breast_cancer import FEATURES
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import (
    IID,
    Column,
    Data,
    DataFile,
    Dirichlet,
    DirichletSizes,
    FeatureShift,
    FewLabels,
    Files,
    LogNormal,
    Population,
    PowerLaw,
    Shards,
    ShippedData,
    Split,
    describe,
)
from fedml.simulation.population.quantity import apportion
from tests.simulation.worlds import recipe

DATA_FOLDER = os.environ.get("FEDML_DATA", "data")
DATA = ShippedData("breast_cancer")
ALL = DATA.rows(recipe())
DEALT = [
    IID(7),
    Dirichlet(7, alpha=0.3),
    Shards(7, drop_rest=True),
    FewLabels(7, labels=2, spread=1.0),
    PowerLaw(7, exponent=1.5),
    LogNormal(7, spread=2.0),
    DirichletSizes(7, alpha=0.3),
    FeatureShift(7, "affine", strength=0.1),
]
BY_NAME = pytest.mark.parametrize("population", DEALT, ids=lambda p: type(p).__name__)


@dataclass(frozen=True)
class Numbered:
    """`count` rows, each of which is its own number, with `labels` labels in turn."""

    count: int
    labels: int = 10

    def rows(self, recipe: Recipe) -> Rows:
        numbers = torch.arange(self.count)
        return Rows(numbers[:, None].float(), numbers % self.labels)


def deal(population: Population, data: Data = DATA) -> Mapping[SiteId, Holding]:
    return population.deal(recipe(), data)


def parts(holdings: Mapping[SiteId, Holding]) -> list[Rows]:
    return [part for one in holdings.values() for part in (one.train, one.held_out)]


def numbers(holdings: Mapping[SiteId, Holding]) -> list[int]:
    return [int(x) for part in parts(holdings) for x in part.x[:, 0]]


def sizes(holdings: Mapping[SiteId, Holding]) -> list[int]:
    return [len(one.train) + len(one.held_out) for one in holdings.values()]


def shares(holdings: Mapping[SiteId, Holding]) -> list[dict[int, float]]:
    return [dict(one.labels) for one in describe(holdings)]


# --- what all of them promise ------------------------------------------------------------------


@BY_NAME
def test_each_row_goes_to_one_site_once(population: Population) -> None:
    data = Numbered(569)
    if isinstance(population, FeatureShift):
        population = replace(population, strength=0.0)
    dealt = deal(population, data)
    used = numbers(dealt)
    assert len(set(used)) == len(used) == sum(sizes(dealt))
    assert len(used) == (560 if isinstance(population, Shards) else 569)
    for part in parts(dealt):
        assert torch.equal(part.x[:, 0].long() % 10, part.y)


@given(
    st.integers(1, 60),
    st.sampled_from(["iid", "dirichlet", "few", "power", "log", "sizes"]),
    st.integers(1, 12),
    st.floats(0, 0.99),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_dealt_once_or_refused(
    rows: int, kind: str, sites: int, held_out: float, seed: int
) -> None:
    kinds: Mapping[str, Population] = {
        "iid": IID(sites, seed, held_out),
        "dirichlet": Dirichlet(sites, 0.3, seed, held_out),
        "few": FewLabels(sites, 2, 1.0, seed=seed, held_out=held_out),
        "power": PowerLaw(sites, 1.2, seed=seed, held_out=held_out),
        "log": LogNormal(sites, 2.0, seed=seed, held_out=held_out),
        "sizes": DirichletSizes(sites, 0.1, seed=seed, held_out=held_out),
    }
    try:
        dealt = deal(kinds[kind], Numbered(rows, 4))
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert sorted(numbers(dealt)) == list(range(rows))
    assert len(dealt) == sites
    assert all(len(one.train) for one in dealt.values())


@BY_NAME
def test_a_seed_decides(population: Population) -> None:
    one, again, other = (parts(deal(replace(population, seed=s))) for s in (1, 1, 2))  # type: ignore[type-var]
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, again, strict=True))
    assert not all(
        a.x.shape == b.x.shape and torch.equal(a.x, b.x) for a, b in zip(one, other, strict=True)
    )


@BY_NAME
def test_a_fifth_is_held_out(population: Population) -> None:
    for site in deal(population).values():
        assert len(site.held_out) == round(0.2 * (len(site.train) + len(site.held_out)))


def test_names_sort_in_their_order() -> None:
    names = list(deal(IID(11)))
    assert names == sorted(names)
    assert names[0] == "site-00"


def test_many_sites_hold_each_row_once_and_travel_light() -> None:
    dealt = deal(IID(20_000), Numbered(100_000))
    assert isinstance(dealt, Split)
    storages = {dealt[site].train.x.untyped_storage().data_ptr() for site in list(dealt)[:5000]}
    assert len(storages) == 1
    assert len(pickle.dumps(next(iter(dealt.values())))) < 3000  # not the heap of 400,000 bytes
    again = pickle.loads(pickle.dumps(dealt))
    assert torch.equal(again["site-00007"].train.x, dealt[SiteId("site-00007")].train.x)
    assert "site-99999" not in dealt


# --- what each of them skews --------------------------------------------------------------------


def test_the_shipped_data_is_all_there() -> None:
    assert len(ALL) == 569
    assert int(ALL.y.sum()) == 212  # malignant


def entropy(share: Mapping[int, float]) -> float:
    return -sum(p * math.log(p) for p in share.values() if p)


def test_label_skew_grows_as_alpha_falls() -> None:
    def mean(alpha: float) -> float:
        dealt = shares(deal(Dirichlet(50, alpha=alpha), Numbered(5000)))
        return float(np.mean([entropy(one) for one in dealt]))

    found = [mean(alpha) for alpha in (0.05, 0.2, 1.0, 100.0)]
    assert found == sorted(found)
    assert found[0] < 0.6 * math.log(10)
    assert found[-1] > 0.95 * math.log(10)


def test_iid_sites_are_alike_and_of_one_size() -> None:
    dealt = deal(IID(50), Numbered(5000))
    assert set(sizes(dealt)) == {100}
    assert min(entropy(one) for one in shares(dealt)) > 0.85 * math.log(10)


def test_two_shards_show_two_labels_as_mcmahan_has_it() -> None:
    dealt = deal(Shards(100, 2, held_out=0.0), Numbered(60_000))
    assert set(sizes(dealt)) == {600}
    for share in shares(dealt):
        assert len(share) <= 2
        assert all(part in (0.5, 1.0) for part in share.values())


def test_shards_leave_out_what_does_not_fill_one_and_say_so() -> None:
    dealt = deal(Shards(7, drop_rest=True))
    assert isinstance(dealt, Split)
    assert dealt.notes == ("9 of 569 rows fill no shard and are left out",)
    assert sum(sizes(dealt)) == 560


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_each_site_sees_few_labels_and_each_label_is_seen(labels: int) -> None:
    dealt = shares(deal(FewLabels(30, labels), Numbered(6000)))
    assert {len(share) for share in dealt} == {labels}
    assert set().union(*dealt) == set(range(10))
    if labels == 2:  # pairs are drawn: not the same five over and over
        assert len({tuple(sorted(share)) for share in dealt}) > 5


def test_few_labels_spread_makes_unlike_sizes() -> None:
    even, uneven = (
        sizes(deal(FewLabels(30, 2, spread, held_out=0.0), Numbered(6000))) for spread in (0.0, 2.0)
    )
    assert max(even) - min(even) <= 4
    assert max(uneven) > 10 * min(uneven)


def test_power_law_sizes_fall_with_their_rank() -> None:
    found = sorted(sizes(deal(PowerLaw(20, 1.0, least=1), Numbered(10_000))), reverse=True)
    harmonic = sum(1 / k for k in range(1, 21))
    for rank, size in enumerate(found, 1):
        assert size == pytest.approx(1 + 9980 / (rank * harmonic), abs=2)


def test_log_normal_sizes_have_their_deviation() -> None:
    found = sizes(deal(LogNormal(500, 0.5, least=1), Numbered(200_000)))
    assert float(np.std(np.log(found))) == pytest.approx(0.5, abs=0.06)
    assert set(sizes(deal(LogNormal(500, 0.0), Numbered(200_000)))) == {400}


def test_dirichlet_sizes_are_the_more_unlike_the_smaller_alpha() -> None:
    def largest(alpha: float) -> float:
        found = (sizes(deal(DirichletSizes(20, alpha, seed=s), Numbered(5000))) for s in range(10))
        return float(np.mean([max(one) for one in found]))

    assert largest(0.1) > 2 * largest(1.0) > 3 * largest(100.0)
    assert largest(1e4) < 270


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30), st.integers(0, 400), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_sizes_add_up_and_each_is_at_least_the_least(
    weights: list[float], rows: int, least: int
) -> None:
    if rows < least * len(weights):
        with pytest.raises(ConfigError, match="lower sites or least"):
            apportion(rows, np.array(weights), least)
        return
    found = apportion(rows, np.array(weights), least)
    assert found.sum() == rows
    assert found.min() >= least


# --- shifted features ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Black images [32, 1, 8, 8] with a white upper edge, alternately labelled."""

    channels: int = 1

    def rows(self, recipe: Recipe) -> Rows:
        x = torch.zeros(32, self.channels, 8, 8)
        x[:, :, 0] = 1.0
        return Rows(x if self.channels > 1 else x[:, 0], torch.arange(32) % 2)


def test_noise_grows_from_site_to_site_as_niid_bench_has_it() -> None:
    still = deal(FeatureShift(4, "noise", 0.0, held_out=0.0), Normal())
    noisy = deal(FeatureShift(4, "noise", 0.8, held_out=0.0), Normal())
    for number, site in enumerate(still, 1):
        added = (noisy[site].train.x - still[site].train.x) / torch.tensor([1.0, 10.0])
        assert float(added.var()) == pytest.approx(0.8 * number / 4, rel=0.05)
        assert torch.equal(noisy[site].train.y, still[site].train.y)


@dataclass(frozen=True)
class Normal:
    """Rows of two normal features, of deviations 1 and 10."""

    def rows(self, recipe: Recipe) -> Rows:
        x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
        return Rows(x * torch.tensor([1.0, 10.0]), (x[:, 0] > 0).long())


def test_an_affine_shift_is_each_site_s_own_and_the_same_for_all_its_rows() -> None:
    still, shifted = (deal(FeatureShift(3, "affine", s), Normal()) for s in (0.0, 0.5))
    seen = []
    for site in still:
        x, y = still[site].train.x.double(), shifted[site].train.x.double()
        for k in range(2):
            design = torch.stack([x[:, k], torch.ones(len(x), dtype=torch.float64)], 1)
            fit = torch.linalg.lstsq(design, y[:, k]).solution
            assert torch.allclose(design @ fit, y[:, k], atol=1e-4)
            seen.append(tuple(round(float(v), 3) for v in fit))
            held = still[site].held_out.x[:, k].double() * fit[0] + fit[1]
            assert torch.allclose(held, shifted[site].held_out.x[:, k].double(), atol=1e-3)
    assert len(set(seen)) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_a_rotation_turns_images_a_quarter_a_site(channels: int) -> None:
    dealt = deal(FeatureShift(4, "rotation", 360.0, held_out=0.0), Images(channels))
    upright = Images(channels).rows(recipe()).x[0]
    turned = [one.train.x[0] for one in dealt.values()]
    for number, image in enumerate(turned, 1):
        quarters = [torch.rot90(upright, k, (-2, -1)) for k in (number, -number)]
        assert any(torch.allclose(image, quarter, atol=1e-4) for quarter in quarters)
    assert not torch.allclose(turned[0], turned[1], atol=0.1)
    assert {shape.shape for shape in turned} == {upright.shape}


# --- natural splits ------------------------------------------------------------------------------


def table(path: Path, wards: Sequence[str], header: str = "ward") -> DataFile:
    lines = [",".join([*FEATURES, "malignant", header])]
    lines += [",".join(["1.0"] * 30 + [str(k % 2), ward]) for k, ward in enumerate(wards)]
    path.write_text("\n".join(lines) + "\n")
    return DataFile(str(path))


def test_files_make_the_natural_split(tmp_path: Path) -> None:
    files = {
        name: table(tmp_path / f"{name}.csv", ["x"] * n).path
        for name, n in (("quito", 10), ("bern", 20))
    }
    holdings = Files(files).deal(recipe(), None)
    assert list(holdings) == ["bern", "quito"]
    assert [len(one.train) for one in holdings.values()] == [16, 8]
    assert len(DataFile(files["bern"]).rows(recipe())) == 20


WARDS = ["East"] * 20 + [" West Wing."] * 15 + ["?"] * 3 + ["Attic"] * 4


def test_a_column_s_values_are_the_sites_and_small_ones_are_merged(tmp_path: Path) -> None:
    data = table(tmp_path / "all.csv", WARDS)
    dealt = deal(Column("ward"), data)
    assert dict(zip(dealt, sizes(dealt), strict=True)) == {"east": 20, "others": 7, "west-wing": 15}
    assert isinstance(dealt, Split)
    assert dealt.notes == ("merged, each with fewer than 10 rows: attic (4), unknown (3)",)
    few = deal(Column("ward", small="leave_out"), data)
    assert list(few) == ["east", "west-wing"]
    assert isinstance(few, Split)
    assert few.notes == ("left out, each with fewer than 10 rows: attic (4), unknown (3)",)
    assert len(deal(Column("ward", least=1), data)) == 4


def test_a_file_without_a_header_is_parted_by_a_column_s_number() -> None:
    path = Path(DATA_FOLDER, "heart_disease_uci", "processed.cleveland.data")
    if not path.is_file():
        pytest.skip("needs FEDML_DATA with heart_disease_uci")
    heart = load(identify("heart_disease"))
    dealt = Column(1, held_out=0.0).deal(heart, DataFile(str(path)))  # column 1 is sex
    whole = heart.read(path)
    males = int(whole.x[:, 1].sum())
    assert dict(zip(dealt, sizes(dealt), strict=True)) == {"0-0": len(whole) - males, "1-0": males}
    assert all(len(one.train.x[:, 1].unique()) == 1 for one in dealt.values())


def test_lines_that_a_recipe_leaves_out_count_for_no_site(tmp_path: Path) -> None:
    path = tmp_path / "part.data"
    row = "63.0,1.0,1.0,145.0,{},1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0"
    path.write_text(
        "\n".join([row.format("233.0")] * 12 + [row.format("?").replace("1.0", "0.0", 1)] * 9)
    )
    heart = load(identify("heart_disease"))
    dealt = Column(1).deal(heart, DataFile(str(path)))
    assert list(dealt) == ["1-0"]
    assert isinstance(dealt, Split)
    assert dealt.notes == ("left out, each with fewer than 10 rows: 0-0 (0)",)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("population", "message"),
    [
        (IID(0), "569 rows cannot go to 0 sites"),
        (IID(600), "569 rows cannot go to 600 sites"),
        (Dirichlet(600), "cannot go to 600 sites"),
        (Dirichlet(3, alpha=0.0), "alpha 0.0: must be above 0"),
        (
            Shards(7),
            "569 rows do not make 7 x 2 equal shards: 9 are left over; set population.drop",
        ),
        (Shards(300), "569 rows cannot make 300 sites x 2 shards"),
        (Shards(3, 0), "cannot make 3 sites x 0 shards"),
        (FewLabels(3, 3), "3 labels each, and the data have 2 labels"),
        (FewLabels(1, 1), "leave some of the 2 labels to nobody"),
        (FewLabels(500, 1), "label 1: 212 rows cannot go to 250 sites of at least 1"),
        (PowerLaw(300), "569 rows cannot go to 300 sites of at least 2"),
        (PowerLaw(0), "569 rows cannot go to 0 sites"),
        (PowerLaw(3, -1.0), "population.exponent -1.0: must be 0 or more"),
        (LogNormal(3, math.inf), "population.spread inf"),
        (DirichletSizes(3, 0.0), "population.alpha 0.0: must be above 0"),
        (DirichletSizes(3, least=0), "population.least 0"),
        (DirichletSizes(-1), "cannot go to 0 sites"),
        (FeatureShift(3, "tilt"), "population.kind 'tilt': use one of"),  # type: ignore[arg-type]
        (FeatureShift(3, "rotation"), r"inputs \[569, 30\] are no images"),
        (FeatureShift(3, strength=-1.0), "population.strength -1.0"),
        (FeatureShift(0), "cannot go to 0 sites"),
        (Files({}), "population.files is empty"),
        (Files({"Bern": "x.csv"}), "site 'Bern'"),
        (Column("ward"), "population.column 'ward': .* has the columns mean_radius, mean_texture"),
        (Column(31), "population.column 31: .* has columns 0 to 30"),
        (Column("target", least=400, small="leave_out"), "no value has 400 rows"),
        (Column("target", least=300, small="refuse"), r"fewer than 300 rows at 0 \(212\)"),
        (Column("target", small="hide"), "population.small 'hide'"),  # type: ignore[arg-type]
        (IID(3, held_out=1.0), "population.held_out 1.0"),
        (IID(569, held_out=0.9), "site-000 has 1 rows, 1 of them held out, and none to train on"),
    ],
    ids=str,
)
def test_a_population_that_cannot_be_says_why(population: Population, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        population.deal(recipe(), DATA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("population", [*DEALT, Column("x")], ids=lambda p: type(p).__name__)
def test_dealing_needs_data(population: Population) -> None:
    with pytest.raises(ConfigError, match="set data, or population=files"):
        population.deal(recipe(), None)


def test_a_column_needs_a_file_and_labels_need_whole_numbers() -> None:
    with pytest.raises(ConfigError, match="parts a file of lines"):
        deal(Column("x"), Numbered(10))

    class Measured:
        def rows(self, recipe: Recipe) -> Rows:
            return Rows(torch.ones(10, 1), torch.linspace(0, 1, 10))

    for population in (Dirichlet(2), Shards(5), FewLabels(2)):
        with pytest.raises(ConfigError, match="targets are not whole numbers"):
            deal(population, Measured())
    with pytest.raises(ConfigError, match="cannot be shifted"):
        deal(FeatureShift(2), Tokens())
    assert shares(deal(IID(2), Measured())) == [{}, {}]


class Tokens:
    """Rows of whole numbers, as texts are."""

    def rows(self, recipe: Recipe) -> Rows:
        return Rows(torch.arange(10)[:, None], torch.arange(10))


def test_data_that_is_not_shipped_is_refused() -> None:
    with pytest.raises(ConfigError, match="ships no dataset 'lung'"):
        ShippedData("lung").rows(recipe())
