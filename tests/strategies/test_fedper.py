"""Parameters that stay at home: FedPer and FedBN, from the formula to a coordinator's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedml.errors import ConfigError, Contradiction
from fedml.learning.evaluation import evaluate
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.rounds import Plan
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import (
    RULES,
    FedAvg,
    FedBN,
    FedPer,
    FedRep,
    Personal,
    ServerState,
    Strategy,
)
from tests.simulation.worlds import engine, holdings, plan, recipe, start

SHARES = np.array([1.0, 3.0]) / 4.0
CENTRES = np.array([[1.0, -2.0], [5.0, 2.0]])  # of w and of b
LR, STEPS = 0.1, 3


def both(w: float, b: float) -> Params:
    return Params({"w": torch.tensor([w]).double(), "head.b": torch.tensor([b]).double()})


def played(rounds: int) -> tuple[ServerState, Mapping[int, Slots]]:
    """Site k minimises (w - b - c)^2 / 2 + (b - d)^2 / 2, and keeps b."""
    strategy, rule = FedPer(("head.*",)), RULES["home"]
    assert isinstance(rule, Personal)
    state, memory = strategy.start(both(0.0, 0.5)), dict[int, Slots]()
    for number in range(1, rounds + 1):
        reduction = strategy.reducer.start()
        for k, (c, d) in enumerate(CENTRES):
            brief, own = strategy.brief(state), memory.get(k, {})
            here = start = rule.begin(brief, own)
            for _ in range(STEPS):
                w, b = float(here["w"]), float(here["head.b"])
                here = here - both(w - b - c, -(w - b - c) + b - d) * LR
            path = {"lr": LR, "momentum": 0.0, "steps": float(STEPS)}
            told, memory[k] = rule.finish(brief, own, here - start, path)
            who = (TaskId(f"{k}"), number, SiteId(f"{k}"))
            reduction.add(Update(*who, told["delta"], float(SHARES[k])))
        state = strategy.advance(state, reduction.result())
    return state, memory


def test_fedper_is_algorithms_1_and_2_of_arivazhagan_2019() -> None:
    w, own = 0.0, np.full(2, 0.5)
    for _ in range(9):
        ends = np.zeros(2)
        for k, (c, d) in enumerate(CENTRES):
            x, b = w, own[k]
            for _ in range(STEPS):
                x, b = x - LR * (x - b - c), b - LR * (-(x - b - c) + b - d)
            ends[k], own[k] = x, b
        w = float(SHARES @ ends)
    state, memory = played(9)
    assert float(state.params["w"]) == pytest.approx(w, abs=1e-8)
    assert [float(memory[k]["home"]["head.b"]) for k in range(2)] == pytest.approx(list(own))
    assert float(state.params["head.b"]) == 0.5  # as it was at the start
    assert abs(own[0] - own[1]) > 0.1


def of(strategy: Strategy, **changes: object) -> Plan:
    return replace(plan(strategy=strategy, rounds=3), **changes)  # type: ignore[arg-type]


def final(a_plan: Plan, make: MakeExecutor = Inline) -> tuple[Params, Memory, Mapping[str, float]]:
    memory = Memory()
    candidate = engine(a_plan, make(a_plan, recipe(), holdings(), memory)).play().candidate
    assert candidate is not None
    return candidate.params, memory, candidate.scores


@pytest.mark.parametrize("strategy", [FedPer(), FedBN()])
def test_naming_nothing_is_fedavg_to_the_bit(strategy: Strategy) -> None:
    ours, memory, scores = final(of(strategy))
    avg, _, others = final(of(FedAvg()))
    assert (ours, scores) == (avg, others)
    assert not any(memory.slots.values())


@pytest.mark.parametrize("make", [Inline, Vectorised, Processes])
def test_what_stays_at_home_never_moves_the_global_model(make: MakeExecutor) -> None:
    params, memory, _ = final(of(FedPer(("*.bias",))), make)
    assert torch.equal(params["1.bias"], start()["1.bias"])
    assert not torch.equal(params["1.weight"], start()["1.weight"])
    kept = {site: slots["home"] for site, slots in memory.slots.items()}
    assert kept.keys() == holdings().keys()
    assert len({tuple(home["1.bias"].tolist()) for home in kept.values()}) == len(kept)
    assert all(not home["1.weight"].any() for home in kept.values())


@pytest.mark.parametrize("make", [Inline, Vectorised, Processes])
def test_a_site_is_scored_with_its_own_parameters(make: MakeExecutor) -> None:
    a_plan = of(FedPer(("*.weight",)))
    params, memory, scores = final(a_plan, make)
    right = rows = 0.0
    for site, holding in holdings().items():
        own = Params({**params, "1.weight": memory.slots[site]["home"]["1.weight"]})
        task = Task(TaskId("t"), RunId("r"), 3, site, "evaluate", Brief(own))
        report = evaluate(recipe(), task, holding.held_out, Privacy())
        right, rows = right + report.totals["accuracy"], rows + report.count
    assert scores["accuracy"] == pytest.approx(right / rows, rel=1e-9)
    global_task = Task(TaskId("t"), RunId("r"), 3, SiteId("site-0"), "evaluate", Brief(params))
    plain = evaluate(recipe(), global_task, holdings()[SiteId("site-0")].held_out, Privacy())
    assert plain.totals["accuracy"] / plain.count < scores["accuracy"]


def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    told = "strategy.home 'haed.*' matches no parameter; there are 1.bias, 1.weight"
    for kind in (FedPer, FedRep):
        with pytest.raises(Contradiction) as caught:
            engine(of(kind(("haed.*", "1.*", "tail"))))
        first, second, third = caught.value.reasons
        assert told in first
        assert "'tail' matches no parameter" in second
        assert "names every parameter, so nothing travels" in third
        engine(of(kind(("1.weight",))))
    state = FedAvg().start(start())
    with pytest.raises(ConfigError, match=r"strategy.home 'haed.\*' matches no parameter"):
        RULES["home"].finish(
            replace(FedAvg().brief(state), settings={"haed.*": 1.0}), {}, state.params, {}
        )


def test_batch_normalisation_is_found_whatever_its_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    state = FedBN().start(Params(model.state_dict()))
    rule = RULES["home"]
    brief = FedBN().brief(state)
    delta = state.params.zeros().map(torch.ones_like)
    told, kept = rule.finish(brief, {}, delta, {"lr": 0.1, "steps": 1.0})
    for name in state.params:
        at_home = name.startswith("1.")
        if name != "1.num_batches_tracked":
            assert bool(told["delta"][name].any()) is not at_home
        there = kept["home"][name]
        expected = state.params[name] + delta[name] if at_home else torch.zeros_like(there)
        assert torch.equal(there, expected)


def test_layers_are_found_by_name_too() -> None:
    params = Params({"norm1.weight": torch.ones(2), "fc.weight": torch.ones(2)})
    told, _ = RULES["home"].finish(
        FedBN().brief(FedBN().start(params)), {}, params, {"lr": 0.1, "steps": 1.0}
    )
    assert told["delta"]["norm1.weight"].tolist() == [0.0, 0.0]
    assert told["delta"]["fc.weight"].tolist() == [1.0, 1.0]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedper.server_lr 0.0: must be above 0"):
        FedPer(server_lr=0.0)
    with pytest.raises(ConfigError, match=r"fedbn.server_lr -1.0: must be above 0"):
        FedBN(server_lr=-1.0)
