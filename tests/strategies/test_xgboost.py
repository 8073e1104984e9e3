"""Federated boosted trees are those of the pooled rows, to the bit, and XGBoost's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.coordinator.sizes import largest_update
from fedml.errors import ConfigError, Contradiction, MalformedUpdate
from fedml.learning.recipe import Rows, identify
from fedml.params import Params, encode
from fedml.protocol.messages import Blob, Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Update
from fedml.recipes.breast_cancer_trees import BreastCancerTrees
from fedml.releases.bundle import build as bundle
from fedml.rounds import Cohort, Evaluation, Plan, Run
from fedml.rounds.answers import Updates
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.population import IID, ShippedData
from fedml.strategies import (
    Aggregate,
    FedAvg,
    Forest,
    Newton,
    Sample,
    ServerState,
    WeightedMean,
    XGBoost,
    build,
    check_model,
    is_bounded,
    reports,
)
from fedml.strategies.forest import codes, refined, values
from fedml.strategies.xgboost import GRAIN, Histograms, derivatives, summed
from tests.bundles import facts
from tests.coordinator.test_desk import ORDER


@dataclass(frozen=True)
class Toy:
    """A recipe of boosted trees over few features, by any loss."""

    make: Callable[[], nn.Module]
    loss_of: Callable[[Tensor, Tensor], Tensor]
    labels: tuple[str, ...] = ("yes",)

    def build(self) -> nn.Module:
        return self.make()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss_of(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"accuracy": ((output[:, 0] > 0) == (target > 0)).float()}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError(str(path))

    def example(self, rows: int) -> Tensor:
        return torch.zeros(rows, 4)


def logistic(output: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output[:, 0], target.to(output.dtype))


def square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output[:, 0] - target).square().mean()


def grown(
    recipe: Toy | BreastCancerTrees,
    sites: Mapping[SiteId, Holding],
    strategy: XGBoost,
    rounds: int,
    secagg: Secagg | None = None,
) -> Params:
    """Return the forest of a production run over `sites`."""
    plan = Plan(
        model="trial",
        recipe=identify("breast_cancer_trees"),
        dataset="trial",
        strategy=strategy,
        training=Training(lr=1.0, steps=1),
        cohort=Cohort(quorum=len(sites), deadline=60.0),
        rounds=rounds,
        secagg=secagg or Secagg(),
        evaluation=Evaluation(at_end=False),
        attempts=1,
    )
    run = Run.begin(RunId("r"), plan, Params(recipe.build().state_dict()))
    outcome = Engine(run, Inline(plan, recipe, sites, Memory()), statuses(plan, sites)).play()
    assert outcome.candidate is not None, outcome.end.detail
    return outcome.candidate.params


def pooled(sites: Mapping[SiteId, Holding]) -> Rows:
    parts = [one.train for one in sites.values()]
    return Rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def holding(rows: Rows) -> Holding:
    return Holding(rows, rows.take([0]))


def few_values(rows: int = 600) -> Rows:
    """Rows whose features have a few distinct values each, so that bins can be nothing else."""
    rng = np.random.default_rng(3)
    some = np.array([-7.5, -0.1, 0.0, 0.2, 9e4])
    steps = (np.arange(4.0) - 2, some, np.arange(12.0) / 7, np.arange(2.0))
    x = np.stack([rng.choice(one, rows) for one in steps], 1).astype(np.float32)
    chance = 1 / (1 + np.exp(-(x[:, 0] + 0.5) * (x[:, 2] - 0.8) - (x[:, 1] > 0.1) + x[:, 3]))
    return Rows(torch.from_numpy(x), torch.from_numpy((rng.random(rows) < chance).astype(np.int64)))


def halves(rows: Rows) -> Mapping[SiteId, Holding]:
    """Sites of unlike sizes and rows: by label, and one label cut once more."""
    no, yes = ((rows.y == label).nonzero()[:, 0] for label in (0, 1))
    parts = {"no": no, "some": yes[:11], "yes": yes[11:]}
    return {SiteId(name): holding(rows.take(part)) for name, part in parts.items()}


# --- the formula -------------------------------------------------------------------------------


def test_a_split_is_the_one_of_the_largest_gain_worked_by_hand() -> None:
    """Two features of three bins: G = -4, 1, 3 and H = 2, 1, 1; and the same in another order."""
    g = np.array([[-4.0, 1.0, 3.0], [1.0, -4.0, 3.0]])
    h = np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    sums = np.stack([g, h])[:, None, None]  # one output, one node
    # lambda 1: cutting after bin 0 gains 16/3 + 16/3 - 0 = 10.67, after bin 1 9/4 + 9/2 = 6.75;
    # of the second feature 1/2 + 1/4 = 0.75, and as before 6.75.
    found = XGBoost(eta=0.5).splits(sums)
    assert (found.feature.item(), found.cut.item()) == (0, 0)
    assert found.weight.item() == 0.0
    assert found.sides[0, 0] == pytest.approx([0.5 * 4 / 3, -0.5 * 4 / 3], abs=GRAIN)
    # at least 2.5 on each side: no split; of 2 and more, only the one after bin 0
    assert XGBoost(min_child_weight=2.5).splits(sums).feature.item() == -1
    assert XGBoost(min_child_weight=2.0).splits(sums).cut.item() == 0
    # gamma at the gain, and above
    assert XGBoost(gamma=32 / 3 - 1e-9).splits(sums).feature.item() == 0
    assert XGBoost(gamma=10.7).splits(sums).feature.item() == -1
    # with a second derivative more in bin 2 and G = -1, the root's 1/6 comes off: 16/3 + 9/4 - 1/6
    other = np.stack([[[-4.0, 1.0, 2.0]], [[2.0, 1.0, 2.0]]])[:, None, None]
    assert XGBoost(gamma=7.41).splits(other).feature.item() == 0
    assert XGBoost(gamma=7.42).splits(other).feature.item() == -1
    # without lambda 16/2 + 16/2 against 9/3 + 9/1
    assert XGBoost(reg_lambda=0.0).splits(sums).sides[0, 0] == pytest.approx([0.6, -0.6])


def test_of_equal_gains_the_first_feature_and_cut_is_taken() -> None:
    g = np.array([[0.0, -2.0, 0.0, 2.0]] * 3)
    sums = np.stack([g, np.ones_like(g)])[:, None, None]
    sums[1, ..., 2] = 0.0  # bin 2 is empty: to cut before it or after it is the same
    found = XGBoost(min_child_weight=0.5).splits(sums)
    assert (found.feature.item(), found.cut.item()) == (0, 1)


def test_nothing_grows_below_a_leaf() -> None:
    strategy, params = XGBoost(sketch=0), Params(Forest(1, trees=1, depth=2, bins=3).state_dict())
    params["leaf"].fill_(0.25)
    sums = torch.tensor([[-4.0, 1.0, 3.0], [2.0, 1.0, 1.0]]).double().reshape(2, 1, 1, 1, 3)
    slots = {"sums": Params({"sums": sums.expand(2, 1, 2, 1, 3)})}
    total = Aggregate(params.zeros(), slots, 1.0, 1)
    assert strategy.advance(ServerState(params, step=1), total).params == params
    params["feature"][0, 0, 0] = 0  # where the node above has a split it does
    grown = strategy.advance(ServerState(params, step=1), total).params
    assert grown["feature"].tolist() == [[[0, 0, 0]]]


def test_derivatives_are_the_loss_s_own() -> None:
    generator = torch.Generator().manual_seed(5)
    outputs = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (50,), generator=generator)
    g, h = derivatives(Sample(outputs, y, lambda _: outputs, functional.cross_entropy), outputs)
    chance = outputs.softmax(1)
    assert torch.allclose(g, chance - functional.one_hot(y, 3), atol=GRAIN)
    assert torch.allclose(h, chance * (1 - chance), atol=GRAIN)
    assert torch.equal(g / GRAIN, (g / GRAIN).round())
    one, target = outputs[:, :1], outputs[:, 1]
    g, h = derivatives(Sample(one, target, lambda _: one, square), one)
    assert torch.allclose(g, one - target[:, None], atol=GRAIN)
    assert torch.equal(h, torch.ones_like(h))


# --- bins --------------------------------------------------------------------------------------


def test_codes_are_in_the_order_of_floats_and_come_back() -> None:
    floats = np.array([-3e38, -2.0, -1e-45, 0.0, 1e-45, 1.0, 1.0 + 2**-23, 3e38], np.float32)
    found = codes(floats)
    assert (np.diff(found) > 0).all()
    assert found[6] == found[5] + 1
    assert np.array_equal(values(found), floats)


def counted(cuts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(cuts, rows, side="right"), minlength=len(cuts) + 1)


def test_a_few_values_come_to_stand_alone_and_many_in_fair_parts() -> None:
    start = Forest(1, bins=64).cuts[0].numpy()
    few = np.array([-1e6, -17.0, 0.0, 17.0, 17.01, 18.0, 19.0, 1e-30, 4e9], np.float32)
    many = np.random.default_rng(0).lognormal(size=20_000).astype(np.float32)
    for rows in (np.repeat(few, [1, 5, 900, 2, 1, 1, 30, 2, 1]), many):
        cuts = start
        for number in range(8):
            cuts = refined(cuts, counted(cuts, rows), last=number == 7)
            assert (np.diff(cuts) >= 0).all() and len(cuts) == 63
        if rows is many:
            assert counted(cuts, rows).max() < 2.2 * len(rows) / 64
        else:
            assert len({*np.searchsorted(cuts, few, side="right")}) == len(few)


def test_one_value_of_nearly_all_rows_leaves_bins_to_the_others() -> None:
    """As a capital gain is: nothing for most, and for some any of a hundred sums."""
    rng = np.random.default_rng(0)
    gains = np.where(rng.random(20_000) < 0.92, 0, rng.integers(100, 90_000, 20_000) // 100 * 100)
    rows, cuts = gains.astype(np.float32), Forest(1, bins=64).cuts[0].numpy()
    for number in range(8):
        cuts = refined(cuts, counted(cuts, rows), last=number == 7)
    assert (counted(cuts, rows) > 0).sum() > 40
    assert counted(cuts, rows[rows > 0]).max() < 0.25 * (rows > 0).sum()


# --- the whole ---------------------------------------------------------------------------------


def test_it_grows_the_trees_of_xgboost_where_bins_are_the_same() -> None:
    xgboost = pytest.importorskip("xgboost")
    rows = few_values()
    recipe = Toy(lambda: Forest(4, trees=8, depth=4, bins=32), logistic)
    strategy = XGBoost(gamma=0.05, min_child_weight=2.0, reg_lambda=0.5, sketch=10)
    found = grown(recipe, halves(rows), strategy, 10 + 8 * 4)
    told = {
        "objective": "binary:logistic", "base_score": 0.5, "max_depth": 4, "eta": 0.3,
        "gamma": 0.05, "min_child_weight": 2.0, "lambda": 0.5, "max_bin": 32, "tree_method": "hist",
    }  # fmt: skip
    theirs = xgboost.train(told, xgboost.DMatrix(rows.x.numpy(), rows.y.numpy()), 8)
    margin = theirs.predict(xgboost.DMatrix(rows.x.numpy()), output_margin=True)
    forest = recipe.build()
    forest.load_state_dict(dict(found))
    assert np.abs(forest(rows.x)[:, 0].detach().numpy() - margin).max() < 1e-5
    table = theirs.trees_to_dataframe()
    splits = [int(one[1:]) for one in table.Feature if one != "Leaf"]
    ours = found["feature"]
    assert sorted(ours[ours >= 0].tolist()) == sorted(splits)


def test_it_is_as_right_as_xgboost_on_breast_cancer() -> None:
    """Each measure in forty ranks, so that both have the same bins."""
    xgboost = pytest.importorskip("xgboost")
    recipe = BreastCancerTrees()
    raw = pooled(IID(1).deal(recipe, ShippedData("breast_cancer")))
    ranks = torch.quantile(raw.x, torch.linspace(0, 1, 40), dim=0).T.contiguous()
    rows = Rows(torch.searchsorted(ranks, raw.x.T.contiguous()).T.float(), raw.y)
    apart = torch.arange(len(rows)) % 3 == 0
    train, kept = (rows.take(part.nonzero()[:, 0]) for part in (~apart, apart))
    forest = recipe.build()
    forest.load_state_dict(dict(grown(recipe, halves(train), XGBoost(), 8 + 20 * 3)))
    model = xgboost.XGBClassifier(
        n_estimators=20, max_depth=3, learning_rate=0.3, max_bin=64, base_score=0.5, n_jobs=1
    ).fit(train.x.numpy(), train.y.numpy())
    ours, theirs = forest(kept.x)[:, 0].detach() > 0, model.predict(kept.x.numpy()) > 0
    right = (ours.numpy() == kept.y.numpy()).mean(), (theirs == kept.y.numpy()).mean()
    assert right[0] > 0.9
    assert abs(right[0] - right[1]) <= 0.005
    gap = forest(train.x)[:, 0].detach().numpy() - model.predict(
        train.x.numpy(), output_margin=True
    )
    assert np.abs(gap).max() < 1e-4


def test_however_rows_are_dealt_out_the_forest_has_the_same_bytes() -> None:
    recipe = BreastCancerTrees()
    rows = pooled(IID(1).deal(recipe, ShippedData("breast_cancer")))
    one = grown(recipe, {SiteId("all"): holding(rows)}, XGBoost(sketch=3), 3 + 9)
    assert int((one["feature"] >= 0).any(2).sum()) == 3
    assert one == grown(recipe, halves(rows), XGBoost(sketch=3), 3 + 9)
    fewer = {k: v for k, v in halves(rows).items() if k != "some"}
    assert one != grown(recipe, fewer, XGBoost(sketch=3), 3 + 9)  # so equality is no accident


def test_sums_come_back_from_means_without_an_error() -> None:
    rng = np.random.default_rng(4)
    reduction, whole = WeightedMean().start(), np.zeros(500)
    for site, rows in enumerate((7, 49, 113, 30_001)):
        sums = torch.from_numpy(rng.integers(-(2**40), 2**40, 500) * GRAIN)
        slots = {"sums": Params({"sums": sums / rows})}
        empty = Params({"w": torch.zeros(1)})
        reduction.add(Update(TaskId(f"t{site}"), 1, SiteId(f"s{site}"), empty, float(rows), slots))
        whole = whole + sums.numpy()
    assert np.array_equal(summed(reduction.result(), "sums", GRAIN), whole)


def test_masked_sums_grow_the_same_bytes() -> None:
    recipe, rows = (
        BreastCancerTrees(),
        pooled(IID(1).deal(BreastCancerTrees(), ShippedData("breast_cancer"))),
    )
    masked = Secagg("sa1", weight_cap=400.0)
    found = grown(recipe, halves(rows), XGBoost(sketch=2), 2 + 3, masked)
    assert found == grown(recipe, halves(rows), XGBoost(sketch=2), 2 + 3)
    assert int((found["feature"] >= 0).sum()) > 3


def test_a_squared_error_is_fitted_and_many_outputs_are() -> None:
    x = torch.randint(20, (400, 4), generator=torch.Generator().manual_seed(2)) / 20
    y = torch.where(x[:, 0] > 0.5, 3.0, -1.0) + x[:, 1]
    recipe = Toy(lambda: Forest(4, trees=15, depth=3, bins=64), square)
    forest = recipe.build()
    forest.load_state_dict(
        dict(grown(recipe, {SiteId("a"): holding(Rows(x, y))}, XGBoost(), 8 + 45))
    )
    assert float((forest(x).detach()[:, 0] - y).square().mean()) < 0.01 * float(y.var())
    kinds = (x[:, 0] > 0.5).long() + (x[:, 1] > 0.3).long()
    recipe = Toy(lambda: Forest(4, outputs=3, trees=5, depth=2, bins=32), functional.cross_entropy)
    forest = recipe.build()
    forest.load_state_dict(
        dict(grown(recipe, {SiteId("a"): holding(Rows(x, kinds))}, XGBoost(sketch=4), 4 + 10))
    )
    assert float((forest(x).argmax(1) == kinds).double().mean()) > 0.95


def test_rounds_beyond_the_last_tree_change_nothing() -> None:
    recipe = Toy(lambda: Forest(4, trees=1, depth=2, bins=8), logistic)
    sites, strategy = halves(few_values(100)), XGBoost(sketch=1)
    assert grown(recipe, sites, strategy, 3) == grown(recipe, sites, strategy, 5)


def test_a_grown_forest_becomes_a_bundle(tmp_path: Path) -> None:
    rows = few_values(80)
    recipe = Toy(lambda: Forest(4, trees=2, depth=2, bins=8), logistic)
    params = grown(recipe, halves(rows), XGBoost(sketch=4), 4 + 4)
    assert int((params["feature"] >= 0).sum()) > 2
    bundle(tmp_path, recipe.build(), params, rows.x, facts())  # holds ONNX against the forest


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eta": 0.0}, "xgboost.eta 0.0: must be above 0"),
        ({"reg_lambda": -1.0}, "xgboost.reg_lambda -1.0: must be 0 or more"),
        ({"gamma": -0.1}, "xgboost.gamma"),
        ({"min_child_weight": -1.0}, "xgboost.min_child_weight"),
        ({"sketch": -1}, "xgboost.sketch"),
    ],
)
def test_a_setting_out_of_range_is_told(settings: Mapping[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build({"name": "xgboost", **settings})


def test_rounds_that_leave_a_tree_unfinished_are_refused_with_the_right_number() -> None:
    """4 rounds find bins, and three trees take 2 each."""
    params, strategy = Params(Forest(2, trees=3, depth=2, bins=4).state_dict()), XGBoost(sketch=4)
    for rounds in (6, 8, 10, 12):  # what is beyond 10 changes nothing
        check_model(strategy, params, rounds)
    for rounds, why in ((1, "none grows"), (4, "none grows"), (7, "a tree is left unfinished")):
        with pytest.raises(Contradiction) as caught:
            check_model(strategy, params, rounds)
        assert caught.value.reasons == (
            f"rounds {rounds} with strategy XGBoost: 4 find bins and each tree takes 2, so {why}; "
            "set rounds=10 for all 3 trees of this recipe, or to 4 and 2 for each that is wanted",
        )
    other = Params(nn.Linear(2, 1).state_dict())
    with pytest.raises(Contradiction, match="grows a Forest, this model has bias, weight: let"):
        check_model(strategy, other, 10)


def test_a_model_that_is_no_empty_forest_is_told() -> None:
    with pytest.raises(ConfigError, match=r"grows a Forest, this model has bias, weight: let the"):
        XGBoost().start(Params(nn.Linear(2, 1).state_dict()))
    params = Params(Forest(2, trees=3, depth=1, bins=4).state_dict())
    params["feature"][1] = 0
    with pytest.raises(ConfigError, match=r"1 trees of this forest are grown already.*parent to 0"):
        XGBoost().start(params)
    with pytest.raises(ConfigError, match="depth 11 with 256 bins"):
        Forest(2, depth=11)
    with pytest.raises(ConfigError, match="a forest with trees 0: 1 or more"):
        Forest(2, trees=0)


def rows_of(features: int) -> Sample:
    x = torch.zeros(3, features)
    return Sample(x, torch.zeros(3), lambda _: x[:, :1], logistic)


def test_a_site_refuses_rows_and_levels_that_do_not_fit() -> None:
    strategy = XGBoost(sketch=0)
    brief = strategy.brief(strategy.start(Params(Forest(2, trees=3, depth=2, bins=4).state_dict())))
    with pytest.raises(ConfigError, match="5 features a row, and the forest has 2"):
        Histograms().measure(brief, rows_of(5))
    for wrong in ({"level": 2.0}, {"level": 60.0}, {"tree": 3.0}, {"tree": -1.0}):
        other = replace(brief, settings={**brief.settings, **wrong})
        with pytest.raises(ConfigError, match="this forest has no such level"):
            Histograms().measure(other, rows_of(2))


def test_a_histogram_of_another_shape_is_refused() -> None:
    strategy = XGBoost(sketch=0)
    brief = strategy.brief(strategy.start(Params(Forest(2, trees=3, depth=2, bins=4).state_dict())))
    delta, slots = Histograms().measure(brief, rows_of(2))
    answers = Updates(WeightedMean(), reports(brief))
    good = Update(TaskId("t"), 1, SiteId("s"), delta, 3.0, slots)
    answers.add(good, brief)
    for sums in (torch.zeros(2, 1, 2, 2, 4).double(), torch.zeros(2, 1, 1, 2, 4)):
        with pytest.raises(MalformedUpdate, match=r"sums: (shape|dtype)"):
            answers.add(replace(good, slots={"sums": Params({"sums": sums})}), brief)


def test_a_coordinator_has_room_for_a_histogram_that_is_larger_than_the_model() -> None:
    strategy = XGBoost(sketch=0)
    params = Params(Forest(30, trees=3, depth=6, bins=256).state_dict())
    brief = strategy.brief(ServerState(params, step=5))
    order = replace(ORDER, model=Blob("ab" * 32, params.layout.bytes), rule=brief.rule)
    told = replace(order, settings=brief.settings)
    delta, slots = Histograms().measure(brief, rows_of(30))
    whole = sum(map(len, encode({"delta": delta, **slots})))
    assert largest_update(replace(order, rule="plain")) < whole <= largest_update(told)


def test_it_may_be_masked_and_newton_not_and_neither_is_private() -> None:
    assert is_bounded(XGBoost()) and not is_bounded(Newton()) and not is_bounded(FedAvg())
    record = Privacy("record", epsilon=3.0, delta=1e-5, rounds=3)
    with pytest.raises(Contradiction, match=r"XGBoost with record privacy: .*use strategy=fedavg"):
        Plan(
            model="m",
            recipe=identify("breast_cancer_trees"),
            dataset="d",
            strategy=XGBoost(),
            training=Training(lr=1.0, steps=1),
            cohort=Cohort(quorum=1, deadline=60.0),
            rounds=3,
            privacy=record,
        )
