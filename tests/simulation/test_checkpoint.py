"""A simulation that is killed goes on, to the very bytes it would have come to."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fedml.errors import Corrupt
from fedml.protocol.messages import Privacy, SiteId
from fedml.protocol.tasks import Task, Update
from fedml.rounds import Commit, Plan, SiteLost
from fedml.simulation.checkpoint import Checkpoints
from fedml.simulation.engine import Outcome
from fedml.simulation.executors.base import Answer, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAdam, FedAvgM, FedProx, Scaffold, ServerState, Strategy
from tests.simulation.worlds import Late, chronicle, plan, start

STRATEGIES: Mapping[str, Strategy] = {
    "fedavgm": FedAvgM(beta=0.9),
    "fedadam": FedAdam(server_lr=0.1),
    "fedprox": FedProx(mu=0.1),
    "scaffold": Scaffold(),
}
EXECUTORS: Mapping[str, MakeExecutor] = {
    "inline": Inline,
    "vectorised": Vectorised,
    "processes": Processes,
}
COMMITS = 8  # of four rounds, each scored
LOST = SiteId("site-1")


class Killed(BaseException):
    """What `kill -9` looks like from the inside: nothing after it is done."""


def seconds(task: Task) -> float:
    """A straggler now and then: 61 s is too late for the plan's deadline."""
    return 61.0 if (task.round, task.site) == (2, "site-2") else 1.0 + len(task.site)


class Forgetful(Inline):
    """Sites with a memory of their own: how far they went in their last round.

    One of them refuses for good in round 2, and one answers nothing on each first attempt at
    round 3, which fails with it when all are needed.
    """

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        for task in tasks:
            if task.kind == "train" and (task.site, task.round) == (LOST, 2):
                yield SiteLost(task.site, "policy: no more", True, task.id)
                continue
            if f".{task.round}.1." in task.id and task.round == 3:
                yield SiteLost(task.site, "crashed", False, task.id)
                continue
            for answer in super().run([task]):
                if isinstance(answer, Update):
                    before = self.memory.slots[task.site].get("last", answer.delta.zeros())
                    self.memory.slots[task.site] = {"last": answer.delta}
                    answer = replace(answer, delta=answer.delta + before * 0.5)
                yield answer


def settled(outcome: Outcome) -> tuple[object, ...]:
    assert outcome.candidate is not None
    return outcome.candidate.params.digest(), outcome.receipts, outcome.end, outcome.seconds


def play(
    a_plan: Plan, folder: Path, make: MakeExecutor, *, kill: int = 0, least: float = 0.0
) -> Outcome | None:
    """Play what lies in `folder` on; return None if it is killed at its `kill`-th commit."""
    engine, told = chronicle(a_plan, folder, make, least)
    engine.world = Late(seconds)
    note, commits = engine.watch, itertools.count(1)

    def watch(commit: Commit) -> None:
        note(commit)
        if next(commits) == kill:
            raise Killed

    engine.watch = watch
    try:
        return engine.play()
    except Killed:
        return None
    finally:
        told.checkpoints.close()


@functools.cache
def whole(name: str, make: Any, attempts: int = 1) -> tuple[object, ...]:
    engine, _ = chronicle(four(name, attempts), None, make)
    engine.world = Late(seconds)
    return settled(engine.play())


def four(name: str, attempts: int = 1) -> Plan:
    return plan(rounds=4, every=1, strategy=STRATEGIES[name], attempts=attempts)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("kill", range(1, COMMITS + 1))
def test_killed_at_any_commit_it_ends_with_the_same_bytes(
    name: str, executor: str, kill: int, tmp_path: Path
) -> None:
    make = EXECUTORS[executor]
    assert play(four(name), tmp_path, make, kill=kill) is None
    outcome = play(four(name), tmp_path, make)
    assert outcome is not None
    assert settled(outcome) == whole(name, cast(Hashable, make))


@pytest.mark.parametrize("kill", range(1, 12))
def test_what_sites_remember_and_refuse_survives_too(kill: int, tmp_path: Path) -> None:
    a_plan = four("fedavgm", attempts=2)
    expected = whole("fedavgm", Forgetful, 2)
    commits = len(expected[1])  # type: ignore[arg-type]
    if kill >= commits:
        assert commits == 9  # four rounds, four evaluations, and the attempt that failed
        return
    assert play(a_plan, tmp_path, Forgetful, kill=kill) is None
    outcome = play(a_plan, tmp_path, Forgetful)
    assert outcome is not None
    assert settled(outcome) == expected


def test_killed_again_and_again_it_still_gets_there(tmp_path: Path) -> None:
    for _ in range(COMMITS):
        assert play(four("fedadam"), tmp_path, Inline, kill=1) is None
    outcome = play(four("fedadam"), tmp_path, Inline)
    assert outcome is not None
    assert settled(outcome) == whole("fedadam", Inline)


def test_rounds_since_the_last_checkpoint_are_played_again(tmp_path: Path) -> None:
    assert play(four("fedadam"), tmp_path, Inline, kill=5, least=math.inf) is None
    assert Checkpoints(tmp_path).saved is None
    outcome = play(four("fedadam"), tmp_path, Inline, least=math.inf)
    assert outcome is not None
    assert settled(outcome) == whole("fedadam", Inline)


def test_the_table_of_a_resumed_run_is_whole(tmp_path: Path) -> None:
    play(four("fedprox"), tmp_path, Inline, kill=5)
    engine, told = chronicle(four("fedprox"), tmp_path)
    engine.play()
    assert len(told.entries) == COMMITS
    assert all(len(entry.seen) == len(entry.receipt.counted) for entry in told.entries)
    assert all(0 < one.seconds < 60 for entry in told.entries for one in entry.seen.values())


def test_privacy_is_charged_on_from_where_it_was(tmp_path: Path) -> None:
    privacy = Privacy("record", epsilon=5.0, delta=1e-5, rounds=3, evaluation_epsilon=1.0)
    private = plan(privacy=privacy)
    play(private, tmp_path, Inline, kill=2)
    outcome = play(private, tmp_path, Inline)
    assert outcome is not None
    engine, _ = chronicle(private)
    engine.world = Late(seconds)
    charged = [[one.epsilon for one in receipt.counted] for receipt in engine.play().receipts]
    assert [[one.epsilon for one in receipt.counted] for receipt in outcome.receipts] == charged


def test_a_torn_record_costs_one_checkpoint(tmp_path: Path) -> None:
    play(four("fedadam"), tmp_path, Inline, kill=4)
    log = tmp_path / "rounds.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    saved = Checkpoints(tmp_path).saved
    assert saved is not None
    assert len(saved.entries) == 3
    outcome = play(four("fedadam"), tmp_path, Inline)
    assert outcome is not None
    assert settled(outcome) == whole("fedadam", Inline)


def test_a_state_that_is_not_the_named_one_is_refused(tmp_path: Path) -> None:
    play(four("fedadam"), tmp_path, Inline, kill=5)  # a training round, so its state is new
    states = sorted(tmp_path.glob("state-*"))
    assert len(states) == 2
    (tmp_path / "x").write_bytes(states[0].read_bytes())
    states[0].write_bytes(states[1].read_bytes())
    states[1].write_bytes((tmp_path / "x").read_bytes())
    with pytest.raises(Corrupt, match="is not the state that the log names"):
        Checkpoints(tmp_path)
    for state in states:
        state.unlink()
    with pytest.raises(Corrupt, match="begin the simulation anew"):
        Checkpoints(tmp_path)


def test_a_stop_waits_for_a_commit_only_if_that_spares_work(tmp_path: Path) -> None:
    engine, told = chronicle(four("fedadam"), tmp_path, least=math.inf)
    assert told.stop()  # nothing is committed yet
    with pytest.raises(KeyboardInterrupt):
        engine.play()
    told.checkpoints.close()
    saved = Checkpoints(tmp_path).saved
    assert saved is not None
    assert [entry.receipt.round for entry in saved.entries] == [1]


def test_a_checkpoint_s_cost_spaces_them_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, least=1e-9)
    state = ServerState(start(), {}, 1)
    checkpoints.save(state, [], Memory(), {})
    assert not checkpoints.is_due  # twenty times as long as the last one took must pass
    checkpoints.close()


def test_slots_of_many_sites_come_back_to_the_bit(tmp_path: Path) -> None:
    params = start()
    slots = {
        SiteId(f"site-{k}"): {"control": params * float(k), "other": params * -1.0}
        for k in range(50)
    }
    memory = Memory(dict(slots), {(SiteId("site-3"), "train"): 7})
    checkpoints = Checkpoints(tmp_path, least=0.0)
    checkpoints.save(ServerState(params, {"momentum": params * 2.0}, 3), [], memory, {})
    memory.releases[SiteId("site-4"), "evaluate"] = 1
    checkpoints.save(ServerState(params, {"momentum": params * 3.0}, 4), [], memory, {})
    checkpoints.close()
    saved = Checkpoints(tmp_path).saved
    assert saved is not None
    assert (saved.memory.releases, saved.state.step) == (memory.releases, 4)
    assert saved.state.slots["momentum"] == params * 3.0
    assert saved.memory.slots == slots


def test_the_worlds_of_these_tests_do_what_they_say() -> None:
    receipts = whole("fedavgm", Forgetful, 2)[1]
    assert isinstance(receipts, tuple)
    failed = [r for r in receipts if r.kind == "train" and not r.model]
    assert [(r.round, r.attempt) for r in failed] == [(3, 1)]
    assert LOST in receipts[2].missing and LOST in receipts[-2].left_out
    assert any("no answer within" in reason for r in receipts for reason in r.missing.values())
