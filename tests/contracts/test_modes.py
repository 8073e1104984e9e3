"""Every strategy and every reducer, in a whole federation: what a plan takes works, and goes on.

Both are found by discovery, in the tables and in the files beside them: whoever adds one has to
pass here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch

from fedml.errors import Contradiction
from fedml.learning.recipe import Rows, identify
from fedml.params import Params
from fedml.protocol.messages import SiteId, Training
from fedml.protocol.tasks import Task
from fedml.rounds import Plan
from fedml.rounds.compatibility import MODES, objections, table, trial
from fedml.simulation.engine import Outcome
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.simulation.population import IID, ShippedData
from fedml.strategies import (
    PCA,
    REDUCERS,
    RULES,
    STATISTICS,
    STRATEGIES,
    FedAvg,
    FedBuff,
    Strategy,
    buffering_of,
)
from tests.simulation import worlds
from tests.simulation.worlds import Late

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"
CASES: Mapping[str, Strategy] = {
    **{name: worlds.made(name) for name in STRATEGIES},
    "pca by moments": PCA(),
    "fedbuff of one model": FedBuff(max_staleness=0),  # under masks too
    **{f"reducer={name}": FedAvg(reducer=kind()) for name, kind in REDUCERS.items()},
}
WAY_OUT = ("use ", "raise ", "set ", "choose ", "sites are trained one by one")
ROUNDS = 4


def modules(package: str = "fedml.strategies") -> Iterator[type]:
    """Yield every class that a file of the package defines for all to use."""
    home = importlib.import_module(package)
    for found in pkgutil.walk_packages(home.__path__, f"{package}."):
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and not kind.__name__.startswith("_") and not getattr(kind, "_is_protocol", 0):
                yield kind


def with_methods(*names: str) -> set[type]:
    return {kind for kind in modules() if all(hasattr(kind, name) for name in names)}


def test_each_algorithm_in_a_file_is_in_its_table() -> None:
    from fedml.strategies import NoisyMean
    from fedml.strategies.robust.rule import Rule

    ours = STRATEGIES.ours
    assert with_methods("start", "brief", "advance") == set(ours.values())
    assert with_methods("gradient", "finish") == {type(rule) for rule in RULES.ours.values()}
    assert with_methods("measure", "reports") == {type(one) for one in STATISTICS.ours.values()}
    inner = {NoisyMean, Rule}  # privacy demands the one, the other is what rules are made of
    assert with_methods("start", "linear", "least") - inner == set(REDUCERS.ours.values())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Strategy:
    return CASES[request.param]


def federation(sites: int, *, grouped: bool = False) -> Mapping[SiteId, Holding]:
    dealt = IID(sites).deal(worlds.recipe(), ShippedData("breast_cancer"))
    if not grouped:
        return dealt

    def by_patient(part: Rows, first: int) -> Rows:  # every two rows are a patient's
        return Rows(part.x, part.y, first + torch.arange(len(part)) // 2)

    return {
        site: Holding(by_patient(one.train, 0), by_patient(one.held_out, 1000))
        for site, one in dealt.items()
    }


def played(strategy: Strategy, mode: str) -> Plan:
    """The plan that the table tries, over rows that there are."""
    plan = trial(strategy, mode)
    steps = 1 if mode == "record_distributed" else 3
    return replace(
        plan,
        model="breast_cancer",
        recipe=identify(worlds.recipe_for(strategy)),
        dataset="breast_cancer",
        training=Training(lr=0.5, steps=steps),
        rounds=ROUNDS,
        privacy=replace(plan.privacy, rounds=ROUNDS),
        secagg=replace(plan.secagg, clip=4.0, weight_cap=500.0),
        attempts=1,
    )


def play(
    plan: Plan,
    folder: Path,
    *,
    make: MakeExecutor = Inline,
    world: Late | None = None,
    kill: int = 0,
) -> Outcome | None:
    """Play on what lies in `folder`; return None if it is killed at its `kill`-th commit."""
    sites = federation(max(3, plan.cohort.quorum), grouped=plan.privacy.mode == "patient")
    if root := getattr(plan.strategy.reducer, "root", ""):
        first = min(sites)
        sites = {SiteId(root) if site == first else site: one for site, one in sites.items()}
    engine, told = worlds.chronicle(
        plan, folder, make, rows=sites, known=worlds.taught(plan.strategy)
    )
    engine.world = world or engine.world
    worlds.kill_at(engine, kill)
    try:
        return engine.play()
    except InterruptedError:
        return None
    finally:
        told.checkpoints.close()


def settled(outcome: Outcome | None) -> tuple[object, ...]:
    assert outcome is not None
    assert outcome.candidate is not None, outcome.end
    return outcome.candidate.params.digest(), outcome.receipts, outcome.end


@pytest.mark.parametrize("mode", MODES)
def test_it_works_or_is_refused_with_the_way_out(case: Strategy, mode: str, tmp_path: Path) -> None:
    reasons = objections(case, mode)
    assert all(any(way in reason for way in WAY_OUT) for reason in reasons), reasons
    if reasons and mode != "vectorised":
        with pytest.raises(Contradiction) as caught:
            trial(case, mode)
        assert caught.value.reasons == reasons
        return
    plan = played(case, mode)
    outcome = play(plan, tmp_path, make=Vectorised if mode == "vectorised" else Inline)
    assert outcome is not None
    assert outcome.candidate is not None, outcome.end
    found = outcome.candidate.params
    assert found.is_finite()
    assert found != Params(worlds.taught(case).build().state_dict())
    for receipt in outcome.receipts:
        assert len(receipt.counted) == plan.cohort.quorum, receipt.missing
        spent = [one.epsilon for one in receipt.counted]
        assert all(value > 0 for value in spent) == (plan.privacy.mode != "none")


def test_masked_sums_come_to_the_plain_model(case: Strategy, tmp_path: Path) -> None:
    if objections(case, "secagg"):
        pytest.skip("the plan refuses it")
    masked = played(case, "secagg")
    plain = replace(masked, secagg=trial(case, "none").secagg)
    one, other = (play(plan, tmp_path / plan.secagg.mode) for plan in (masked, plain))
    assert one is not None
    assert other is not None
    assert one.candidate is not None
    assert other.candidate is not None
    assert (one.candidate.params - other.candidate.params).norm() < 1e-5


def test_vectorised_goes_one_by_one_where_the_table_says_so(case: Strategy) -> None:
    plan = played(case, "none")
    executor = Vectorised(plan, worlds.taught(case), federation(max(3, plan.cohort.quorum)))
    params = Params(worlds.taught(case).build().state_dict())
    why = executor.why_not(case.brief(case.start(params)))
    assert bool(why) == bool(objections(case, "vectorised"))
    assert all(why in reason for reason in objections(case, "vectorised"))


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(case: Strategy, tmp_path: Path) -> None:
    plan = played(case, "none")
    whole = settled(play(plan, tmp_path / "whole"))
    for kill in range(1, ROUNDS):
        folder = tmp_path / str(kill)
        assert play(plan, folder, kill=kill) is None
        assert settled(play(plan, folder)) == whole


def test_no_order_of_arrival_changes_a_bit(case: Strategy, tmp_path: Path) -> None:
    plan = played(case, "none")

    def late(first: int, step: int) -> Late:
        def seconds(task: Task) -> float:
            return 1.0 + (first + step * sum(task.site.encode())) % 13

        return Late(seconds)

    orders = [(0, 0), (0, 1), (12, -1), (5, 5)]
    if (buffering := buffering_of(case)) and buffering.size:
        # who is in a step is who was quick; that follows from the order, and the bits from that
        orders = [(5, 5), (18, 18)]
    digests = {
        settled(play(plan, tmp_path / f"{first}.{step}", world=late(first, step)))[0]
        for first, step in orders
    }
    assert len(digests) == 1


def test_the_page_has_the_table_that_the_code_makes() -> None:
    ours = {name: STRATEGIES[name]() for name in STRATEGIES.ours}
    made = table(ours, {name: REDUCERS[name]() for name in REDUCERS.ours})
    assert f"<!-- fedml strategies --modes -->\n{made}\n<!-- end -->" in PAGE.read_text()


def test_what_is_under_test_is_made_of_its_defaults() -> None:
    for kind in (*STRATEGIES.values(), *REDUCERS.values()):
        assert is_dataclass(kind)
        assert all(
            one.default is not inspect.Parameter.empty
            for one in inspect.signature(kind).parameters.values()
        )
