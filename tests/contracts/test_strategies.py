"""Promises that every strategy keeps, ours and any that is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.func import functional_call

from fedml.params import Params, decode, encode
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Brief, Slots, Update
from fedml.strategies import (
    RULES,
    STATISTICS,
    STRATEGIES,
    Follower,
    Forest,
    Sample,
    ServerState,
    Strategy,
    Twofold,
    build,
    describe,
    first_model,
    own_model,
    specimen,
)

Bend = Callable[[Brief, Slots, Params, Params], Params]
Memory = dict[int, Slots]  # what each site keeps

NAMES = sorted(STRATEGIES)
TARGET = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return build({"name": request.param})


def model(strategy: Strategy) -> Params:
    """A model with a counter, as batch normalisation has one, or what the strategy wants."""
    if hasattr(strategy, "specimen"):
        return specimen(strategy)
    return Params({"w": torch.zeros(2, 2), "seen": torch.tensor(0), "flag": torch.tensor(False)})


def square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (output - target).square().sum()


def sample(params: Params) -> Sample:
    """Rows by which the target is found: one that says it, or many for a model of its own kind."""
    if "w" in params:
        return Sample(torch.zeros(1), TARGET, lambda at: at["w"], square)
    if "bias" in params:
        return components()
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    y = TARGET[(x[:, 0] > 0.3).long(), (x[:, 1] > 0.6).long()][:, None]
    forest = Forest(2, trees=params["leaf"].shape[0], depth=2, bins=32)
    return Sample(x, y, lambda at: functional_call(forest, dict(at), (x,)), square)


def components() -> Sample:
    """Rows along two directions of three, and how far along they are, either way."""
    along = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1])
    basis = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    mean, turned = along.mean(0), torch.linalg.svd(along - along.mean(0), full_matrices=False).Vh
    y = ((along - mean) @ turned.T).abs()
    return Sample(
        along @ basis,
        y,
        lambda at: along @ basis @ at["weight"].T + at["bias"],
        lambda output, target: square(output.abs(), target),
    )


def loss(params: Params) -> float:
    return float(sample(params).loss(params))


def update(brief: Brief, number: int, site: int, memory: Memory) -> Update:
    """What a site sends that walks halfway to the target, in steps of its rule."""
    here = brief.params
    who = (TaskId(f"t{site}"), number, SiteId(f"s{site}"))
    if "w" not in here:
        delta, slots = STATISTICS[brief.rule].measure(brief, sample(here))
        return Update(*who, delta, 200.0 * (1 + site), slots)
    step = Params({"w": here["w"] * 0, "seen": torch.tensor(7 + site), "flag": torch.tensor(True)})
    if brief.rule in STATISTICS:
        delta, slots = STATISTICS[brief.rule].measure(brief, sample(here))
        return Update(*who, delta + step, 1.0 + site, slots)
    rule, own = RULES[brief.rule], memory.get(site, {})

    def descended(here: Params, bend: Bend) -> Params:
        nonlocal own
        for number in range(1, 4):
            pull = Params({"w": here["w"] - TARGET, "seen": here["seen"] * 0, "flag": here["flag"]})
            here = here.zip(bend(brief, own, here, pull), lambda w, g: w - 0.2 * g)
            if isinstance(rule, Follower):
                own = rule.follow(brief, own, here, number)
        return here

    start = first_model(brief, own)
    delta = (descended(start, rule.gradient) - start) + step
    if isinstance(rule, Twofold):
        own = {**own, "own": descended(own_model(brief, own), rule.own_gradient)}
    path = {"lr": 0.2, "momentum": 0.0, "steps": 3.0, "loss": loss(brief.params)}
    told, memory[site] = rule.finish(brief, own, delta, path)
    slots = dict(told)
    return Update(*who, slots.pop("delta", delta), 1.0 + site, slots)


def advance(
    strategy: Strategy,
    state: ServerState,
    memory: Memory | None = None,
    order: tuple[int, ...] = (0, 1, 2),
) -> ServerState:
    """Return the state after a round; sites remember in `memory`, or nothing yet."""
    brief, reduction = strategy.brief(state), strategy.reducer.start()
    memory = {} if memory is None else memory
    for site in order:
        reduction.add(update(brief, state.step + 1, site, memory))
    return strategy.advance(state, reduction.result())


def test_it_learns(strategy: Strategy) -> None:
    state, memory = strategy.start(model(strategy)), Memory()
    first = loss(state.params)
    for _ in range(250):
        state = advance(strategy, state, memory)
    assert loss(state.params) < 0.25**2 * first


def test_a_round_changes_no_input(strategy: Strategy) -> None:
    state = advance(strategy, strategy.start(model(strategy)))  # so that slots are not zero
    before = [part.digest() for part in (state.params, *state.slots.values())]
    advance(strategy, state)
    assert [part.digest() for part in (state.params, *state.slots.values())] == before


def test_the_next_state_has_the_bits_of_no_order(strategy: Strategy) -> None:
    state = advance(strategy, strategy.start(model(strategy)))
    one, other = advance(strategy, state), advance(strategy, state, order=(2, 0, 1))
    assert one.params.digest() == other.params.digest()
    assert {name: slot.digest() for name, slot in one.slots.items()} == {
        name: slot.digest() for name, slot in other.slots.items()
    }


def test_a_run_that_was_written_down_goes_on_to_the_same_bits(strategy: Strategy) -> None:
    state, memory = strategy.start(model(strategy)), Memory()
    for _ in range(3):
        state = advance(strategy, state, memory)
    parts = decode(b"".join(encode({"": state.params, **state.slots})))
    again = ServerState(parts.pop(""), parts, state.step)
    read: Memory = {k: decode(b"".join(encode(v))) if v else {} for k, v in memory.items()}
    for _ in range(3):
        state, again = advance(strategy, state, memory), advance(strategy, again, read)
    assert (again.params, again.slots) == (state.params, state.slots)
    assert read == memory


def test_state_and_slots_keep_the_model_s_layout(strategy: Strategy) -> None:
    state = advance(strategy, strategy.start(model(strategy)))
    for part in (state.params, *state.slots.values()):
        assert part.layout == model(strategy).layout
    assert strategy.brief(state).params == state.params


def test_counters_count_on_and_are_never_averaged(strategy: Strategy) -> None:
    if "seen" not in model(strategy):
        pytest.skip("a model of its own kind, which counts nothing")
    state = advance(strategy, advance(strategy, strategy.start(model(strategy))))
    assert int(state.params["seen"]) == 18  # the site that counted furthest: 9, twice
    assert state.params["seen"].dtype == torch.int64


def test_steps_are_counted(strategy: Strategy) -> None:
    state = strategy.start(model(strategy))
    assert state.step == 0
    assert advance(strategy, state).step == 1


def test_its_rule_is_installed_and_its_settings_are_numbers(strategy: Strategy) -> None:
    brief = strategy.brief(strategy.start(model(strategy)))
    assert brief.rule in {**RULES, **STATISTICS}
    assert all(isinstance(value, float) for value in brief.settings.values())


def test_it_is_a_frozen_value_that_travels(strategy: Strategy) -> None:
    assert build(describe(strategy)) == strategy
    assert dataclasses.is_dataclass(strategy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.server_lr = 3.0


def test_both_halves_are_deterministic(strategy: Strategy) -> None:
    state = strategy.start(model(strategy))
    torch.manual_seed(1)
    one = advance(strategy, state)
    torch.manual_seed(2)
    assert advance(strategy, state).params.digest() == one.params.digest()
