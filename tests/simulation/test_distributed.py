"""Mode `record_distributed`: what each site releases, and that the sum is what central DP gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Refused
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.privacy.accounting import (
    SampledGaussian,
    epsilon,
    evaluation_event,
    training_event,
    unit_of,
)
from fedml.privacy.audit import judge
from fedml.privacy.noise import FINENESS
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import Privacy, RecipeId, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update
from fedml.recipes.breast_cancer import BreastCancer
from fedml.rounds import Cohort, Evaluation, Plan
from fedml.rounds.vectors import shares_of
from fedml.simulation.canaries import Audit
from fedml.simulation.executors.base import Holding, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAvg, WeightedMean
from tests.attacks.sabotage import scale
from tests.simulation.worlds import singles

torch.set_num_threads(1)

SITES = [SiteId(f"s{number}") for number in range(5)]
COUNTS = (7, 30, 45, 60, 91)
SHARED = Privacy("record_distributed", 3.0, 1e-5, clip=0.5, rounds=10, sharers=5)
MAKERS: list[MakeExecutor] = [Inline, Vectorised]
ONE_STEP = Training(lr=1.0, steps=1)


class Wide:
    """Two classes from four numbers; `flat` makes every gradient zero, so noise alone is left."""

    labels = ("no", "yes")

    def __init__(self, *, flat: bool) -> None:
        self.flat = flat

    def build(self) -> nn.Module:
        linear = nn.Linear(4, 1000)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(output, target)
        return loss * 0 if self.flat else loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {}

    def read(self, path: Path) -> Rows:
        raise ConfigError(str(path))

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


def plan(privacy: Privacy = SHARED) -> Plan:
    return Plan(
        model="wide",
        recipe=RecipeId("wide", "0" * 64),
        dataset="wide",
        strategy=FedAvg(),
        training=ONE_STEP,
        cohort=Cohort(quorum=5, deadline=60.0),
        rounds=privacy.rounds,
        privacy=privacy,
        evaluation=Evaluation(at_end=False),
    )


def rows_of(count: int, seed: int) -> Rows:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Rows(x, (x[:, 0] > 0).long())


HOLDINGS = {
    site: Holding(rows_of(count, number), rows_of(1, 0))
    for number, (site, count) in enumerate(zip(SITES, COUNTS, strict=True))
}


def updates(make: MakeExecutor, *, flat: bool, memory: Memory | None = None) -> list[Update]:
    """Return what all sites release in one round."""
    recipe = Wide(flat=flat)
    brief = Brief(Params(recipe.build().state_dict()))
    tasks = [Task(TaskId(f"t.{s}"), RunId("r"), 1, s, "train", brief) for s in SITES]
    executor = make(plan(), recipe, HOLDINGS, memory or Memory())
    found = singles(executor, tasks)
    assert all(isinstance(one, Update) for one in found)
    return [one for one in found if isinstance(one, Update)]


def chi_square(noise: Tensor, std: float) -> float:
    """Return by how many deviations the squares' sum is off what noise of `std` would give."""
    freedom = noise.numel()
    total = float((noise.double() / std).square().sum())
    return (total - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("make", MAKERS)
def test_each_site_adds_a_share_and_the_sum_has_the_noise_that_is_accounted_for(
    make: MakeExecutor,
) -> None:
    event = training_event(ONE_STEP, SHARED, 7)
    whole = event.noise * SHARED.clip
    reduction, found = WeightedMean().start(), updates(make, flat=True)
    for update in found:
        released = update.delta.buffers[torch.float32] * update.weight
        assert abs(chi_square(released, whole / math.sqrt(5))) < 5
        reduction.add(update)
    total = reduction.result()
    assert total.weight == sum(COUNTS)
    assert abs(chi_square(total.delta.buffers[torch.float32] * total.weight, whole)) < 5


@pytest.mark.parametrize("make", MAKERS)
def test_the_sum_is_that_of_all_sites_clipped_gradients(
    make: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise it is one site's with all the rows: the utility of central privacy."""
    scale(monkeypatch, noise=0.0)
    reduction = WeightedMean().start()
    for update in updates(make, flat=False):
        reduction.add(update)
    everyone = [HOLDINGS[site].train for site in SITES]
    pooled = Rows(torch.cat([r.x for r in everyone]), torch.cat([r.y for r in everyone]))
    recipe = Wide(flat=False)
    task = Task(
        TaskId("t"), RunId("r"), 1, SITES[0], "train", Brief(Params(recipe.build().state_dict()))
    )
    central, _ = Trainer(recipe, ONE_STEP, SHARED).train(
        task, pooled, {}, seed=0, public_rows=sum(COUNTS)
    )
    got, wanted = reduction.result().delta, central.delta
    assert float((got - wanted).norm()) < 1e-6 * float(wanted.norm())


class Tied(Wide):
    """Two layers with one weight between them, and one that stays as it is."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        first, second, still = (nn.Linear(4, 4) for _ in range(3))
        second.weight = first.weight
        still.requires_grad_(False)
        return nn.Sequential(first, nn.Tanh(), second, still)


@pytest.mark.parametrize("recipe", [Wide(flat=False), Tied(flat=False)], ids=["plain", "tied"])
def test_a_share_for_a_masked_sum_is_what_an_update_is_made_of(
    recipe: Wide, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale(monkeypatch, noise=1e-6)  # and so is the grid's step
    brief = Brief(Params(recipe.build().state_dict()))
    task, rows = Task(TaskId("t"), RunId("r"), 1, SITES[0], "train", brief), rows_of(30, 1)
    trainer = Trainer(recipe, Training(lr=0.5, steps=1), SHARED)
    update, _ = trainer.train(task, rows, {}, seed=0, public_rows=40)
    share, kept = trainer.share(task, rows, {}, seed=0, public_rows=40)
    values = shares_of(share, brief)
    assert not kept
    whole = torch.from_numpy(values["noised:float32"])
    assert torch.equal(whole, whole.round()) and float(whole.abs().max()) > 1e4
    moved = whole * grain_of(trainer.training, SHARED) * 1e-6 / 40
    wanted = update.delta.buffers[torch.float32].double()
    assert float((moved - wanted).norm()) < 1e-4 * float(wanted.norm())  # the noise that is left


def test_a_share_for_a_masked_sum_has_a_share_of_the_noise_in_steps_of_its_own_grid() -> None:
    recipe = Wide(flat=True)
    brief = Brief(Params(recipe.build().state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, SITES[0], "train", brief)
    trainer = Trainer(recipe, ONE_STEP, SHARED)
    whole, _ = trainer.share(task, rows_of(30, 1), {}, seed=0, public_rows=40)
    steps = torch.cat([part.flatten() for part in whole.values()])
    assert torch.equal(steps, steps.round())
    assert abs(chi_square(steps, FINENESS)) < 5
    share = training_event(ONE_STEP, SHARED, 40).noise / math.sqrt(SHARED.sharers)
    step = -share * SHARED.clip / FINENESS
    assert grain_of(ONE_STEP, SHARED) == pytest.approx(step, rel=1e-12)


BY_SITE = Privacy("site_distributed", 3.0, 1e-5, clip=0.5, rounds=10, sharers=5)


def test_a_whole_site_s_update_is_bounded_and_has_a_share_of_the_noise() -> None:
    """However steep its rows: what is masked is the clipped update, and noise on its own grid."""
    recipe = Wide(flat=False)
    brief = Brief(Params(recipe.build().state_dict()))
    task, rows = Task(TaskId("t"), RunId("r"), 1, SITES[0], "train", brief), rows_of(90, 1)
    steep = Training(lr=1000.0, steps=3)
    event = training_event(steep, BY_SITE, 90)
    share, step = event.noise * BY_SITE.clip / math.sqrt(5), grain_of(steep, BY_SITE)
    assert step == pytest.approx(share / FINENESS, rel=1e-12)
    bound, _ = Trainer(recipe, steep, replace(BY_SITE, mode="site_central", sharers=0)).train(
        task, rows, {}, seed=0
    )
    exact = bound.delta.buffers[torch.float32].double()
    assert 0.49 < float(exact.norm()) <= 0.5
    trainer = Trainer(recipe, steep, BY_SITE)
    whole, kept = trainer.share(task, rows, {}, seed=0, public_rows=90)
    steps = torch.from_numpy(shares_of(whole, brief)["noised:float32"])
    assert torch.equal(steps, steps.round()) and not kept
    assert abs(chi_square(steps * step - exact, share)) < 5
    update, _ = trainer.train(task, rows, {}, seed=0, public_rows=90)  # for a sum in the open
    assert (update.weight, update.metrics, update.slots) == (1.0, {}, {})
    assert abs(chi_square(update.delta.buffers[torch.float32].double() - exact, share)) < 5
    with pytest.raises(Refused, match="beside the delta, which the clip of a whole site"):
        trainer.share(
            replace(task, brief=replace(brief, rule="fednova")), rows, {}, seed=0, public_rows=90
        )


def test_a_site_as_a_unit_pays_as_where_the_coordinator_adds_the_noise() -> None:
    central = replace(BY_SITE, mode="site_central", sharers=0)
    assert training_event(ONE_STEP, BY_SITE, 7) == training_event(ONE_STEP, central, 90)
    assert unit_of("site_distributed") == "site"
    with pytest.raises(Refused, match="scores are not noised under site_distributed"):
        evaluation_event(BY_SITE)


def test_modes_and_rules_that_share_no_noise_give_no_share() -> None:
    recipe = Wide(flat=True)
    brief = Brief(Params(recipe.build().state_dict()))
    task, rows = Task(TaskId("t"), RunId("r"), 1, SITES[0], "train", brief), rows_of(9, 1)
    alone = replace(SHARED, mode="record", sharers=0)
    with pytest.raises(ConfigError, match="'record': its sites share no noise"):
        Trainer(recipe, ONE_STEP, alone).share(task, rows, {}, seed=0, public_rows=9)
    with pytest.raises(Refused, match="rule prox in mode record_distributed"):
        bent = replace(task, brief=replace(brief, rule="prox", settings={"mu": 0.1}))
        Trainer(recipe, ONE_STEP, SHARED).share(bent, rows, {}, seed=0, public_rows=9)
    assert grain_of(ONE_STEP, alone) == 0.0


@pytest.mark.parametrize("make", MAKERS)
def test_a_site_accounts_for_the_sum_whatever_its_own_rows(make: MakeExecutor) -> None:
    events = {training_event(ONE_STEP, SHARED, count) for count in COUNTS}
    assert len(events) == 1  # all sites set the same noise, so each knows the sum's
    [event] = events
    assert event.sampling == 1.0
    spent = [update.epsilon for update in updates(make, flat=True)]
    assert spent == [epsilon([event], SHARED.delta)] * 5
    whole = [SampledGaussian(1.0, event.noise, SHARED.rounds)]
    assert 2.9 < epsilon(whole, SHARED.delta) <= SHARED.epsilon


@pytest.mark.parametrize("make", MAKERS)
def test_the_sum_keeps_its_claim_and_one_site_s_update_alone_does_not(make: MakeExecutor) -> None:
    """The mode holds under secure aggregation and nowhere else, which canaries show."""
    privacy = replace(SHARED, rounds=4)
    audit = Audit(BreastCancer(), privacy, steps=1, make=make)
    assert not judge([audit.play(seed) for seed in range(2)], 3.0, 1e-5).broken
    bare = replace(privacy, mode="record", sharers=0, epsilon=_epsilon_of_a_share(privacy))
    seen = Audit(BreastCancer(), bare, steps=1, make=make)
    assert judge([seen.play(seed) for seed in range(2)], 3.0, 1e-5).broken


def _epsilon_of_a_share(privacy: Privacy) -> float:
    event = training_event(ONE_STEP, privacy, 1)
    share = SampledGaussian(1.0, event.noise / math.sqrt(privacy.sharers), privacy.rounds)
    return epsilon([share], privacy.delta)


@pytest.mark.parametrize("make", MAKERS)
def test_a_share_of_noise_too_small_is_caught_by_the_audit_of_the_sum(
    make: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale(monkeypatch, noise=1 / math.sqrt(5))  # as if variance and deviation were confused
    audit = Audit(BreastCancer(), replace(SHARED, rounds=4), steps=1, make=make)
    assert judge([audit.play(seed) for seed in range(2)], 3.0, 1e-5).broken


def test_a_site_reports_nothing_beside_its_sum() -> None:
    """Norms or control variates of an update with a fifth of the noise would leak the rest."""
    recipe = Wide(flat=False)
    params = Params(recipe.build().state_dict())
    trainer = Trainer(recipe, ONE_STEP, SHARED)
    for rule in ("fedexp", "scaffold", "fednova", "prox"):
        brief = Brief(params, rule, {"mu": 0.1}, {"c": params.zeros()})
        task = Task(TaskId("t"), RunId("r"), 1, SITES[0], "train", brief)
        with pytest.raises(Refused, match=f"rule {rule} in mode record_distributed"):
            trainer.train(task, rows_of(9, 1), {}, seed=0, public_rows=9)


@pytest.mark.parametrize(
    "training", [Training(lr=1.0, steps=2), Training(lr=1.0, steps=1, batch_size=4)]
)
def test_a_site_refuses_steps_whose_noise_it_cannot_know(training: Training) -> None:
    with pytest.raises(ConfigError, match="set steps=1 and batch_size=0"):
        training_event(training, SHARED, 100)


def test_scores_are_paid_for_as_in_mode_record() -> None:
    task = Task(
        TaskId("t"), RunId("r"), 1, SITES[0], "evaluate",
        Brief(Params(BreastCancer().build().state_dict())),
    )  # fmt: skip
    rows = Rows(BreastCancer().example(30), torch.zeros(30, dtype=torch.long))
    with pytest.raises(Refused, match="no scores leave this site"):
        evaluate(BreastCancer(), task, rows, SHARED)
    paid = replace(SHARED, evaluation_epsilon=0.5)
    assert len({evaluate(BreastCancer(), task, rows, paid).count for _ in range(20)}) > 3


def test_sharers_are_for_the_mode_that_shares() -> None:
    for mode, sharers in (
        ("record", 3),
        ("none", 1),
        ("record_distributed", 0),
        ("site_central", 2),
        ("site_distributed", 0),
    ):
        with pytest.raises(ConfigError, match=r"privacy\.sharers"):
            Privacy(mode, 1.0, 1e-5, sharers=sharers)  # type: ignore[arg-type]
