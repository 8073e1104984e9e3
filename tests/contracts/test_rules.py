"""Promises that every site half keeps, given the brief of its own server half."""

from __future__ import annotations

import pytest
import torch

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.stacked import Stacked
from fedml.strategies import NUMBER, RULES, STRATEGIES, LocalRule, numbers, specimen

PATH = {"lr": 0.1, "momentum": 0.0, "steps": 5.0, "loss": 0.7}


def params(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return Params({"w": torch.randn(7, 3, generator=rng), "n": torch.tensor(seed)})


def briefs() -> dict[str, Brief]:
    """A brief for each rule, of the first strategy that has it; slots are not zero."""
    found: dict[str, Brief] = {}
    for kind in STRATEGIES.values():
        model = specimen(kind()) if hasattr(kind, "specimen") else params(0)
        brief = kind().brief(kind().start(model))
        slots = {name: params(9).map(torch.abs) for name in brief.slots}
        found.setdefault(brief.rule, Brief(brief.params, brief.rule, brief.settings, slots))
    return found


BRIEFS = briefs()
VISITS = ("new", "back")


@pytest.fixture(params=sorted(RULES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def memory_of(rule: LocalRule, brief: Brief, visit: str) -> Slots:
    if visit == "new":
        return {}
    return rule.finish(brief, {}, params(3), PATH)[1]


def test_every_rule_belongs_to_a_strategy() -> None:
    assert RULES.keys() <= BRIEFS.keys()


@pytest.mark.parametrize("visit", VISITS)
def test_it_reports_what_it_says_and_keeps_the_layout(name: str, visit: str) -> None:
    rule, brief = RULES[name], BRIEFS[name]
    memory = memory_of(rule, brief, visit)
    grads, here = params(1), params(2)
    inputs = (brief.params, *brief.slots.values(), *memory.values(), grads, here)
    before = [p.digest() for p in inputs]
    bent = rule.gradient(brief, memory, here, grads)
    bent.check_like(grads)
    assert bent == rule.gradient(brief, memory, here, grads)
    told, kept = rule.finish(brief, memory, here - brief.params, PATH)
    assert told.keys() - {"delta"} == rule.reports
    assert numbers(brief) <= rule.reports
    for slot, part in (*told.items(), *kept.items()):
        assert part.layout == (NUMBER if slot in numbers(brief) else brief.params.layout)
        assert part.is_finite()
    assert [Params(dict(p)).digest() for p in inputs] == before  # afresh: digests are kept


def test_it_bends_many_sites_at_once_as_it_bends_one(name: str) -> None:
    rule, brief = RULES[name], BRIEFS[name]
    if not getattr(rule, "elementwise", False):
        pytest.skip("it says that it cannot")
    memory = memory_of(rule, brief, "back")
    grads, here = [params(1), params(4)], [params(2), params(5)]
    wide = Brief(
        Stacked.repeat(brief.params, 2),
        brief.rule,
        brief.settings,
        {slot: Stacked.repeat(part, 2) for slot, part in brief.slots.items()},
    )
    held = {slot: Stacked.repeat(part, 2) for slot, part in memory.items()}
    bent = rule.gradient(wide, held, Stacked(here), Stacked(grads))
    for row in range(2):
        alone = rule.gradient(brief, memory, here[row], grads[row])
        assert torch.equal(bent["w"][row], alone["w"])
