"""What rounding means for a run, without a network: what sites see, what counts, what is kept."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from fedml.errors import ConfigError, Contradiction
from fedml.params import Params
from fedml.protocol.parcels import rounded
from fedml.protocol.tasks import Brief, Stack, Task, Update
from fedml.rounds import (
    Committed,
    Evaluation,
    Plan,
    Run,
    SendTask,
    StackArrived,
    UpdateArrived,
    Wire,
)
from fedml.rounds.round import Close, Fail, Opening, Round
from fedml.stacked import Stacked
from fedml.strategies import FedAvg, FedDyn, Scaffold, ServerState, WeightedMean
from tests.rounds.worlds import ALL, RUN, SITES, plan

START = Params({"w": torch.tensor([1 / 3, -0.1]), "n": torch.tensor([2**24 + 1])})
DELTA = {site: torch.tensor([0.1, -0.7]) * (k + 1) for k, site in enumerate(SITES)}


def update(task: Task, delta: torch.Tensor) -> Update:
    whole = Params({"w": delta, "n": torch.tensor([1])})
    return Update(task.id, task.round, task.site, whole, 1.0 + SITES.index(task.site))


@dataclass(frozen=True)
class Played:
    """The digests of a run's models, the last one, and the brief with which it was scored."""

    digests: tuple[str, ...]
    model: Params
    scored: Brief


def play(wire: Wire, order: tuple[int, ...] = (0, 1, 2), *, by_sites: bool = False) -> Played:
    """Play two rounds; `by_sites` the sites round their deltas themselves."""
    a_plan = plan(wire=wire, strategy=FedAvg(), evaluation=Evaluation(at_end=True), rounds=2)
    run = Run.begin(RUN, a_plan, START)
    tasks = opened(run)
    for _ in range(2):
        for place in order:
            answer = update(tasks[place], DELTA[tasks[place].site])
            if by_sites:
                answer = replace(answer, delta=rounded(answer.delta))
            run.handle(UpdateArrived(answer), 0.0)
        tasks = [c.task for c in run.handle(Committed(), 0.0) if isinstance(c, SendTask)]
    digests = tuple(receipt.model for receipt in run.receipts)
    return Played(digests, run.state.params, tasks[0].brief)


def opened(run: Run) -> list[Task]:
    """Return the tasks of a run's first round."""
    commands = [*run.open(0.0), *run.handle(ALL, 0.0)]
    return [command.task for command in commands if isinstance(command, SendTask)]


def a_round(least: int) -> tuple[Round, list[Task]]:
    """Return a round that rounds, and its tasks."""
    it = Round(Opening(RUN, 1, 1, SITES, least, 60.0), WeightedMean(), coarse=True)
    return it, [c.task for c in it.open(Brief(START)) if isinstance(c, SendTask)]


def test_sites_train_on_the_rounded_model_and_the_coordinator_keeps_its_own() -> None:
    run = Run.begin(RUN, plan(wire=Wire(down="bf16")), START)
    seen = [task.brief.params for task in opened(run)]
    assert all(params["w"].tolist() == [0.333984375, -0.10009765625] for params in seen)
    assert all(params["n"].tolist() == [2**24 + 1] for params in seen)
    assert run.state.params is START


def test_the_next_model_is_the_coordinator_s_own_plus_the_mean_of_the_deltas() -> None:
    """Rounding on the way down is forgotten after each round: w moves by what the sites moved."""
    assert play(Wire()).digests == play(Wire(down="bf16")).digests  # these sites move alike


def test_what_is_scored_is_what_would_be_released_and_not_rounded() -> None:
    played = play(Wire(down="bf16", up="bf16"))
    assert played.scored.params == played.model != rounded(played.model)


def test_what_counts_is_rounded_whether_or_not_its_site_has_done_so() -> None:
    """A site of an older version sends its update whole; a simulated one never rounds."""
    wire = Wire(up="bf16")
    assert play(wire).digests == play(wire, by_sites=True).digests != play(Wire()).digests


@pytest.mark.parametrize("wire", [Wire(up="bf16"), Wire(down="bf16+delta", up="bf16+zstd")])
def test_the_same_bytes_for_any_order_of_arrival(wire: Wire) -> None:
    digests = {
        play(wire, order, by_sites=by_sites).digests
        for order in itertools.permutations(range(3))
        for by_sites in (False, True)
    }
    assert len(digests) == 1


def test_a_stack_counts_as_its_rows_do() -> None:
    one, tasks = a_round(3)
    updates = [update(task, DELTA[task.site]) for task in tasks]
    [singly] = [command for each in updates for command in one.handle(UpdateArrived(each))]
    stack = Stack(
        1,
        SITES,
        tuple(each.task for each in updates),
        Stacked([each.delta for each in updates]),
        tuple(each.weight for each in updates),
    )
    [at_once] = a_round(3)[0].handle(StackArrived(stack))
    assert isinstance(singly, Close)
    assert isinstance(at_once, Close)
    assert singly.total == at_once.total


def test_an_update_that_rounds_to_infinity_is_refused() -> None:
    one, tasks = a_round(1)
    for task in tasks:
        commands = one.handle(UpdateArrived(update(task, torch.tensor([3.4e38, 0.0]))))
    [end] = commands
    assert isinstance(end, Fail)
    assert all("diverged" in reason for reason in end.account.missing.values())


# --- plans --------------------------------------------------------------------------------------


def test_a_plan_with_a_wire_reads_back_and_one_without_says_nothing_of_it() -> None:
    """Coordinators from before refuse words they do not know; exact is what they do anyway."""
    packed = plan(wire=Wire(down="delta", up="bf16+zstd"))
    assert Plan.from_json(packed.to_json()) == packed
    assert '"wire":{"down":"delta","up":"bf16+zstd"}' in packed.to_json()
    assert "wire" not in plan().to_json()
    assert Plan.from_json(plan().to_json()).wire == Wire()
    assert packed.digest() != plan().digest()


def test_a_word_that_is_none_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"wire\.up 'delta': use one of \['exact', 'zstd', "):
        Wire(up="delta")  # type: ignore[arg-type]
    text = plan(wire=Wire(up="zstd")).to_json().replace('"up":"zstd"', '"up":"int4"')
    with pytest.raises(ConfigError, match=r"plan\.wire\.up 'int4': use one of"):
        Plan.from_json(text)


def test_a_strategy_whose_sites_add_up_their_deltas_is_not_rounded_on_the_way_up() -> None:
    with pytest.raises(Contradiction, match=r"wire\.up bf16 with strategy FedDyn: .* use wire"):
        plan(strategy=FedDyn(), wire=Wire(up="bf16"))
    plan(strategy=FedDyn(), wire=Wire(down="bf16+delta", up="zstd"))
    plan(strategy=Scaffold(), wire=Wire(down="bf16", up="bf16"))  # its slots are not rounded


def test_slots_are_not_rounded() -> None:
    state = ServerState(START, {"c": START})
    run = Run(RUN, plan(strategy=Scaffold(), wire=Wire(down="bf16")), state)
    brief = opened(run)[0].brief
    assert brief.slots["c"] == START != brief.params
