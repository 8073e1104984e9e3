"""A site's memory keeps orders and results over a crash, and forgets only when told."""

from dataclasses import replace
from pathlib import Path

from fedml.protocol.messages import Blob, RunId, Scored, TaskId, Trained
from fedml.site.memory import Memory
from tests.site.test_gate import TASK

RESULT = Trained(TASK.task, Blob("11" * 32, 5), 100.0, {"steps": 5.0}, 0.8)


def test_an_order_and_its_result_survive_a_restart(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.accept(TASK)
    assert Memory(tmp_path).unfinished() == [TASK]
    memory.finish(RESULT)
    again = Memory(tmp_path)
    assert again.result(TASK.task) == RESULT
    assert again.assignment(TASK.task) == TASK
    assert again.unfinished() == []
    assert again.kept() == (TASK.task,)


def test_an_evaluation_s_result_is_kept_too(tmp_path: Path) -> None:
    memory, order = Memory(tmp_path), replace(TASK, kind="evaluate")
    memory.accept(order)
    result = Scored(order.task, {"accuracy": 30.5}, 33.0, 0.5)
    memory.finish(result)
    assert Memory(tmp_path).result(order.task) == result


def test_accepting_twice_keeps_what_was_done_between(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    desk = memory.accept(TASK)
    desk.outcome.write_text("{}")
    assert memory.accept(TASK).outcome.exists()


def test_a_half_written_order_is_started_clean(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    desk = memory.desk(TASK.task)
    desk.folder.mkdir()
    desk.outcome.write_text("{}")  # of no noted order
    assert memory.unfinished() == []
    assert not memory.accept(TASK).outcome.exists()


def test_site_side_state_moves_on_only_if_the_update_counted(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    slots = memory.slots(RunId("run-1"))
    for task, counted, expected in (("a", False, b""), ("b", True, b"b"), ("c", False, b"b")):
        order = replace(TASK, task=TaskId(task))
        memory.accept(order).memory.write_bytes(task.encode())
        memory.forget(order.task, counted=counted)
        assert (slots.read_bytes() if slots.exists() else b"") == expected
        assert memory.result(order.task) is None
    assert memory.kept() == ()


def test_forgetting_what_was_never_known_is_no_error(tmp_path: Path) -> None:
    Memory(tmp_path).forget(TaskId("never"), counted=True)
