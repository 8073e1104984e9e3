"""FedRep: head and representation take turns, from the formula to real sites."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError, Contradiction
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Slots, Task
from fedml.simulation.executors.base import Memory
from fedml.simulation.executors.inline import Inline
from fedml.strategies import RULES, FedAvg, FedRep, Strategy
from fedml.strategies.base import Follower
from fedml.strategies.fedrep import Alternate
from tests.simulation.worlds import Deep, engine, holdings, plan, recipe, start

LR, HEAD, STEPS = 0.1, 3, 5
CENTRES = np.array([[1.0, -2.0], [5.0, 2.0]])


def both(w: float, b: float) -> Params:
    return Params({"w": torch.tensor([w]).double(), "head.b": torch.tensor([b]).double()})


def test_it_is_algorithm_1_of_collins_2021() -> None:
    """Site k minimises (w - b - c)^2 / 2 + (b - d)^2 / 2: b for three steps, and w for two."""
    strategy, rule = FedRep(("head.*",), HEAD), RULES["fedrep"]
    assert isinstance(rule, Alternate)
    assert isinstance(rule, Follower)
    state, memory = strategy.start(both(0.0, 0.5)), list[Slots]([{}, {}])
    w, own = 0.0, np.full(2, 0.5)
    for _ in range(4):
        brief, deltas, ends = strategy.brief(state), list[Params](), np.zeros(2)
        for k, (c, d) in enumerate(CENTRES):
            x = w
            for _ in range(HEAD):
                own[k] -= LR * (-(x - own[k] - c) + own[k] - d)
            for _ in range(STEPS - HEAD):
                x -= LR * (x - own[k] - c)
            ends[k] = x
            kept = memory[k]
            here = began = rule.begin(brief, kept)
            for step in range(1, STEPS + 1):
                v, b = float(here["w"]), float(here["head.b"])
                plain = both(v - b - c, -(v - b - c) + b - d)
                here = here - rule.gradient(brief, kept, here, plain) * LR
                kept = rule.follow(brief, kept, here, step)
            path = {"lr": LR, "momentum": 0.0, "steps": float(STEPS)}
            told, memory[k] = rule.finish(brief, kept, here - began, path)
            deltas.append(told["delta"])
        w = float(ends.mean())
        mean = (deltas[0] + deltas[1]) * 0.5
        state = replace(state, params=state.params + mean, step=state.step + 1)
        assert float(state.params["w"]) == pytest.approx(w, abs=1e-12)
        found = [float(memory[k]["home"]["head.b"]) for k in range(2)]
        assert found == pytest.approx(list(own), abs=1e-12)


def final(strategy: Strategy) -> tuple[Params, Memory]:
    a_plan, memory = plan(strategy=strategy), Memory()
    candidate = engine(a_plan, Inline(a_plan, recipe(), holdings(), memory)).play().candidate
    assert candidate is not None
    return candidate.params, memory


def test_naming_nothing_is_fedavg_to_the_bit() -> None:
    ours, memory = final(FedRep())
    assert ours == final(FedAvg())[0]
    assert not any(memory.slots.values())


def test_what_travels_waits_for_the_head_at_every_site() -> None:
    moves, memory = final(FedRep(("1.weight",), head_steps=2))  # a task has three steps
    assert all(bool(slots["home"]["1.weight"].any()) for slots in memory.slots.values())
    assert not torch.equal(moves["1.bias"], start()["1.bias"])
    assert torch.equal(moves["1.weight"], start()["1.weight"])


def test_turns_are_taken_step_by_step_where_sites_train() -> None:
    deep, site = Deep(), SiteId("site-0")
    begun = Params(deep.build().state_dict())
    strategy = FedRep(("3.*",), head_steps=1)
    brief = strategy.brief(strategy.start(begun))
    task = Task(TaskId("t"), RunId("r"), 1, site, "train", brief)
    first = begun["3.weight"]
    for steps, moved in ((1, False), (2, True)):
        trainer = Trainer(deep, Training(lr=0.5, steps=steps), Privacy())
        update, kept = trainer.train(task, holdings()[site].train, {}, seed=1)
        assert bool(update.delta["1.weight"].any()) is moved
        assert kept.keys() == {"home"}
        first = kept["home"]["3.weight"] if steps == 1 else first
        assert torch.equal(kept["home"]["3.weight"], first)  # it stood still afterwards


def test_momentum_and_bad_settings_are_refused() -> None:
    moved_on = r"strategy fedrep with training.momentum 0.9: it would .*, set it to 0"
    a_plan = plan(strategy=FedRep(("1.weight",), head_steps=2))
    with pytest.raises(Contradiction, match=moved_on) as caught:
        replace(a_plan, training=Training(lr=0.1, steps=2, momentum=0.9))
    assert "head_steps 2 with training.steps 2: none is left" in caught.value.reasons[1]
    brief = FedRep().brief(FedRep().start(start()))
    with pytest.raises(ConfigError, match=moved_on):  # at a site, whoever asks
        Alternate().finish(brief, {}, start(), {"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"fedrep.head_steps 0: must be 1 or more"):
        FedRep(head_steps=0)
