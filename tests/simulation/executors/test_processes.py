"""Worker processes: nobody is orphaned, nothing hangs, and a death costs a retry."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.rounds import SiteLost
from fedml.simulation.executors.base import Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.machine import usable_cores
from fedml.simulation.executors.processes import Processes
from fedml.strategies import catalogue
from tests.simulation.worlds import holdings, plan, recipe, singles, start

ROOT = Path(__file__).parents[3]


def tasks(rule: str = "plain") -> list[Task]:
    brief = Brief(start(), rule)
    return [Task(TaskId(f"r.1.{site}"), RunId("r"), 1, site, "train", brief) for site in holdings()]


def made(workers: int = 2, memory: Memory | None = None) -> Processes:
    return Processes(plan(), recipe(), holdings(), memory or Memory(), workers)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


class Deadly:
    """A local rule whose site kills the process it is worked on in, as often as `times`."""

    reports: frozenset[str] = frozenset()

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Die, unless that was done often enough."""
        deaths = len(list(self.folder.iterdir()))
        if deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: object
    ) -> tuple[Slots, Slots]:
        """Report nothing."""
        return {}, {}


def play_deadly(
    folder: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Processes, dict[SiteId, object]]:
    monkeypatch.setitem(catalogue.RULES.ours, "deadly", Deadly(folder, times))
    executor = made()
    first, *rest = tasks()
    deadly = replace(first, brief=replace(first.brief, rule="deadly"))
    return executor, {one.site: one for one in singles(executor, [deadly, *rest])}


def test_a_worker_that_dies_costs_one_more_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = play_deadly(tmp_path, 1, monkeypatch)
    expected = {one.site: one for one in singles(Inline(plan(), recipe(), holdings()), tasks())}
    assert found == expected


def test_a_task_that_kills_every_worker_is_a_lost_site_and_the_executor_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, found = play_deadly(tmp_path, 2, monkeypatch)
    lost = found.pop(tasks()[0].site)
    assert isinstance(lost, SiteLost)
    assert "SIGKILL" in lost.reason
    assert (lost.task, lost.final) == (tasks()[0].id, False)
    assert all(isinstance(one, Update) for one in found.values())
    assert len(found) == 3
    assert all(isinstance(one, Update) for one in executor.run(tasks()))


def test_workers_killed_between_rounds_are_replaced() -> None:
    executor = made()
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert all(isinstance(one, Update) for one in executor.run(tasks()))


def test_workers_end_with_their_executor() -> None:
    before = children()
    executor = made()
    assert len(children() - before) == 2
    del executor
    gc.collect()
    assert children() <= before


def test_who_stops_listening_ends_the_work_under_way_and_may_ask_again() -> None:
    executor = made()
    answers = executor.run(tasks())
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(list(executor.run(tasks()))) == 4


def test_answers_stay_as_they_were_while_more_work_is_done() -> None:
    executor = made(workers=1)
    kept = [one for one in executor.run(tasks()) if isinstance(one, Update)]
    before = [one.delta.digest() for one in kept]
    other = [replace(task, round=2) for task in tasks()]
    for _ in range(3):
        list(executor.run(other))
    assert [one.delta.digest() for one in kept] == before


def test_shared_memory_is_used_again() -> None:
    executor = made(workers=1)
    hand = executor._hands[0]
    for _ in range(5):
        for _ in executor.run(tasks()):
            pass
    assert len(hand._sheets) <= 4


def test_there_are_never_more_workers_than_sites() -> None:
    before = children()
    executor = made(workers=50)
    assert len(children() - before) == 4
    del executor


STAY = """
import os, signal, sys, time
from tests.simulation.executors.test_processes import made, tasks, children
executor = made()
print(*children(), flush=True)
for _ in range(10_000):
    for answer in executor.run(tasks()):
        pass
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STAY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    if how == signal.SIGINT:  # Ctrl-C reaches all of the terminal's processes
        for pid in workers:
            os.kill(pid, how)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    await_end(lambda: not any(psutil.pid_exists(pid) for pid in workers))
    assert errors.count("Traceback") == (1 if how == signal.SIGINT else 0)


def await_end(ended: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ended():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_bf16_equals_the_reference_in_bf16_and_differs_from_fp32() -> None:
    def updates(executor: Inline | Processes) -> dict[SiteId, Params]:
        return {one.site: one.delta for one in executor.run(tasks()) if isinstance(one, Update)}

    exact = updates(Inline(plan(), recipe(), holdings()))
    rough = updates(Inline(plan(), recipe(), holdings(), precision="bf16"))
    assert updates(Processes(plan(), recipe(), holdings(), Memory(), 2, "bf16")) == rough
    for site, delta in rough.items():
        gap = (delta - exact[site]).norm() / exact[site].norm()
        assert 0 < gap < 0.05
        assert all(buffer.dtype == torch.float32 for buffer in delta.buffers.values())


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"executor.workers 0: must be 1 or more, or null"):
        made(workers=0)
    with pytest.raises(ConfigError, match="precision 'fp8': use one of"):
        Processes(plan(), recipe(), holdings(), precision="fp8")  # type: ignore[arg-type]
    private = plan(
        privacy=Privacy("record", epsilon=5.0, delta=1e-5, evaluation_epsilon=1.0, rounds=3)
    )
    with pytest.raises(ConfigError, match="set precision=fp32 or privacy=none"):
        Processes(private, recipe(), holdings(), precision="bf16")


def test_a_container_s_quota_counts(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
