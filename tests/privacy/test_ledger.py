from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
from fedml.privacy import accounting, chain
from fedml.privacy.accounting import Event, Pure, SampledGaussian
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import RunId, TaskId

RUN, OTHER = RunId("run-1"), RunId("run-2")
ROUND = SampledGaussian(1.0, 20.0, 5)
DELTA = 1e-5


def task(number: int) -> TaskId:
    return TaskId(f"task-{number}")


def open_ledger(path: Path, limit: float = 3.0, name: str = "wards") -> Ledger:
    return Ledger(path, name=name, limits=Limits(limit, DELTA))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wards.ledger"


@pytest.fixture
def book(path: Path) -> Iterator[Ledger]:
    opened = open_ledger(path)
    yield opened
    opened.close()


def spend(
    book: Ledger, number: int, event: Event = ROUND, run: RunId = RUN, planned: int = 1
) -> None:
    book.reserve(task(number), run, "train", event, planned=planned)
    book.charge(task(number))


def test_a_ledger_of_patients_is_none_of_rows(path: Path) -> None:
    Ledger(path, name="wards", limits=Limits(3.0, DELTA), unit="patient").close()
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
        spend(book, number, event, planned=8)
    assert 2.98 < book.spent() <= 3.0
    with pytest.raises(BudgetExhausted):
        spend(book, 8, event, planned=8)
    with pytest.raises(BudgetExhausted):  # nor a larger plan, now that there were answers
        spend(book, 9, event, planned=9)
    book.close()


def test_what_a_plan_fixed_ahead_is_known_after_a_restart_too(path: Path) -> None:
    from fedml.protocol.messages import Privacy, Training

    asked = Privacy("record", 3.0, DELTA, rounds=8)
    event = accounting.training_event(Training(lr=1.0, steps=5), asked, 100)
    for number in range(8):
        book = open_ledger(path, limit=3.0)
        spend(book, number, event, planned=8)
        book.close()


def test_rounds_that_nobody_planned_are_held_to_the_filter(path: Path) -> None:
    """The same rounds, one after another as answers come in: less of them is proven to fit."""
    from fedml.protocol.messages import Privacy, Training

    asked = Privacy("record", 3.0, DELTA, rounds=8)
    event = accounting.training_event(Training(lr=1.0, steps=5), asked, 100)
    book = open_ledger(path, limit=3.0)
    with pytest.raises(
        BudgetExhausted, match=r"limit 3\.000; raise policy datasets\.wards\.epsilon"
    ):
        for number in range(8):
            spend(book, number, event)
    assert number == 6
    book.close()


def test_one_run_and_one_recipe_have_caps_of_their_own(path: Path) -> None:
    limits = Limits(3.0, DELTA, run=1.0, recipe={"stroke": 1.5})
    book = Ledger(path, name="wards", limits=limits)
    book.reserve(task(1), RUN, "held-out", Pure(0.9), recipe="stroke")
    with pytest.raises(
        BudgetExhausted, match=r"run run-1: .* raise policy datasets\.wards\.run_ep"
    ):
        book.reserve(task(2), RUN, "held-out", Pure(0.2), recipe="stroke")
    with pytest.raises(BudgetExhausted, match=r"datasets\.wards\.recipe_epsilon\.stroke"):
        book.reserve(task(3), OTHER, "held-out", Pure(0.7), recipe="stroke")
    book.reserve(task(4), OTHER, "held-out", Pure(0.7), recipe="sepsis")
    book.close()
    book = Ledger(path, name="wards", limits=limits)  # and after a restart
    with pytest.raises(BudgetExhausted, match="recipe stroke"):
        book.reserve(task(5), RunId("run-3"), "held-out", Pure(0.7), recipe="stroke")
    book.close()


def test_a_ledger_from_before_recipes_and_plans_is_read_on(path: Path) -> None:
    old: list[durable.Record] = [
        {"kind": "ledger", "name": "wards", "unit": "record", "version": 1},
        *(
            {"kind": kind, "task": "task-1", "run": RUN, "part": "train", "time": 1.0,
             "event": "sampled-gaussian", "sampling": 1.0, "noise": 20.0, "steps": 5}
            for kind in ("reserved", "charged")
        ),
    ]  # fmt: skip
    log = durable.Log(path)
    for body in old:
        log.append(chain.sealed(body, log.records))
    log.close()
    head = {"records": 3, "hash": log.records[-1]["hash"]}
    durable.replace(chain.head_of(path), durable.dump_json(head))
    book = open_ledger(path)
    assert book.is_charged(task(1))
    assert book.spent() == accounting.epsilon([ROUND], DELTA)
    spend(book, 2)
    assert book.spent() == accounting.epsilon([ROUND, ROUND], DELTA)
    book.close()


def test_a_void_reservation_is_given_back_unless_it_was_charged(path: Path) -> None:
    book = open_ledger(path, limit=accounting.epsilon([ROUND], DELTA) + 0.02)
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
    states = [entry.state for entry in chain.read(path)]
    assert states == ["charged", "charged"]
    again.close()


def test_a_kill_between_reserving_and_charging_keeps_the_reservation(path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fedml.privacy.ledger import *; from fedml.privacy.accounting import Pure\n"
        "book = Ledger(Path(sys.argv[1]), name='wards', limits=Limits(1., 1e-5))\n"
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


def test_two_processes_cannot_hold_one_ledger_but_anyone_may_read(book: Ledger, path: Path) -> None:
    spend(book, 1)
    with pytest.raises(ConfigError, match=f"in use by ledger of wards.*{os.getpid()}"):
        open_ledger(path)
    assert [entry.task for entry in chain.read(path)] == [task(1)]


def test_a_ledger_belongs_to_one_dataset(book: Ledger, path: Path) -> None:
    book.close()
    with pytest.raises(ConfigError, match=r"ledger of 'wards', not of 'clinics'"):
        open_ledger(path, name="clinics")


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


def test_a_flipped_byte_is_noticed_in_the_last_record_too(full: Path) -> None:
    data = bytearray(full.read_bytes())
    data[-20] ^= 1
    full.write_bytes(data)
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
    """In the time of 500 transforms of a million numbers: ten seconds, on a machine of 2020."""
    book = open_ledger(path, limit=1000.0)
    started = time.process_time()
    for number in range(100):
        spend(book, number, SampledGaussian(0.1, 2.0, 10))
        book.spent(run=RUN)
    taken = time.process_time() - started
    book.close()
    numbers, started = np.linspace(-1, 1, 2**20), time.process_time()
    for _ in range(25):
        np.fft.rfft(numbers)
    assert taken < 20 * (time.process_time() - started)
