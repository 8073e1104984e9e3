"""Promises that every executor keeps; `Inline` is the reference for the others."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from fedml.errors import Refused
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Report, Slots, Task, Update
from fedml.rounds import Plan, SiteLost
from fedml.simulation import executors
from fedml.simulation.executors.auto import Auto
from fedml.simulation.executors.base import CutTask, Executor, MakeExecutor, Memory
from fedml.simulation.executors.cluster import Cluster
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import STRATEGIES
from tests.simulation.worlds import (
    Single,
    engine,
    holdings,
    made,
    plan,
    recipe,
    singles,
    start,
    taught,
)

ROUNDED: list[MakeExecutor] = [Vectorised, Auto]  # equal to the reference up to rounding
ELSEWHERE: list[MakeExecutor] = [Cluster]  # its workers do not see what a test changes here
RECORD = Privacy("record", epsilon=5.0, delta=1e-5, rounds=3, evaluation_epsilon=1.0)


def discover() -> Iterator[type]:
    """Yield every class of the package that is made and run as an executor is."""
    wanted = ["plan", "recipe", "holdings", "memory"]
    for found in pkgutil.iter_modules(executors.__path__):
        module = importlib.import_module(f"{executors.__name__}.{found.name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
                if [field.name for field in fields][:4] == wanted:
                    yield kind


EXECUTORS = {kind.__name__: kind for kind in discover()}
SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]
PARAMS = [
    pytest.param(kind, marks=SLOW if kind is Cluster else [], id=name)
    for name, kind in EXECUTORS.items()
]


def test_discovery_finds_executors_where_they_are() -> None:
    assert {"Inline", "Vectorised", "Processes", "Cluster", "Auto"} <= EXECUTORS.keys()


@pytest.fixture(params=PARAMS)
def make(request: pytest.FixtureRequest) -> Iterator[MakeExecutor]:
    chosen: MakeExecutor = request.param
    if chosen is Cluster:
        request.getfixturevalue("ray_nodes")
    yield chosen


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[None]:
    """A Ray cluster of two nodes of one core each, both on this machine."""
    pytest.importorskip("ray", reason="needs the extra ray")
    from tests.simulation.ray_nodes import two_nodes

    with two_nodes():
        yield


def tasks(kind: str = "train", number: int = 1, rule: str = "plain") -> list[Task]:
    run = RunId("r")
    return [
        Task(
            TaskId(f"r.{number}.{site}"), run, number, site,
            "train" if kind == "train" else "evaluate", Brief(start(), rule),
        )
        for site in holdings()
    ]  # fmt: skip


def answers(make: MakeExecutor, a_plan: Plan, work: Sequence[Task]) -> dict[SiteId, Single]:
    found = {one.site: one for one in singles(make(a_plan, recipe(), holdings(), Memory()), work)}
    assert found.keys() == {task.site for task in work}
    return found


def digests(found: dict[SiteId, Single]) -> dict[SiteId, str]:
    updates = [one for one in found.values() if isinstance(one, Update)]
    assert len(updates) == len(found)
    return {one.site: one.delta.digest() for one in updates}


def test_each_task_gets_one_answer_of_its_kind(make: MakeExecutor) -> None:
    for kind, answer in (("train", Update), ("evaluate", Report)):
        work = tasks(kind)
        for one in answers(make, plan(), work).values():
            assert isinstance(one, answer)
            assert (one.task, one.round) == (f"r.1.{one.site}", 1)


def test_updates_have_the_reference_s_bytes_and_reports_its_numbers(make: MakeExecutor) -> None:
    expected, found = answers(Inline, plan(), tasks()), answers(make, plan(), tasks())
    if make not in ROUNDED:
        assert digests(found) == digests(expected)
    for site, one in expected.items():
        other = found[site]
        assert isinstance(one, Update)
        assert isinstance(other, Update)
        gap = (other.delta - one.delta).norm()
        assert gap <= 1e-5 * one.delta.norm()
        assert (other.weight, other.slots) == (one.weight, one.slots)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert answers(make, plan(), tasks("evaluate")) == answers(Inline, plan(), tasks("evaluate"))


def test_the_order_of_tasks_changes_no_bit(make: MakeExecutor) -> None:
    backwards = answers(make, plan(), tasks()[::-1])
    assert digests(backwards) == digests(answers(make, plan(), tasks()))


def test_a_seed_orders_batches(make: MakeExecutor) -> None:
    other = replace(plan(), seed=1)
    assert digests(answers(make, other, tasks())) != digests(answers(make, plan(), tasks()))


def test_a_task_cut_short_is_the_start_of_the_whole(make: MakeExecutor) -> None:
    epochs = replace(plan(), training=Training(lr=1.0, epochs=4, batch_size=32, momentum=0.5))
    for work, done in ((0.25, replace(epochs.training, epochs=1)), (0.75, None), (0.001, None)):
        batches = {site: math.ceil(len(one.train) / 32) for site, one in holdings().items()}
        cut = [CutTask(t.id, t.run, t.round, t.site, t.kind, t.brief, work) for t in tasks()]
        found = digests(answers(make, epochs, cut))
        for task in tasks():
            steps = max(1, round(work * 4 * batches[task.site]))
            training = done or replace(epochs.training, epochs=0, steps=steps)
            expected = answers(Inline, replace(epochs, training=training), tasks())
            assert found[task.site] == digests(expected)[task.site]
    whole = digests(answers(make, epochs, tasks()))
    assert not set(whole.values()) & set(found.values())


def test_a_site_that_cannot_is_lost_and_the_others_are_not(make: MakeExecutor) -> None:
    work = tasks()
    work[1] = replace(work[1], brief=Brief(start(), "no-such-rule"))
    found = answers(make, plan(), work)
    lost = found[work[1].site]
    assert isinstance(lost, SiteLost)
    assert "no-such-rule" in lost.reason
    assert (lost.task, lost.final) == (work[1].id, True)
    assert sum(isinstance(one, Update) for one in found.values()) == 3


def test_private_noise_never_repeats_and_its_cost_adds_up(make: MakeExecutor) -> None:
    private = plan(privacy=RECORD)
    executor = make(private, recipe(), holdings(), Memory())
    first, second = by_site(executor), by_site(executor)
    spent = []
    for one, two in ((first[site], second[site]) for site in holdings()):
        assert isinstance(one, Update)
        assert isinstance(two, Update)
        assert one.delta != two.delta
        spent.append((one.epsilon, two.epsilon))
    assert all(0 < once < twice < RECORD.epsilon for once, twice in spent)
    reference = by_site(Inline(private, recipe(), holdings(), Memory()))
    assert all(
        isinstance(one, Update) and one.epsilon == pytest.approx(spent[number][0], rel=1e-9)
        for number, one in enumerate(reference[site] for site in holdings())
    )


def by_site(executor: Executor) -> dict[SiteId, Single]:
    return {one.site: one for one in singles(executor, tasks())}


def test_private_updates_are_drawn_from_the_reference_s_distribution(make: MakeExecutor) -> None:
    private = plan(privacy=replace(RECORD, epsilon=0.5))  # so that noise is nearly all there is

    def spread(kind: MakeExecutor) -> float:
        executor, values = kind(private, recipe(), holdings(), Memory()), list[float]()
        for _ in range(8):
            for one in singles(executor, tasks()):
                assert isinstance(one, Update)
                values += [v for buffer in one.delta.buffers.values() for v in buffer.tolist()]
        return statistics.pstdev(values)

    assert spread(make) == pytest.approx(spread(Inline), rel=0.15)  # six times its deviation


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_comes_to_the_reference_s_parameters(make: MakeExecutor, name: str) -> None:
    a_plan = plan(strategy=made(name), rounds=4)  # of which three grow a tree

    def final(kind: MakeExecutor) -> Params:
        known = taught(a_plan.strategy)
        executor = kind(a_plan, known, holdings(), Memory())
        candidate = engine(a_plan, executor, known).play().candidate
        assert candidate is not None
        return candidate.params

    expected, found = final(Inline), final(make)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert found == expected or make in ROUNDED


def test_private_scores_without_a_budget_are_refused(make: MakeExecutor) -> None:
    unscored = replace(plan(), evaluation=replace(plan().evaluation, at_end=False))
    private = replace(unscored, privacy=replace(RECORD, evaluation_epsilon=0.0))
    for one in answers(make, private, tasks("evaluate")).values():
        assert isinstance(one, SiteLost)
        assert one.final


class Remembering:
    """A local rule that counts in its memory how often its site was asked."""

    reports: frozenset[str] = frozenset()

    def gradient(self, brief: Brief, memory: Slots, params: object, grads: object) -> object:
        """Return `grads`, unless the site has been here before."""
        if "been" in memory:
            raise Refused("been here before")
        return grads

    def finish(self, brief: Brief, memory: Slots, delta: object, path: object) -> object:
        """Remember."""
        return {}, {"been": brief.params}


def test_each_site_has_a_memory_of_its_own(
    make: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedml.strategies import catalogue

    if make in ELSEWHERE:
        pytest.skip("its workers have the installed rules only, and none of those remembers")

    monkeypatch.setitem(catalogue.RULES.ours, "remembering", Remembering())
    executor = make(plan(), recipe(), holdings(), Memory())
    work = tasks(rule="remembering")
    assert all(isinstance(one, Update) for one in singles(executor, work[:2]))
    kinds = {one.site: type(one) for one in singles(executor, work)}
    assert [kinds[task.site] for task in work] == [SiteLost, SiteLost, Update, Update]
