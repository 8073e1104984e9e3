"""A cohort trained at once comes out as its sites would one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning import gradients
from fedml.learning.cohort import CohortTrainer, Trained
from fedml.learning.gradients import Frame, Functional, Layered, layers_of
from fedml.learning.private_cohort import Release, train_privately
from fedml.learning.recipe import Rows
from fedml.learning.rowstack import RowStack
from fedml.params import Params
from fedml.privacy.accounting import SampledGaussian
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Slots, Stack, Task, Update
from fedml.rounds import Plan, Run, SiteLost
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import Executor, Holding, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import STRATEGIES, XGBoost, build, catalogue
from tests.simulation.models import (
    Toy,
    clusters,
    cross_entropy,
    first,
    forest,
    half_frozen,
    line,
    nearest,
    network,
    normalised,
    perceptron,
    recurrent,
    sites,
    toy_plan,
    weighted,
)  # fmt: skip
from tests.simulation.worlds import Single, singles

EVEN, UNEVEN = (12, 12, 12, 12), (23, 5, 12, 9, 1, 17)
SHORT = Training(lr=0.3, epochs=2, batch_size=5)
HEAVY = Training(lr=0.1, steps=7, batch_size=4, momentum=0.7, weight_decay=0.05)
WHOLE = Training(lr=0.3, steps=3, batch_size=0)


def tasks_of(plan: Plan, recipe: Toy, holdings: Mapping[SiteId, Holding]) -> list[Task]:
    brief = plan.strategy.brief(plan.strategy.start(first(recipe)))
    return [Task(TaskId(f"r.1.{s}"), RunId("r"), 1, s, "train", brief) for s in holdings]


def by_site(
    make: MakeExecutor, plan: Plan, recipe: Toy, holdings: Mapping[SiteId, Holding]
) -> dict[SiteId, Single]:
    executor = make(plan, recipe, holdings, Memory())
    return {one.site: one for one in singles(executor, tasks_of(plan, recipe, holdings))}


def close(one: Params, other: Params, least: float = 0.0) -> None:
    assert one.layout == other.layout
    for dtype, buffer in one.buffers.items():
        if not dtype.is_floating_point:
            assert torch.equal(buffer, other.buffers[dtype])
    assert (one - other).norm() <= 1e-5 * max(one.norm(), least)


def agree(found: dict[SiteId, Single], expected: dict[SiteId, Single]) -> None:
    assert found.keys() == expected.keys()
    for site, one in expected.items():
        other = found[site]
        if isinstance(one, Update):
            assert isinstance(other, Update), other
            close(one.delta, other.delta)
            assert (one.task, one.round, one.weight) == (other.task, other.round, other.weight)
            assert other.metrics == pytest.approx(one.metrics, rel=1e-5)
            assert one.slots.keys() == other.slots.keys()
            for name, slot in one.slots.items():
                close(slot, other.slots[name])
        else:
            assert other == one


def stacks(executor: Executor, tasks: list[Task]) -> list[int]:
    """How many sites each stack holds; fails if anything else comes."""
    found = []
    for answer in executor.run(tasks):
        assert isinstance(answer, Stack), answer
        found.append(len(answer))
    return found


def play(
    make: MakeExecutor, plan: Plan, recipe: Toy, holdings: Mapping[SiteId, Holding]
) -> Outcome:
    executor = make(plan, recipe, holdings, Memory())
    run = Run.begin(RunId("r"), plan, first(recipe))
    return Engine(run, executor, statuses(plan, holdings)).play()


# --- equal to the reference --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_comes_to_the_same_model_and_receipts(name: str) -> None:
    particular = {  # what they are made for
        "newton": Toy(line),
        "xgboost": Toy(forest),
        "kmeans": Toy(clusters, nearest),
        "pca": Toy(line),
    }
    recipe, holdings = particular.get(name, Toy(perceptron)), sites(UNEVEN)
    plan = toy_plan(SHORT, XGBoost(sketch=1) if name == "xgboost" else build({"name": name}))
    one, other = (play(make, plan, recipe, holdings) for make in (Inline, Vectorised))
    assert one.candidate is not None
    assert other.candidate is not None
    close(one.candidate.params, other.candidate.params)
    assert other.candidate.scores == pytest.approx(one.candidate.scores)
    for theirs, ours in zip(one.receipts, other.receipts, strict=True):
        plain = [replace(each, digest="") for each in theirs.counted]
        assert [replace(each, digest="") for each in ours.counted] == plain
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5)
        assert replace(ours, counted=(), metrics={}, model="") == replace(
            theirs, counted=(), metrics={}, model=""
        )


@pytest.mark.parametrize("training", [SHORT, HEAVY, WHOLE], ids=["short", "heavy", "whole"])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("make", [line, perceptron, network])
@pytest.mark.parametrize("loss", [cross_entropy, weighted])
def test_updates_equal_the_reference_s(
    training: Training,
    sizes: tuple[int, ...],
    make: Callable[[], nn.Module],
    loss: Callable[..., torch.Tensor],
) -> None:
    recipe, holdings = Toy(make, loss), sites(sizes)
    plan = toy_plan(training)
    agree(by_site(Vectorised, plan, recipe, holdings), by_site(Inline, plan, recipe, holdings))
    executor = Vectorised(plan, recipe, holdings)
    assert sum(stacks(executor, tasks_of(plan, recipe, holdings))) == len(sizes)


def test_a_bound_on_memory_makes_more_chunks_and_no_other_numbers() -> None:
    recipe, holdings = Toy(perceptron), sites(UNEVEN)
    plan = toy_plan(HEAVY)
    tasks = tasks_of(plan, recipe, holdings)
    executor = Vectorised(plan, recipe, holdings, bytes=40_000)
    assert 1 < max(stacks(executor, tasks)) < len(tasks)
    assert stacks(Vectorised(plan, recipe, holdings, bytes=1), tasks) == [1] * len(tasks)
    agree(
        by_site(functools.partial(Vectorised, bytes=40_000), plan, recipe, holdings),
        by_site(Inline, plan, recipe, holdings),
    )


@pytest.mark.parametrize("far", [False, True])
def test_layer_by_layer_equals_torch_func(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on an accelerator."""
    if far:
        monkeypatch.setattr(gradients, "_is_near", lambda values: False)
    torch.manual_seed(0)
    for make in (line, network):
        recipe = Toy(make)
        params = first(recipe)
        frame = Frame(recipe, recipe.build(), params.layout, torch.float32, params)
        layers = layers_of(recipe.build())
        assert layers is not None
        values = params.buffers[torch.float32] + 0.1 * torch.randn(4, params.layout.bytes // 4)
        x, y, weights = torch.randn(4, 6, 8), torch.randint(0, 3, (4, 6)), torch.rand(4, 6)
        for counts in (None, weights):
            one = Functional(frame)(values, x, y, counts)
            other = Layered(frame, layers)(values, x, y, counts)
            torch.testing.assert_close(one, other)
    assert layers_of(perceptron()) is None


class Drift:
    """A rule with state at the site, in the manner of SCAFFOLD: elementwise."""

    reports = frozenset({"control"})
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        bent = grads.zip(params.zip(brief.params, lambda a, b: a - b), lambda g, d: g + 0.1 * d)
        return bent.zip(memory["c"], lambda g, c: g - c) if memory else bent

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        control = delta.map(lambda d: d / (path["steps"] * path["lr"]))
        kept = control.zip(memory["c"], lambda a, b: 0.5 * (a + b)) if memory else control
        return {"control": control}, {"c": kept}


def test_what_sites_remember_and_report_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.RULES.ours, "drift", Drift())
    recipe, holdings, plan = Toy(perceptron), sites(UNEVEN), toy_plan(SHORT)
    brief = Brief(first(recipe), "drift")
    tasks = [replace(task, brief=brief) for task in tasks_of(plan, recipe, holdings)]
    found = []
    for make in (Vectorised, Inline):
        memory = Memory()
        executor = make(plan, recipe, holdings, memory)
        singles(executor, tasks[:3])
        if make is Vectorised:  # some have been here before: still all in stacks
            assert sum(stacks(Vectorised(plan, recipe, holdings, Memory()), tasks)) == len(tasks)
        found.append(({one.site: one for one in singles(executor, tasks)}, memory))
    (ours, kept), (theirs, expected) = found
    agree(ours, theirs)
    assert kept.slots.keys() == expected.slots.keys()
    for site, slots in expected.slots.items():
        close(slots["c"], kept.slots[site]["c"])


# --- what cannot be batched --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"), [(normalised, "BatchNorm1d mixes"), (recurrent, "rnn")]
)
def test_what_cannot_be_batched_goes_site_by_site_and_says_why(
    make: Callable[[], nn.Module], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, holdings, plan = Toy(make), sites(EVEN), toy_plan(SHORT)
    found = by_site(Vectorised, plan, recipe, holdings)
    told = capsys.readouterr().err
    assert found == by_site(Inline, plan, recipe, holdings)  # to the bit
    assert reason in told
    assert told.count("\n") == 1


def test_a_site_that_diverges_is_lost_alone_with_the_reference_s_reason() -> None:
    recipe, holdings, plan = Toy(), sites(UNEVEN), toy_plan(HEAVY)
    sick = SiteId("site-02")
    rows = holdings[sick].train
    holdings[sick] = replace(holdings[sick], train=Rows(rows.x * 1e38, rows.y))
    found = by_site(Vectorised, plan, recipe, holdings)
    assert isinstance(found[sick], SiteLost)
    agree(found, by_site(Inline, plan, recipe, holdings))


def test_a_site_without_rows_is_lost_alone() -> None:
    recipe, holdings, plan = Toy(), sites((6, 0, 6)), toy_plan(SHORT)
    agree(by_site(Vectorised, plan, recipe, holdings), by_site(Inline, plan, recipe, holdings))


def test_dropout_is_drawn_for_each_site_and_is_the_seed_s() -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    recipe, plan = Toy(dropping), toy_plan(WHOLE)
    same = sites((12,))[SiteId("site-00")]
    holdings = {SiteId(name): same for name in ("a", "b")}
    one, again = (by_site(Vectorised, plan, recipe, holdings) for _ in range(2))
    other = by_site(Vectorised, replace(plan, seed=5), recipe, holdings)
    assert one == again
    deltas = [x.delta for x in (*one.values(), *other.values()) if isinstance(x, Update)]
    assert len({delta.digest() for delta in deltas}) == 4


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Vectorised(toy_plan(SHORT), Toy(), sites(EVEN), device="cuda")
    assert str(caught.value) == "executor.device cuda: no GPU here; use device=cpu"


@pytest.mark.parametrize("changes", [{"precision": "fp8"}, {"bytes": -1}])
def test_odd_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="executor"):
        Vectorised(toy_plan(SHORT), Toy(), sites(EVEN), **changes)  # type: ignore[arg-type]


def test_bf16_rounds_and_still_learns() -> None:
    recipe, holdings = Toy(network), sites((60, 60))
    plan = toy_plan(Training(lr=0.3, epochs=10, batch_size=10))
    exact = by_site(Vectorised, plan, recipe, holdings)
    rough = by_site(functools.partial(Vectorised, precision="bf16"), plan, recipe, holdings)
    for site, one in exact.items():
        other = rough[site]
        assert isinstance(one, Update)
        assert isinstance(other, Update)
        assert 1e-5 < (one.delta - other.delta).norm() / one.delta.norm() < 0.2
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("make", [line, perceptron, network])
def test_a_gpu_comes_to_the_cpu_s_numbers(make: Callable[[], nn.Module]) -> None:
    recipe, holdings, plan = Toy(make), sites(UNEVEN), toy_plan(HEAVY)
    executor = Vectorised(plan, recipe, holdings, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found = {o.site: o for o in singles(executor, tasks_of(plan, recipe, holdings))}
    for site, one in by_site(Inline, plan, recipe, holdings).items():
        other = found[site]
        assert isinstance(one, Update)
        assert isinstance(other, Update)
        assert (one.delta - other.delta.to("cpu")).norm() <= 1e-4 * one.delta.norm()
    run = Run.begin(RunId("r"), plan, first(recipe))
    outcome = Engine(run, executor, statuses(plan, holdings)).play()
    theirs = play(Inline, plan, recipe, holdings)
    assert outcome.candidate is not None
    assert theirs.candidate is not None
    gap = outcome.candidate.params - theirs.candidate.params
    assert gap.norm() <= 1e-4 * theirs.candidate.params.norm()


def test_a_model_that_keeps_what_it_sees_is_refused() -> None:
    class Counting(nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            output: torch.Tensor = self.linear(x)
            return output

    with pytest.raises(ConfigError, match="buffer count keeps"):
        CohortTrainer(Toy(Counting), SHORT, torch.device("cpu"))


# --- privacy -----------------------------------------------------------------------------------

PRIVATE = Privacy("record", epsilon=8.0, delta=1e-5, clip=1.0, rounds=3, evaluation_epsilon=1.0)
DP = Training(lr=0.1, steps=3, batch_size=10, momentum=0.5, weight_decay=0.01)


def test_private_answers_weigh_charge_and_tell_as_the_reference_s_do() -> None:
    recipe, holdings = Toy(half_frozen), sites((40, 25, 31))
    plan = replace(toy_plan(DP), privacy=PRIVATE)
    found = by_site(Vectorised, plan, recipe, holdings)
    for site, one in by_site(Inline, plan, recipe, holdings).items():
        other = found[site]
        assert isinstance(one, Update)
        assert isinstance(other, Update)
        assert one.delta != other.delta
        assert torch.equal(other.delta["0.weight"], torch.zeros(6, 8))
        assert (one.weight, one.metrics) == (other.weight, other.metrics)
        assert one.epsilon == other.epsilon > 0
    tasks = tasks_of(plan, recipe, holdings)
    assert stacks(Vectorised(plan, recipe, holdings), tasks) == [3]


def steps_of(
    recipe: Toy, training: Training, rows: RowStack, events: list[SampledGaussian], clip: float
) -> Trained:
    trainer = CohortTrainer(recipe, training, torch.device("cpu"))
    releases = [Release(e, n) for e, n in zip(events, rows.counts, strict=True)]
    return train_privately(trainer, Brief(first(recipe)), {}, rows, releases, clip)


def test_without_noise_clipping_and_sampling_a_private_step_is_a_plain_one() -> None:
    recipe, holdings = Toy(half_frozen), sites(UNEVEN)
    training = Training(lr=0.3, steps=4, batch_size=0, momentum=0.5)
    expected = by_site(Inline, toy_plan(training), recipe, holdings)
    order = sorted(holdings, key=lambda site: -len(holdings[site].train))
    rows = RowStack.of([holdings[site].train for site in order])
    events = [SampledGaussian(1.0, 1e-12, 4)] * len(order)
    trained = steps_of(recipe, training, rows, events, clip=1e4)
    for row, site in enumerate(order):
        one = expected[site]
        assert isinstance(one, Update)
        close(one.delta, trained.delta.row(row))


def test_a_row_moves_its_own_site_by_the_clipping_norm_at_most_and_no_other() -> None:
    recipe, training = Toy(), Training(lr=1.0, steps=1, batch_size=0)
    rows = RowStack.of([one.train for one in sites((6, 6)).values()])
    wild = RowStack(rows.x.clone(), rows.y, rows.counts)
    wild.x[0, 3] *= 1e6
    events = [SampledGaussian(1.0, 1e-12, 1)] * 2
    gap = steps_of(recipe, training, wild, events, 0.5).delta
    gap -= steps_of(recipe, training, rows, events, 0.5).delta
    assert 0.05 < gap.row(0).norm() * 6 <= 2 * 0.5 + 1e-6  # one row replaced: twice the norm
    assert gap.row(1).norm() < 1e-9


class Pole(nn.Module):
    """A linear layer whose output is infinite where the first input is 99."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = line()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) / (x[:, :1] - 99.0)
        return out


def test_a_row_whose_gradient_is_not_finite_counts_as_zero() -> None:
    recipe, training = Toy(Pole), Training(lr=1.0, steps=1, batch_size=0)
    good = RowStack.of([one.train for one in sites((6, 6)).values()])
    bad = RowStack(good.x.clone(), good.y, good.counts)
    bad.x[0, 5] = 99.0
    events = [SampledGaussian(1.0, 1e-12, 1)] * 2
    found = steps_of(recipe, training, bad, events, 0.5).delta
    without = RowStack(good.x[:, :5], good.y[:, :5], (5, 5))
    rest = steps_of(recipe, training, without, events, 0.5).delta
    assert rest.is_finite()
    close(rest.row(0) * (5 / 6), found.row(0))  # the same sum over the public number of rows
    whole = steps_of(recipe, training, good, events, 0.5).delta
    assert found.row(1) == whole.row(1)


def test_private_moments_are_the_reference_s() -> None:
    """Over many sites with the same rows: mean and variance of the first step, and of noise."""
    recipe, count = Toy(), 400
    rows = sites((30,))[SiteId("site-00")].train.take(range(30))
    training = Training(lr=1.0, steps=1, batch_size=10)
    plan = replace(toy_plan(training), privacy=PRIVATE)
    holdings = {SiteId(f"s{k:03d}"): Holding(rows, rows) for k in range(count)}
    moments = []
    for make in (Vectorised, Inline):
        found = by_site(make, plan, recipe, holdings).values()
        deltas = [one.delta.buffers[torch.float32] for one in found if isinstance(one, Update)]
        moments.append(torch.stack(deltas).double())
    ours, theirs = moments
    assert len(ours.unique(dim=0)) == count  # nobody shares noise
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (2 / count) ** 0.5).all()
    assert ((ours.std(0) / spread - 1).abs() < 5 / count**0.5).all()
    noise = (ours - ours.mean(0)) / ours.std(0)
    assert (noise[1:] * noise[:-1]).mean().abs() < 5 / (count * noise.shape[1]) ** 0.5


def test_an_empty_sample_is_a_step_of_noise_that_is_fresh_each_time() -> None:
    recipe, training = Toy(), Training(lr=1.0, steps=1, batch_size=1)
    rows = RowStack.of([one.train for one in sites((4, 4)).values()])
    events = [SampledGaussian(1e-9, 1.0, 1)] * 2
    one, again = (steps_of(recipe, training, rows, events, 1.0).delta * 1e-9 for _ in range(2))
    values = torch.cat([d.buffers[torch.float32] for d in (one, again)])
    assert len(values.unique(dim=0)) == 4
    assert (values * 4).std() == pytest.approx(1.0, abs=0.3)  # noise over rate times rows


def test_noise_seeded_from_the_experiment() -> None:
    """Whoever knows the plan, its seed included, must not know the noise."""
    recipe, holdings = Toy(), sites((12, 12))
    everyone = Training(lr=1.0, steps=1, batch_size=0)  # no sampling: only the noise can differ
    plan = replace(toy_plan(everyone), privacy=PRIVATE)
    for make in (Vectorised, Inline):
        once, again = (by_site(make, plan, recipe, holdings) for _ in range(2))
        for site, one in once.items():
            other = again[site]
            assert isinstance(one, Update)
            assert isinstance(other, Update)
            assert one.delta != other.delta


def test_a_model_unfit_for_privacy_is_the_reference_s_refusal() -> None:
    def mixing() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 3), nn.Softmax(dim=0))

    recipe, holdings = Toy(mixing), sites((8, 8))
    plan = replace(toy_plan(DP), privacy=PRIVATE)
    found = by_site(Vectorised, plan, recipe, holdings)
    assert found == by_site(Inline, plan, recipe, holdings)
    assert all(isinstance(one, SiteLost) for one in found.values())
