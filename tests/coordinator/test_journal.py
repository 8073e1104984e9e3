"""The journal replays what happened, and says what is wrong with itself and what to do."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml import durable
from fedml.coordinator.host import run_info
from fedml.coordinator.journal import (
    Ended,
    Entry,
    Journal,
    Registered,
    RoundCommitted,
    RoundOpened,
    Submitted,
)
from fedml.errors import ConfigError, Corrupt
from fedml.params import encode
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.rounds import Opened, Opening
from fedml.strategies import ServerState
from tests.rounds.worlds import MODEL, plan

RUN = RunId("line-1")
BERN, KYOTO = SiteId("bern"), SiteId("kyoto")
SUBMITTED = Submitted(RUN, plan().to_json(), "admin", 1.5)
OPENED = Opened(Opening(RUN, 1, 1, (BERN, KYOTO), 1, 60.0), {"quito": "not connected"}, 2.5)
RECEIPT = Receipt(
    run=RUN,
    round=1,
    attempt=1,
    asked=(BERN, KYOTO),
    counted=(Counted(BERN, 3.0, "ab" * 32, 0.5),),
    missing={"kyoto": "crashed"},
    metrics={"loss": 0.25},
    model=MODEL.digest(),
    opened=2.5,
    closed=3.5,
)
STATE = ServerState(MODEL, {"momentum": MODEL}, step=1)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    fresh = Journal(tmp_path)
    fresh.append(SUBMITTED)
    return fresh


def stated(folder: Path, state: ServerState = STATE) -> Path:
    """Return a file with a state's parts, as the host leaves one among its blobs."""
    path = folder / "blob"
    durable.replace(path, *encode({"": state.params, **state.slots}))
    return path


def reopened(journal: Journal, folder: Path) -> Journal:
    journal.close()
    return Journal(folder)


def test_every_kind_of_entry_is_replayed(journal: Journal, tmp_path: Path) -> None:
    journal.append(RoundOpened(RUN, OPENED, {"bern": "cd" * 32}))
    history = reopened(journal, tmp_path).runs[RUN]
    assert (history.submitted, history.plan) == (SUBMITTED, plan())
    assert (history.opened, history.data) == (OPENED, {"bern": "cd" * 32})
    assert not history.receipts


def test_a_committed_round_is_replayed_with_its_state(journal: Journal, tmp_path: Path) -> None:
    journal.append(RoundOpened(RUN, OPENED))
    journal.commit(RUN, RECEIPT, stated(tmp_path))
    journal.append(RoundOpened(RUN, replace(OPENED, opening=replace(OPENED.opening, number=2))))
    failed = replace(RECEIPT, round=2, counted=(), model="")
    journal.commit(RUN, failed, None)
    journal.append(Registered(RUN, 4))
    journal.append(Ended(RUN, "failed", "a gate"))
    again = reopened(journal, tmp_path)
    history = again.runs[RUN]
    assert history.receipts == [RECEIPT, failed]
    assert history.opened is None
    assert (history.version, history.ended) == (4, Ended(RUN, "failed", "a gate"))
    assert again.state(RUN) == STATE


def test_a_round_s_end_and_the_next_one_s_opening_are_noted_together(
    journal: Journal, tmp_path: Path
) -> None:
    following = replace(OPENED, opening=replace(OPENED.opening, number=2))
    state = stated(tmp_path)
    journal.commit(RUN, RECEIPT, state, RoundOpened(RUN, following))
    assert (tmp_path / "states" / "line-1.1.safetensors").samefile(state)
    state.unlink()  # the blob goes; the state stays
    again = reopened(journal, tmp_path)
    assert again.runs[RUN].receipts == [RECEIPT]
    assert again.runs[RUN].opened == following
    assert again.state(RUN) == STATE
    again.close()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # a crash between the two
    torn = Journal(tmp_path)
    assert torn.runs[RUN].receipts == [RECEIPT]
    assert torn.runs[RUN].opened is None


def test_before_the_first_commit_there_is_no_state(journal: Journal) -> None:
    assert journal.state(RUN) is None


def test_only_the_newest_state_is_kept(journal: Journal, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        journal.commit(RUN, replace(RECEIPT, round=number), stated(tmp_path))
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["line-1.3.safetensors"]


def test_a_torn_tail_is_cut_off_and_told(journal: Journal, tmp_path: Path) -> None:
    journal.append(RoundOpened(RUN, OPENED))
    journal.close()
    path = tmp_path / "journal.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    again = Journal(tmp_path)
    assert again.runs[RUN].opened is None
    assert again.torn
    again.append(RoundOpened(RUN, OPENED))
    assert reopened(again, tmp_path).runs[RUN].opened == OPENED
    assert path.read_bytes() == data


def test_a_damaged_record_is_named_with_the_way_out(journal: Journal, tmp_path: Path) -> None:
    journal.append(RoundOpened(RUN, OPENED))
    journal.close()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b"admin", b"adm1n", 1))
    with pytest.raises(Corrupt) as caught:
        Journal(tmp_path)
    assert str(caught.value) == f"{path}: damaged at byte 0; restore it from a backup"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"kind": "Paused", "entry": {}},
            "a record of kind 'Paused' is none of ours; use the fedml that wrote it",
        ),
        ({"entry": {}}, "a record of kind None is none of ours"),
        ({"kind": "Registered", "entry": {"run": "line-1"}}, "Registered.version is missing"),
        ({"kind": "Registered", "entry": None}, "Registered None: must be an object"),
        (
            {"kind": "Registered", "entry": {"run": "other-1", "version": 1}},
            "run other-1 goes on and was never submitted",
        ),
        (
            {"kind": "Submitted", "entry": {"run": "b-1", "plan": "{}", "by": "x", "at": 1.0}},
            "the plan of run b-1 does not read (plan.model is missing;",
        ),
    ],
)
def test_a_record_that_makes_no_sense_is_named_with_file_and_way_out(
    journal: Journal, tmp_path: Path, record: durable.Record, message: str
) -> None:
    journal.close()
    path = tmp_path / "journal.jsonl"
    log = durable.Log(path)
    log.append(record)
    log.close()
    with pytest.raises(Corrupt) as caught:
        Journal(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "from a backup" in text
    assert "\n" not in text


def test_a_run_is_submitted_once(journal: Journal) -> None:
    with pytest.raises(Corrupt, match="run line-1 was submitted twice"):
        journal.append(SUBMITTED)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "No such file or directory; restore the folder"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (
            lambda path: path.write_bytes(
                b"".join(encode({"": MODEL + MODEL.map(lambda b: b + 1)}))
            ),
            "is not the state that the journal names",
        ),
        (
            lambda path: path.write_bytes(b"".join(encode({"momentum": MODEL}))),
            "is not the state that the journal names",
        ),
    ],
)
def test_a_state_that_is_gone_or_swapped_is_named_with_the_way_out(
    journal: Journal, tmp_path: Path, harm: object, message: str
) -> None:
    journal.commit(RUN, RECEIPT, stated(tmp_path))
    path = tmp_path / "states" / "line-1.1.safetensors"
    harm(path)  # type: ignore[operator]
    with pytest.raises(Corrupt) as caught:
        journal.state(RUN)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "restore the folder from a backup" in str(caught.value)


def test_a_crash_between_state_and_record_leaves_the_round_open(
    journal: Journal, tmp_path: Path
) -> None:
    journal.append(RoundOpened(RUN, OPENED))
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "line-1.1.safetensors").write_bytes(b"".join(encode({"": MODEL})))
    again = reopened(journal, tmp_path)
    assert again.runs[RUN].opened == OPENED
    assert again.state(RUN) is None


def test_a_closed_journal_takes_nothing_more(journal: Journal, tmp_path: Path) -> None:
    journal.close()
    journal.close()
    with (
        (tmp_path / "other").open("w"),  # takes the descriptor that was closed
        pytest.raises(ConfigError, match="is closed; the coordinator is going down"),
    ):
        journal.append(Registered(RUN, 1))
    assert (tmp_path / "other").read_bytes() == b""


def test_threads_may_share_it(journal: Journal, tmp_path: Path) -> None:
    entries: list[Entry] = [
        Submitted(RunId(f"line-{n}"), plan().to_json(), "x", 1.0) for n in range(2, 30)
    ]
    threads = [threading.Thread(target=journal.append, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for _ in range(1000):
        for history in journal.runs.values():  # as the event loop goes over them meanwhile
            assert history.plan
    for thread in threads:
        thread.join()
    assert len(reopened(journal, tmp_path).runs) == 29


def test_a_commit_of_a_round_that_moved_nothing_keeps_the_state(
    journal: Journal, tmp_path: Path
) -> None:
    journal.commit(RUN, RECEIPT, stated(tmp_path))
    journal.append(RoundCommitted(RUN, replace(RECEIPT, kind="evaluate", scores={"a": 0.5})))
    assert cast(ServerState, journal.state(RUN)).params == MODEL


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_journal_cut_at_any_byte_keeps_its_whole_records_and_tells(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A crash leaves a beginning of what was written: each one replays as its records did."""
    folder = tmp_path_factory.mktemp("journal")
    book = Journal(folder)
    book.append(SUBMITTED)
    ends, path = [0, path_size(folder)], folder / "journal.jsonl"
    opened = RoundOpened(RUN, OPENED)
    for entry in (opened, RoundCommitted(RUN, RECEIPT), Registered(RUN, 4), Ended(RUN, "done", "")):
        book.append(entry)
        ends.append(path_size(folder))
    book.close()
    written = path.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    again = Journal(folder)
    whole = max(number for number, end in enumerate(ends) if end <= cut)
    assert path.read_bytes() == written[: ends[whole]]
    assert again.torn == written[ends[whole] : cut]
    if whole:
        history = again.runs[RUN]
        assert (history.opened is not None) == (whole == 2)
        assert len(history.receipts) == (whole > 2)
        assert (history.version, history.ended is not None) == (4 * (whole > 3), whole > 4)
    again.close()


def path_size(folder: Path) -> int:
    return (folder / "journal.jsonl").stat().st_size


def test_a_strategy_that_is_gone_stops_those_runs_alone_that_need_it(tmp_path: Path) -> None:
    text = plan().to_json()
    assert text.count('"fedavgm"') == 1
    fresh = Journal(tmp_path)
    fresh.append(replace(SUBMITTED, plan=text.replace('"fedavgm"', '"gone"')))
    fresh.close()
    with pytest.raises(Corrupt, match=r"run line-1 does not read .*strategy 'gone' is not inst"):
        Journal(tmp_path)
    log = durable.Log(tmp_path / "journal.jsonl")
    entry = {"run": RUN, "state": "done", "detail": ""}
    log.append({"kind": "Ended", "entry": entry})
    log.close()
    over = Journal(tmp_path)
    info = run_info(over, RUN, None)
    assert (info.model, info.rounds, info.state) == ("line", 3, "done")
    with pytest.raises(Corrupt, match="use the fedml that wrote it"):
        over.runs[RUN].plan  # noqa: B018 - it is the reading that fails
