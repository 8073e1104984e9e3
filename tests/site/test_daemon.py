"""The daemon does what it is asked, once, if its policy allows; whatever is at the other end."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from blake3 import blake3

from fedml import durable, telemetry
from fedml.errors import (
    ConfigError,
    Corrupt,
    FedmlError,
    MalformedMessage,
    PermissionDenied,
    Refused,
    Unreachable,
    Untrusted,
)
from fedml.privacy.accounting import training_event
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import (
    Accepted,
    Beat,
    Blob,
    Cancel,
    Declined,
    Failed,
    Forget,
    Privacy,
    RecipeId,
    ReleaseNotice,
    RunId,
    Serving,
    TaskId,
    Trained,
    Welcome,
)
from fedml.site.policy import Dataset
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore
from fedml.transport.link import Link
from tests.site.wire import (
    ORDER,
    UPDATE,
    UPDATED,
    Wire,
    entries,
    policy,
    records,
    running,
    worked,
)

ROOT = Path(__file__).parents[2]


# --- charged once, before anything leaves -------------------------------------------------------


async def test_the_charge_is_on_the_disk_before_the_upload_begins(tmp_path: Path) -> None:
    worked(tmp_path)
    wire, seen = Wire(), list[dict[str, str]]()
    wire.on_upload = lambda: seen.append(entries(tmp_path))
    async with running(tmp_path, wire):
        wire.say(ORDER)
        trained = await wire.event(Trained)
    assert seen == [{ORDER.task: "charged"}]
    assert wire.uploads == [UPDATE]
    assert (trained.task, trained.update, trained.weight) == (ORDER.task, UPDATED, 100.0)
    assert trained.epsilon == pytest.approx(1.0, abs=0.01)


async def test_an_order_that_comes_twice_is_answered_with_the_same_bytes(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        first = await wire.event(Trained)
        wire.say(ORDER)
        assert await wire.event(Trained) == first
    async with running(tmp_path, wire):  # and after a restart
        wire.say(ORDER)
        assert await wire.event(Trained) == first
    assert wire.uploads == [UPDATE] * 3
    assert records(tmp_path) == ["reserved", "charged"]


async def test_an_update_that_the_coordinator_refuses_is_no_refusal_of_the_site_s(
    tmp_path: Path,
) -> None:
    """To decline is final, and only the site's own policy may: the next order is answered."""
    worked(tmp_path)
    wire = Wire()
    wire.on_upload = raising(Refused("it has offered 3 others for this task"))
    async with running(tmp_path, wire):
        wire.say(ORDER)
        failed = await wire.event(Failed)
        assert "the coordinator does not take the update: it has offered 3" in failed.reason
        wire.on_upload = lambda: None
        wire.say(ORDER)
        assert (await wire.event(Trained)).update == UPDATED
        assert not any(isinstance(event, Declined) for event in wire.heard)
    assert records(tmp_path) == ["reserved", "charged"]


async def test_work_that_was_done_before_a_crash_is_not_done_again(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    assert wire.downloads == 0
    assert records(tmp_path) == ["reserved", "charged"]


async def test_a_crash_between_charge_and_result_charges_no_second_time(tmp_path: Path) -> None:
    worked(tmp_path)
    ledger = Ledger(tmp_path / "ledger" / "records.jsonl", name="records", limits=Limits(1.2, 1e-5))
    event = training_event(ORDER.training, ORDER.privacy, 100)
    ledger.reserve(ORDER.task, ORDER.run, "train", event)
    ledger.charge(ORDER.task)
    ledger.close()
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    assert records(tmp_path) == ["reserved", "charged"]


async def test_over_budget_is_refused_with_the_reason_and_costs_nothing(tmp_path: Path) -> None:
    worked(tmp_path)
    second = replace(ORDER, task=TaskId("run-2.1.1.bern"), run=RunId("run-2"))
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        wire.say(second)
        declined = await wire.event(Declined)
    assert declined.task == second.task
    assert "records, train rows: epsilon 0.99" in declined.reason
    assert "limit 1.200; raise policy datasets.records.epsilon or stop" in declined.reason
    assert entries(tmp_path) == {ORDER.task: "charged"}
    assert not (tmp_path / "tasks" / second.task).exists()


async def test_what_was_changed_after_its_charge_does_not_leave(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        (tmp_path / "tasks" / ORDER.task / "update.safetensors").write_bytes(b"rows!")
        wire.say(ORDER)
        assert "changed after it was charged; refusing" in (await wire.event(Failed)).reason
    assert wire.uploads == [UPDATE]


async def test_what_a_whole_site_spends_is_in_a_ledger_of_its_own(tmp_path: Path) -> None:
    order = replace(ORDER, privacy=Privacy("site_central", 1.0, 1e-5, rounds=1))
    worked(tmp_path, order)
    trusting = Dataset(
        tmp_path / "train.csv", 100, ("breast_cancer",), privacy="site_central",
        epsilon=1.2, site_epsilon=1.5,
    )  # fmt: skip
    rules = replace(policy(tmp_path), datasets={"records": trusting})
    second = replace(order, task=TaskId("run-2.1.1.bern"), run=RunId("run-2"))
    wire = Wire()
    async with running(tmp_path, wire, rules):
        wire.say(order)
        trained = await wire.event(Trained)
        wire.say(second)
        declined = await wire.event(Declined)
    assert (trained.weight, trained.metrics) == (1.0, {})
    assert entries(tmp_path) == {}
    assert entries(tmp_path, "site/records") == {order.task: "charged"}
    assert "the site as a whole: epsilon 0.99" in declined.reason
    assert "raise policy datasets.records.site_epsilon" in declined.reason


# --- a hostile coordinator ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cohort": 2}, "policy minimum_cohort = 3: this round asks only 2 sites"),
        ({"recipe": RecipeId("breast_cancer", "ab" * 32)}, "policy recipes.breast_cancer.digest"),
        ({"recipe": RecipeId("spyware", "ab" * 32)}, "policy allows no recipe 'spyware'"),
        ({"dataset": "payroll"}, "policy has no [datasets.payroll]; it has records, open"),
        ({"privacy": Privacy()}, "policy datasets.records.privacy = 'record'"),
        ({"privacy": replace(ORDER.privacy, delta=0.5)}, "policy datasets.records.delta = 1e-05"),
        ({"privacy": replace(ORDER.privacy, epsilon=50.0)}, "limit 1.200"),
        ({"training": replace(ORDER.training, steps=2000)}, ""),
        ({"kind": "evaluate"}, "policy datasets.records.held_out is not set: nothing to score"),
    ],
)
async def test_policy_widened_by_the_coordinator_gets_nothing(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    wire = Wire()
    wire.gate.clear()  # what is allowed gets no further than this
    order = replace(ORDER, **change)  # type: ignore[arg-type]
    async with running(tmp_path, wire):
        wire.say(order)
        if reason:
            assert reason in (await wire.event(Declined)).reason
            assert entries(tmp_path) == {}
            assert not list((tmp_path / "tasks").iterdir())
        else:  # more steps cost no more: the noise grows with them
            await wire.event(Accepted)
            assert entries(tmp_path) == {order.task: "reserved"}
    assert not wire.uploads


async def test_averaging_the_noise_away_with_one_order_sent_again_and_again(
    tmp_path: Path,
) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        wire.say(Forget(ORDER.task, counted=True), ORDER)
        declined = await wire.event(Declined)
    assert "was charged and answered before, and is not done again" in declined.reason
    assert wire.downloads == 0
    assert wire.uploads == [UPDATE]


async def test_one_order_s_terms_for_another_s_work(tmp_path: Path) -> None:
    """An order on open data, then, under its id, one on guarded data."""
    wire = Wire()
    first = replace(ORDER, dataset="open", privacy=Privacy())
    wire.on_download = raising(Refused("not now"))
    async with running(tmp_path, wire):
        wire.say(first)
        assert "withholds the model: not now" in (await wire.event(Failed)).reason
        wire.say(ORDER)
        assert "came before as another order" in (await wire.event(Failed)).reason
    assert entries(tmp_path) == {}
    assert wire.downloads == 1


async def test_another_model_under_an_answered_id_is_not_trained(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        wire.say(replace(ORDER, seed=7))
        assert "came before as another order" in (await wire.event(Failed)).reason
    assert wire.uploads == [UPDATE]
    assert records(tmp_path) == ["reserved", "charged"]


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "a/b", "/etc/passwd", "", "a\0b", "x" * 300]
)
async def test_a_task_id_that_is_a_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "site"
    worked(folder)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    wire, evil = Wire(), replace(ORDER)
    object.__setattr__(evil, "task", TaskId(name))  # past our own checks, as a peer's bytes are
    async with running(folder, wire):
        before = everything(tmp_path)
        wire.say(evil)
        assert "is no id" in (await wire.event(Failed)).reason
        wire.say(Cancel(TaskId(name), "?"), Forget(TaskId(name), counted=True))
        wire.say(ORDER)
        assert (await wire.event(Trained)).task == ORDER.task
        after = everything(tmp_path)
    assert before - after == set()
    assert {path for path in after - before if "tasks" not in path and "ledger" not in path} <= {
        f"site/blobs/{UPDATED.digest}"
    }


async def test_a_run_id_that_is_a_path(tmp_path: Path) -> None:
    worked(tmp_path)
    evil = replace(ORDER, task=TaskId("t"), dataset="open", privacy=Privacy())
    object.__setattr__(evil, "run", RunId("../../slots"))
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(evil)
        assert "is no id" in (await wire.event(Failed)).reason


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


async def test_garbage_on_the_stream_is_an_alarm_and_not_the_end(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(MalformedMessage("Assignment.task: '../../x' is no id"))
        await wire.hello()
        wire.failing = [Untrusted("a certificate that our authority did not give")]
        wire.say(Unreachable("cut"))
        await wire.hello()


# --- taking back and forgetting -----------------------------------------------------------------


async def test_a_cancelled_task_gives_its_reservation_back(tmp_path: Path) -> None:
    wire = Wire()
    wire.gate.clear()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Accepted)
        assert entries(tmp_path) == {ORDER.task: "reserved"}
        wire.say(Cancel(ORDER.task, "too late"))
        await until(lambda: entries(tmp_path) == {ORDER.task: "void"})
        assert not list((tmp_path / "tasks").iterdir())


async def test_a_cancelled_task_that_is_charged_waits_to_be_forgotten(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        first = await wire.event(Trained)
        wire.say(Cancel(ORDER.task, "too late"), ORDER)
        assert await wire.event(Trained) == first


async def test_forgetting_deletes_everything_but_the_charge(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        assert list((tmp_path / "blobs").iterdir())
        wire.say(Forget(ORDER.task, counted=True))
        await until(lambda: not list((tmp_path / "tasks").iterdir()))
        await until(lambda: not list((tmp_path / "blobs").iterdir()))
    assert entries(tmp_path) == {ORDER.task: "charged"}


async def test_forgetting_a_task_under_way_stops_it_and_gives_its_reservation_back(
    tmp_path: Path,
) -> None:
    wire = Wire()
    wire.gate.clear()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Accepted)
        wire.say(Forget(ORDER.task, counted=False))
        await until(lambda: entries(tmp_path) == {ORDER.task: "void"})
        await until(lambda: not list((tmp_path / "tasks").iterdir()))


async def test_the_algorithm_s_own_state_moves_on_with_what_counted(tmp_path: Path) -> None:
    worked(tmp_path)
    (tmp_path / "tasks" / ORDER.task / "memory.safetensors").write_bytes(b"control")
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        wire.say(Forget(ORDER.task, counted=True))
        await until(lambda: (tmp_path / "slots" / "run-1.safetensors").exists())
    assert (tmp_path / "slots" / "run-1.safetensors").read_bytes() == b"control"


async def test_the_algorithm_s_own_state_goes_with_its_run(tmp_path: Path) -> None:
    for run in ("run-1", "run-2"):
        durable.replace(tmp_path / "slots" / f"{run}.safetensors", b"control")
    durable.replace(tmp_path / "site.toml", b"")
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(Unreachable("cut"))
        assert (await wire.hello()).runs == ("run-1", "run-2")
        never = TaskId("run-1.over")
        wire.say(Forget(never, False, "../site"), Forget(never, False, "run-1"))
        await until(lambda: [p.stem for p in (tmp_path / "slots").iterdir()] == ["run-2"])
    assert (tmp_path / "site.toml").exists()


async def test_a_reservation_survives_a_crash_and_is_given_back_when_told(tmp_path: Path) -> None:
    wire = Wire()
    wire.gate.clear()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Accepted)
    wire = Wire()
    async with running(tmp_path, wire):
        assert entries(tmp_path) == {ORDER.task: "reserved"}
        wire.say(Forget(ORDER.task, counted=False))
        await until(lambda: entries(tmp_path) == {ORDER.task: "void"})


@pytest.mark.parametrize("point", ["task.voided", "task.forgetting"])
def test_a_crash_in_the_middle_of_forgetting_leaves_nothing_reserved(
    tmp_path: Path, point: str
) -> None:
    """The site dies while it forgets; what it says when it is back, and hears, mends the rest."""
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from fedml.protocol.messages import Accepted, Forget\n"
        "from tests.site.wire import ORDER, Wire, running\n"
        "async def play():\n"
        "    wire = Wire(); wire.gate.clear()\n"
        "    async with running(Path(sys.argv[1]), wire):\n"
        "        wire.say(ORDER); await wire.event(Accepted)\n"
        "        wire.say(Forget(ORDER.task, counted=False)); await asyncio.sleep(60)\n"
        "asyncio.run(play())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDML_FAILPOINT": f"{point}:1:kill"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert entries(tmp_path) == {ORDER.task: "void"}
    assert (tmp_path / "tasks" / ORDER.task).exists()  # so it will be told again


async def test_a_reservation_without_an_order_is_given_back_at_the_start(tmp_path: Path) -> None:
    wire = Wire()
    wire.gate.clear()
    roomy = policy(tmp_path, epsilon=3.0)
    async with running(tmp_path, wire, roomy):
        wire.say(ORDER, replace(ORDER, task=TaskId("run-1.1.1.kept")))
        await wire.event(Accepted)
        await wire.event(Accepted)
    shutil.rmtree(tmp_path / "tasks" / ORDER.task)
    async with running(tmp_path, Wire(), roomy):
        assert entries(tmp_path) == {ORDER.task: "void", "run-1.1.1.kept": "reserved"}


# --- the connection -----------------------------------------------------------------------------


async def test_what_is_told_while_the_stream_is_down_is_no_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the logging that programs have: the line about it must not break what follows."""

    def cut() -> None:
        wire.connected = False
        raise Refused("not for you")

    wire = Wire(on_download=cut)
    telemetry.configure_logging()
    try:
        async with running(tmp_path, wire):
            wire.say(ORDER)
            said = ""

            def withheld() -> bool:
                nonlocal said
                said += capsys.readouterr().err
                return "the coordinator withholds the model" in said

            await until(withheld)
            wire.on_download = lambda: None
            wire.say(Unreachable("cut"))
            await wire.hello()
            said += capsys.readouterr().err
    finally:
        structlog.reset_defaults()
    assert "a bug" not in said


async def test_it_reconnects_for_ever_and_says_what_it_keeps(tmp_path: Path) -> None:
    worked(tmp_path)
    wire = Wire()
    wire.failing = [Unreachable("no route") for _ in range(20)]
    async with running(tmp_path, wire):
        wire.failing = [Unreachable("no route") for _ in range(20)]
        wire.say(Unreachable("cut"))
        assert (await wire.hello()).kept == (ORDER.task,)
        assert not wire.failing


def test_waits_double_up_to_a_bound_below_ten_seconds() -> None:
    waits = [wait for wait, _ in zip(Backoff(), range(50), strict=False)]
    for wait, full in zip(waits, (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[8.0] * 44), strict=True):
        assert full / 2 <= wait <= full
    assert len(set(waits)) == 50


class Waits(Backoff):
    """Waits of no length; it notes how many came in a row before each one."""

    rows: list[int]

    def __init__(self) -> None:
        object.__setattr__(self, "rows", [])

    def __iter__(self) -> Iterator[float]:
        for number in itertools.count():
            self.rows.append(number)
            yield 0.0


async def test_a_connection_that_lasted_a_heartbeat_is_no_failed_dial(tmp_path: Path) -> None:
    wire, waits = Wire(), Waits()
    async with running(tmp_path, wire, backoff=waits, heartbeat=0.05):
        for _ in range(4):
            await wire.event(Beat)
            wire.say(Unreachable("reset"))
            await wire.hello()
            wire.say(Welcome("test", 0.05))
    assert set(waits.rows) == {0}
    assert len(waits.rows) >= 4


async def test_a_coordinator_that_dies_after_each_welcome_is_called_ever_more_seldom(
    tmp_path: Path,
) -> None:
    wire, waits = Wire(), Waits()
    async with running(tmp_path, wire, backoff=waits):
        for _ in range(6):
            wire.say(Unreachable("it died"))
            await wire.hello()
            wire.say(Welcome("test", 60.0))
    assert waits.rows == [0, 1, 2, 3, 4, 5]


async def test_dials_are_never_further_apart_than_two_heartbeats(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire, backoff=Backoff(0.01, 3600.0), heartbeat=0.05):
        wire.failing = [Unreachable("no route") for _ in range(30)]  # months of doubled waits
        wire.say(Unreachable("cut"))
        await wire.hello()
        assert not wire.failing


async def test_an_answer_handed_in_proves_a_connection_and_the_same_answer_again_does_not(
    tmp_path: Path,
) -> None:
    """Else a coordinator that dies of an answer would be called with it without a pause."""
    worked(tmp_path)
    wire, waits = Wire(), Waits()
    async with running(tmp_path, wire, backoff=waits):
        for round_ in range(4):
            wire.say(ORDER)
            await wire.event(Trained)
            if round_ == 0:
                wire.say(Unreachable("it died"))
                await wire.hello()
            wire.say(Unreachable("it died"))
            await wire.hello()
    assert waits.rows == [0, 1, 2, 3, 4]


async def test_a_silent_coordinator_is_called_again(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire, heartbeat=0.02):
        await wire.event(Beat)  # ours go out meanwhile
        await wire.hello()


async def test_beats_keep_a_quiet_stream_open(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire, heartbeat=0.2):
        for _ in range(7):
            await asyncio.sleep(0.1)
            wire.say(Beat())
        assert wire.hellos.empty()


async def test_a_site_that_is_shut_out_stops_with_the_reason(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire) as daemon:
        wire.failing = [PermissionDenied("the certificate of site bern was revoked")]
        wire.say(Unreachable("cut"))
        await asyncio.wait([daemon])
        with pytest.raises(PermissionDenied, match="revoked"):
            daemon.result()


async def test_a_transfer_that_breaks_is_tried_again_on_the_same_stream(tmp_path: Path) -> None:
    worked(tmp_path)
    wire, breaks = Wire(), [Unreachable("cable")] * 3
    wire.on_upload = lambda: raising(breaks.pop())() if breaks else None
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    assert wire.uploads == [UPDATE]
    assert records(tmp_path) == ["reserved", "charged"]


async def test_an_order_that_comes_again_ends_the_wait_for_the_next_try(tmp_path: Path) -> None:
    worked(tmp_path)
    wire, tried = Wire(), asyncio.Event()

    def break_once() -> None:
        if not tried.is_set():
            tried.set()
            raise Unreachable("cable")

    wire.on_upload = break_once
    async with running(tmp_path, wire, backoff=Backoff(3600.0, 3600.0)):
        wire.say(ORDER)
        await tried.wait()
        wire.say(ORDER)
        await wire.event(Trained)


async def test_a_result_that_was_ready_while_the_stream_was_down_is_not_lost(
    tmp_path: Path,
) -> None:
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.on_upload = lambda: setattr(wire, "connected", False)
        wire.say(ORDER)
        await until(lambda: len(wire.uploads) > 0)
        wire.on_upload = lambda: None
        wire.say(Unreachable("cut"))
        await wire.hello()
        assert (await wire.event(Trained)).update == UPDATED


# --- its folder ---------------------------------------------------------------------------------


async def test_a_second_daemon_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, Wire()):
        on_its_way = tmp_path / "blobs" / UPDATED.digest
        on_its_way.write_bytes(UPDATE)
        with pytest.raises(ConfigError) as caught:
            async with running(tmp_path, Wire()):
                pass
        assert str(caught.value) == (
            f"{tmp_path} is in use by a site daemon (process {os.getpid()}); stop that one first"
        )
        assert on_its_way.exists()


async def test_a_damaged_ledger_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    async with running(tmp_path, Wire()):
        pass
    path = tmp_path / "ledger" / "records.jsonl"
    path.write_bytes(path.read_bytes() + b"deadbeef {}\n" + path.read_bytes())
    with pytest.raises(Corrupt, match=r"records\.jsonl: damaged at byte"):
        async with running(tmp_path, Wire()):
            pass


async def test_data_that_cannot_be_read_keep_no_site_away(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    wire = Wire()
    async with running(tmp_path, wire):
        pass  # it said hello


async def test_a_data_digest_is_keyed_and_changes_with_the_data(tmp_path: Path) -> None:
    digests = set()
    for folder, data in (("a", b"rows"), ("b", b"rows"), ("a", b"more")):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "train.csv").write_bytes(data)
        wire = Wire()
        wire.failing = [Unreachable("one try")]
        async with running(place, wire):
            wire.say(Unreachable("cut"))
            digests.add((await wire.hello()).datasets[0].digest)
    assert len(digests) == 3


async def test_stray_folders_among_the_tasks_are_not_told(tmp_path: Path) -> None:
    worked(tmp_path)
    (tmp_path / "tasks" / "my backup").mkdir()
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(Unreachable("cut"))
        assert (await wire.hello()).kept == (ORDER.task,)


# --- releases -----------------------------------------------------------------------------------


class Shopfront:
    """An endpoint that serves version 1, and has an opinion on the next one."""

    def __init__(self, opinion: FedmlError | None) -> None:
        self._opinion = opinion

    async def update(self, model: str, link: Link) -> Serving:
        if self._opinion:
            raise self._opinion
        return Serving(model, 2, "cd" * 32, "live")

    def serving(self) -> tuple[Serving, ...]:
        return (Serving("cancer", 1, "ab" * 32, "live"),)


async def test_a_release_notice_is_answered_with_what_is_served(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire, endpoint=Shopfront(None)):
        wire.say(ReleaseNotice("cancer"))
        assert await wire.event(Serving) == Serving("cancer", 2, "cd" * 32, "live")


async def test_a_bad_release_is_told_with_what_is_served_still(tmp_path: Path) -> None:
    wire = Wire()
    async with running(tmp_path, wire, endpoint=Shopfront(Untrusted("tampered"))):
        wire.say(ReleaseNotice("cancer"))
        assert await wire.event(Serving) == Serving("cancer", 1, "ab" * 32, "refused", "tampered")


# --- with a real worker -------------------------------------------------------------------------

SLEEPER = """
import os, time, torch
from pathlib import Path
from fedml.learning.recipe import Rows

class Sleeper:
    labels = ("no", "yes")
    def build(self):
        return torch.nn.Linear(2, 2)
    def loss(self, output, target):
        return torch.nn.functional.cross_entropy(output, target)
    def score(self, output, target):
        return {}
    def read(self, path):
        Path(path).with_suffix(".pid").write_text(f"{os.getpid()} ")
        time.sleep(3600)
    def example(self, rows):
        return torch.zeros(rows, 2)
"""


async def test_cancelling_kills_the_work_itself(tmp_path: Path) -> None:
    from fedml.learning.recipe import identify
    from fedml.site.policy import AllowedRecipe, Dataset, Policy

    (tmp_path / "recipe.py").write_text(SLEEPER)
    (tmp_path / "rows").touch()
    files = {"sleeper": f"{tmp_path / 'recipe.py'}:Sleeper"}
    recipe = identify("sleeper", files)
    a_policy = Policy(
        recipes={"sleeper": AllowedRecipe(recipe.digest, files["sleeper"])},
        datasets={"records": Dataset(tmp_path / "rows", 10, ("sleeper",), epsilon=1.2)},
    )
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
    model = len(header).to_bytes(8, "little") + header + bytes(4)
    wire = ModelWire()
    wire.model = model
    order = replace(ORDER, recipe=recipe, model=wire.blob)
    pid = tmp_path / "rows.pid"
    async with running(tmp_path, wire, a_policy):
        wire.say(order)
        await until(lambda: pid.exists() and pid.read_text().endswith(" "))
        worker = int(pid.read_text())
        assert is_running(worker)
        wire.say(Cancel(order.task, "too late"), Forget(order.task, counted=False))
        await until(lambda: not is_running(worker))
        await until(lambda: entries(tmp_path) == {order.task: "void"})
        assert not list((tmp_path / "tasks").iterdir())


class ModelWire(Wire):
    """A wire that hands out a model of the test's own."""

    model = b""

    @property
    def blob(self) -> Blob:
        return Blob(blake3(self.model).hexdigest(), len(self.model))

    async def download(self, blob: Blob, into: BlobStore) -> None:
        into.put_bytes(self.model)


def test_the_daemon_never_loads_torch(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from fedml.protocol.messages import Trained
from tests.site.wire import ORDER, Wire, running, worked

async def main():
    worked(Path({str(tmp_path)!r}))
    wire = Wire()
    async with running(Path({str(tmp_path)!r}), wire):
        wire.say(ORDER)
        await wire.event(Trained)

asyncio.run(main())
print(sorted({{"torch", "opacus", "mlflow", "hydra", "onnxruntime"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def raising(error: FedmlError) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


async def until(test: Callable[[], bool]) -> None:
    """Wait for something on the disk or in another process, which sends no event."""
    async with asyncio.timeout(60):
        while not test():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False
