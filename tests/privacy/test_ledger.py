from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml import durable, failpoints
from fedml.errors import (
    BudgetExhausted,
    ConfigError,
    Corrupt,
    FedmlError,
    Refused,
    Untrusted,
)
from fedml.privacy import accounting, ledger
from fedml.privacy.accounting import Event, Pure, SampledGaussian
from fedml.privacy.ledger import Ledger
from fedml.protocol.messages import RunId, TaskId

RUN, OTHER = RunId("run-1"), RunId("run-2")
ROUND = SampledGaussian(1.0, 20.0, 5)
DELTA = 1e-5


def task(number: int) -> TaskId:
    return TaskId(f"task-{number}")


def open_ledger(path: Path, limit: float = 3.0, name: str = "wards") -> Ledger:
    return Ledger(path, name=name, limit_epsilon=limit, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wards.ledger"


@pytest.fixture
def book(path: Path) -> Iterator[Ledger]:
    opened = open_ledger(path)
    yield opened
    opened.close()


def spend(book: Ledger, number: int, event: Event = ROUND, run: RunId = RUN) -> None:
    book.reserve(task(number), run, "train", event)
    book.charge(task(number))


def test_a_ledger_of_patients_is_none_of_rows(path: Path) -> None:
    Ledger(path, name="wards", limit_epsilon=3.0, delta=DELTA, unit="patient").close()
    with pytest.raises(
        ConfigError, match="what each patient has spent, the policy now says record"
    ):
        open_ledger(path)


def test_only_charges_are_spent_and_rounds_compose(book: Ledger) -> None:
    book.reserve(task(1), RUN, "train", ROUND)
    assert book.spent() == 0.0
    book.charge(task(1))
    spend(book, 2, run=OTHER)
    assert book.spent() == accounting.epsilon([ROUND, ROUND], DELTA)
    assert book.spent(run=RUN) == accounting.epsilon([ROUND], DELTA) < book.spent()


def test_charging_twice_is_one_charge(book: Ledger, path: Path) -> None:
    spend(book, 1)
    before = path.read_bytes()
    spend(book, 1)
    assert path.read_bytes() == before
    assert book.spent() == accounting.epsilon([ROUND], DELTA)


def test_trained_rows_and_held_out_rows_are_not_the_same_rows(book: Ledger) -> None:
    spend(book, 1)
    book.reserve(task(2), RUN, "held-out", Pure(2.9))
    book.charge(task(2))
    assert book.spent() == 2.9
    with pytest.raises(BudgetExhausted, match="held-out rows"):
        book.reserve(task(3), RUN, "held-out", Pure(0.5))
    spend(book, 4)


def test_over_budget_is_refused_with_the_numbers_and_writes_nothing(path: Path) -> None:
    book = open_ledger(path, limit=1.0)
    spend(book, 1)
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match=r"limit 1\.000") as caught:
        book.reserve(task(2), RUN, "train", SampledGaussian(1.0, 2.0, 5))
    assert path.read_bytes() == before
    assert caught.value.spent == book.spent() > 0
    assert caught.value.asked > 1.0


def test_a_run_planned_for_the_limit_fits_and_one_round_more_does_not(path: Path) -> None:
    from fedml.protocol.messages import Privacy, Training

    asked = Privacy("record", 3.0, DELTA, rounds=8)
    event = accounting.training_event(Training(lr=1.0, steps=5), asked, 100)
    book = open_ledger(path, limit=3.0)
    for number in range(8):
        spend(book, number, event)
    with pytest.raises(BudgetExhausted):
        spend(book, 8, event)
    book.close()


def test_a_void_reservation_is_given_back_unless_it_was_charged(path: Path) -> None:
    book = open_ledger(path, limit=accounting.epsilon([ROUND], DELTA))
    book.reserve(task(1), RUN, "train", ROUND)
    with pytest.raises(BudgetExhausted):
        book.reserve(task(2), RUN, "train", ROUND)
    assert book.void(task(1))
    spend(book, 2)
    assert not book.void(task(2))
    assert not book.void(task(3))
    assert book.is_charged(task(2))
    with pytest.raises(BudgetExhausted):
        book.reserve(task(1), RUN, "train", ROUND)
    book.close()


def test_a_charge_needs_a_reservation(book: Ledger) -> None:
    with pytest.raises(Refused, match="reserve first"):
        book.charge(task(1))
    book.reserve(task(1), RUN, "train", ROUND)
    book.void(task(1))
    with pytest.raises(Refused, match="reserve first"):
        book.charge(task(1))
    book.reserve(task(1), RUN, "train", ROUND)
    book.charge(task(1))


def test_a_task_that_changes_its_price_is_not_trusted(book: Ledger) -> None:
    book.reserve(task(1), RUN, "train", ROUND)
    for run, event in ((RUN, Pure(0.1)), (OTHER, ROUND)):
        with pytest.raises(Untrusted, match="task-1"):
            book.reserve(task(1), run, "train", event)
    with pytest.raises(Untrusted):
        book.reserve(task(1), RUN, "held-out", ROUND)


def test_everything_is_there_again_after_opening(path: Path) -> None:
    book = open_ledger(path)
    spend(book, 1)
    book.reserve(task(2), RUN, "train", ROUND)
    spent = book.spent()
    book.close()
    again = open_ledger(path)
    assert again.spent() == spent
    assert again.is_charged(task(1)) and not again.is_charged(task(2))
    again.charge(task(2))
    states = [entry.state for entry in ledger.read(path)]
    assert states == ["charged", "charged"]
    again.close()


def test_a_kill_between_reserving_and_charging_keeps_the_reservation(path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fedml.privacy.ledger import Ledger; from fedml.privacy.accounting import Pure\n"
        "book = Ledger(Path(sys.argv[1]), name='wards', limit_epsilon=1., delta=1e-5)\n"
        "book.reserve('task-1', 'run-1', 'held-out', Pure(.7))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(path)])
    assert child.returncode == -signal.SIGKILL
    book = open_ledger(path, limit=1.0)
    assert book.spent() == 0.0
    with pytest.raises(BudgetExhausted):
        book.reserve(task(2), RUN, "held-out", Pure(0.7))
    book.reserve(task(1), RUN, "held-out", Pure(0.7))
    book.charge(task(1))
    assert book.spent() == 0.7
    book.close()


def test_a_torn_last_record_is_forgotten(path: Path) -> None:
    book = open_ledger(path)
    spend(book, 1)
    book.close()
    with path.open("ab") as file:
        file.write(b'0badc0de {"kind": "char')
    again = open_ledger(path)
    assert again.is_charged(task(1))
    again.close()


def test_a_disk_too_full_for_the_head_leaves_a_ledger_that_opens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is written and only the second file is not: what is noted must count at once."""
    book = open_ledger(path)
    monkeypatch.setattr(failpoints, "_armed", failpoints.Armed("durable.replace:1:enospc"))
    with pytest.raises(FedmlError, match="No space left"):
        book.reserve(task(1), RUN, "train", ROUND)
    book.reserve(task(1), RUN, "train", ROUND)  # as a site does once there is room
    book.charge(task(1))
    spent = book.spent()
    book.close()
    again = open_ledger(path)
    assert again.spent() == spent > 0
    again.close()


def test_two_runs_racing_for_the_last_of_the_budget_do_not_both_get_it(path: Path) -> None:
    book = open_ledger(path, limit=1.0)
    outcomes: list[str] = []
    gate = threading.Barrier(8)

    def run(number: int) -> None:
        gate.wait()
        try:
            book.reserve(task(number), RunId(f"run-{number}"), "held-out", Pure(0.6))
            outcomes.append("granted")
        except BudgetExhausted:
            outcomes.append("refused")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["granted"] + ["refused"] * 7
    book.close()


def test_two_processes_cannot_hold_one_ledger_but_anyone_may_read(book: Ledger, path: Path) -> None:
    spend(book, 1)
    with pytest.raises(ConfigError, match=f"in use by ledger of wards.*{os.getpid()}"):
        open_ledger(path)
    assert [entry.task for entry in ledger.read(path)] == [task(1)]


def test_a_ledger_belongs_to_one_dataset(book: Ledger, path: Path) -> None:
    book.close()
    with pytest.raises(ConfigError, match=r"ledger of 'wards', not of 'clinics'"):
        open_ledger(path, name="clinics")


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _signed(record: dict[str, object]) -> bytes:
    body = durable.dump_json(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


@pytest.fixture
def full(path: Path) -> Path:
    book = open_ledger(path)
    for number in range(3):
        spend(book, number)
    book.close()
    return path


def _refused(path: Path) -> None:
    with pytest.raises(Corrupt, match=str(path)):
        open_ledger(path)
    with pytest.raises(Corrupt, match=str(path)):
        open_ledger(path)  # and it stays refused, and unlocked


def test_an_edited_record_is_noticed_even_with_a_new_checksum(full: Path) -> None:
    lines = _lines(full)
    record = json.loads(lines[2].partition(b" ")[2])
    lines[2] = _signed({**record, "noise": 1e4})
    full.write_bytes(b"".join(lines))
    _refused(full)
    with pytest.raises(Corrupt, match="record 3 breaks the chain"):
        ledger.read(full)


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_a_shortened_ledger_is_noticed(full: Path, kept: int) -> None:
    full.write_bytes(b"".join(_lines(full)[:kept]))
    _refused(full)


def test_a_flipped_byte_is_noticed_in_the_last_record_too(full: Path) -> None:
    data = bytearray(full.read_bytes())
    data[-20] ^= 1
    full.write_bytes(data)
    _refused(full)


def test_a_forked_ledger_is_noticed(full: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy" / full.name
    other.parent.mkdir()
    book = open_ledger(other)
    for number in range(10, 14):
        spend(book, number)
    book.close()
    full.write_bytes(other.read_bytes())
    _refused(full)


def test_a_lost_head_is_noticed(full: Path) -> None:
    (full.with_name(f"{full.name}.guard") / "head.json").unlink()
    _refused(full)


def test_a_crash_between_record_and_head_is_mended_silently(full: Path) -> None:
    head = full.with_name(f"{full.name}.guard") / "head.json"
    book = open_ledger(full)
    before = head.read_bytes()
    spend(book, 7)
    book.close()
    head.write_bytes(before)
    again = open_ledger(full)
    assert again.is_charged(task(7))
    again.close()


def test_a_hundred_rounds_reserve_quickly(path: Path) -> None:
    import time

    book = open_ledger(path, limit=1000.0)
    started = time.process_time()
    for number in range(100):
        spend(book, number, SampledGaussian(0.1, 2.0, 10))
        book.spent(run=RUN)
    assert time.process_time() - started < 10
    book.close()
