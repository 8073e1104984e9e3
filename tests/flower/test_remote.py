"""The grid over real sites: what came is kept, what was open is asked again, nothing else is.

The coordinator here is a fake at the edge: it hands messages to a ClientApp as a site does.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedml.errors import ConfigError, Corrupt, TaskFailed
from fedml.flower import private
from fedml.flower.answer import answer
from fedml.flower.grid import RUN, SimulatedGrid
from fedml.flower.randomness import apart, sow
from fedml.flower.record import Record
from fedml.flower.remote import Part, RemoteGrid
from fedml.protocol.apps import FIRST_NODE as NODE
from tests.flower.apps import FIRST as ARRAYS
from tests.flower.apps import stock_app

SITES = 3
Spoil = Callable[[int, int, bytes], bytes]


class Coordinator:
    """Carries messages to sites; `dies_at` is how many things it is told before it is gone."""

    def __init__(self, folder: Path, app: ClientApp, dies_at: float = float("inf")) -> None:
        self.folder, self.app, self.dies_at = folder, app, dies_at
        self.contexts = [
            Context(RUN, NODE + k, {"partition-id": k, "num-partitions": SITES}, RecordDict(), {})
            for k in range(SITES)
        ]
        self.told = 0
        self.kept: dict[tuple[int, int], bytes] = {}  # what a site keeps of a wave that is open
        self.worked: list[tuple[int, int]] = []
        self.receipts: list[Mapping[str, Any]] = []
        self.blobs: list[bytes] = []
        self.spoil: Spoil = lambda site, messages, data: data

    def ask(self, told: Mapping[str, object]) -> Mapping[str, object]:
        told = json.loads(json.dumps(told))  # as a pipe does
        self.told += 1
        if self.told == self.dies_at:
            raise TaskFailed("the coordinator is gone")
        if "kept" in told:
            self.receipts.append(told)
            self.kept.clear()
            return {}
        orders: list[dict[str, Any]] = told["orders"]  # type: ignore[assignment]
        return {"came": {str(o["site"]): self.answer(o) for o in orders if not o["is_kept"]}}

    def answer(self, order: Mapping[str, Any]) -> Mapping[str, str]:
        site, messages = order["site"], order["messages"]
        data = Path(order["path"]).read_bytes()
        self.blobs.append(data)
        if (site, messages) not in self.kept:
            self.worked.append((site, messages))
            message = private.addressed(data, NODE + site, f"{NODE + site}-{messages}", 1e9)
            private.act_as(RUN, NODE + site)
            with apart(order["seed"]):
                reply, _ = answer(self.app, message, self.contexts[site], site)
            private.act_as(RUN, private.COORDINATOR)
            self.kept[site, messages] = private.message_bytes(reply)
        path = self.folder / f"reply-{site}-{messages}"
        spoilt = self.spoil(site, messages, self.kept[site, messages])
        if not spoilt:
            return {"reason": "away for more than 5 s"}
        path.write_bytes(spoilt)
        return {"path": str(path)}


class Seated:
    """Gives a ServerApp its sites, as the program that plays it does; closes what it opened.

    What is not flushed is lost, as in a crash: an older record is never closed before a newer.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, there: Coordinator, folder: Path, committed: int = 0) -> RemoteGrid:
        part = Part("", "", {}, SITES, 7, committed)
        self.records.append(Record(folder / "replies.bin", 60.0))
        record = self.records[-1]
        return RemoteGrid(part, ask=there.ask, record=record, folder=folder, tell=lambda _: None)


@pytest.fixture
def seated() -> Iterator[Seated]:
    seats = Seated()
    yield seats
    for record in seats.records:
        record.close()


def play(grid: Grid, rounds: int = 3) -> list[Any]:
    sow(1)
    result = FedAvg().start(grid, ArrayRecord(ARRAYS), num_rounds=rounds)
    assert result.arrays is not None
    figures = [dict(metrics) for metrics in result.train_metrics_clientapp.values()]
    return [[a.tobytes() for a in result.arrays.to_numpy_ndarrays()], figures]


def test_an_app_comes_to_the_same_bits_as_over_simulated_sites(
    seated: Seated, tmp_path: Path
) -> None:
    there = Coordinator(tmp_path, stock_app())
    expected = play(SimulatedGrid(stock_app(), SITES, seed=7))
    assert play(seated(there, tmp_path)) == expected
    assert [len(r["digests"]) for r in there.receipts] == [SITES] * 6
    assert len(set(there.blobs)) == 6  # a wave's messages are one blob
    assert not (tmp_path / "outbox").exists()


@pytest.mark.parametrize("dies_at", range(1, 13))
def test_wherever_the_coordinator_dies_no_message_is_worked_twice(
    seated: Seated, tmp_path: Path, dies_at: int
) -> None:
    whole = play(seated(Coordinator(tmp_path / "x", stock_app()), tmp_path / "x"))
    there = Coordinator(tmp_path, stock_app(), dies_at)
    with pytest.raises(TaskFailed):
        play(seated(there, tmp_path))
    there.dies_at = float("inf")
    assert play(seated(there, tmp_path, len(there.receipts))) == whole
    assert sorted(there.worked) == [(site, k) for site in range(SITES) for k in range(6)]
    assert [r["kept"] for r in there.receipts] == [1, 2, 3, 4, 5, 6]


def test_a_wave_that_goes_out_again_has_the_same_bytes(seated: Seated, tmp_path: Path) -> None:
    there = Coordinator(tmp_path, stock_app(), dies_at=2)
    with pytest.raises(TaskFailed):
        play(seated(there, tmp_path))
    (tmp_path / "replies.bin").unlink()  # as if they had not reached the disk
    there.dies_at = float("inf")
    play(seated(there, tmp_path), rounds=1)
    first, again = there.blobs[:SITES], there.blobs[SITES : 2 * SITES]
    assert first == again


def test_of_a_wave_that_is_kept_in_part_only_the_rest_is_asked_for(
    seated: Seated, tmp_path: Path
) -> None:
    there = Coordinator(tmp_path, stock_app(), dies_at=2)
    with pytest.raises(TaskFailed):
        play(seated(there, tmp_path))
    path = tmp_path / "replies.bin"
    path.write_bytes(path.read_bytes()[:-1])  # the last reply's end is torn off
    there.dies_at = float("inf")
    play(seated(there, tmp_path), rounds=1)
    assert len(there.blobs) == SITES + 1 + SITES  # the first wave, its rest, the second
    assert [len(r["digests"]) for r in there.receipts] == [SITES, SITES]


def test_who_does_not_reply_or_sends_rubbish_is_an_error_reply(
    seated: Seated, tmp_path: Path
) -> None:
    there = Coordinator(tmp_path, stock_app())
    there.spoil = lambda site, messages, data: {0: data, 1: b"", 2: data[:-3]}[site]
    grid = seated(there, tmp_path)
    asked = [
        Message(RecordDict({"arrays": ArrayRecord(ARRAYS)}), n, "train")
        for n in grid.get_node_ids()
    ]
    good, away, rubbish = grid.send_and_receive(asked)
    assert good.has_content()
    assert (away.error.code, away.error.reason) == (private.ABSENT, "away for more than 5 s")
    assert str(rubbish.error.reason).startswith("reply refused: ")
    assert there.receipts[0]["digests"]["2"] == ""
    assert set(there.receipts[0]["reasons"]) == {"1", "2"}
    assert [r.metadata.reply_to_message_id for r in (good, away, rubbish)] == [
        f"{NODE + k}-0" for k in range(SITES)
    ]


def test_a_reply_says_nothing_but_its_content(seated: Seated, tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = NODE + 1  # as if another had said it
        reply.metadata.__dict__["_reply_to_message_id"] = "another"
        return reply

    grid = seated(Coordinator(tmp_path, app), tmp_path)
    [reply] = grid.send_and_receive([Message(RecordDict(), NODE, "train")])
    assert reply.metadata.src_node_id == NODE
    assert reply.metadata.reply_to_message_id == f"{NODE}-0"


def test_two_messages_to_one_site_are_two_waves(seated: Seated, tmp_path: Path) -> None:
    there = Coordinator(tmp_path, stock_app())
    content = RecordDict({"arrays": ArrayRecord(ARRAYS)})
    nodes = [NODE, NODE + 1, NODE, 5]
    grid = seated(there, tmp_path)
    replies = list(grid.send_and_receive([Message(content, n, "train") for n in nodes]))
    assert [sorted(r["digests"]) for r in there.receipts] == [["0", "1"], ["0"]]
    assert [r.metadata.src_node_id for r in replies] == nodes
    assert replies[3].error.reason == "there is no node 5"


def test_a_server_app_that_asks_otherwise_is_not_gone_on_with(
    seated: Seated, tmp_path: Path
) -> None:
    there = Coordinator(tmp_path, stock_app())
    play(seated(there, tmp_path), rounds=1)
    grid = seated(there, tmp_path, 2)
    with pytest.raises(ConfigError, match="asks site 0, at its message 1, other than before"):
        grid.send_and_receive([Message(RecordDict(), NODE, "train")])


def test_replies_that_were_lost_are_not_asked_for_again(seated: Seated, tmp_path: Path) -> None:
    there = Coordinator(tmp_path, stock_app())
    play(seated(there, tmp_path), rounds=1)
    (tmp_path / "replies.bin").unlink()
    with pytest.raises(Corrupt, match="restore it from a backup"):
        play(seated(there, tmp_path, 2), rounds=1)


def test_a_mods_refusal_travels_as_an_error(seated: Seated, tmp_path: Path) -> None:
    def refuse(message: Message, context: Context, call: Any) -> Message:
        return Message(Error(77, "not today"), reply_to=message)

    grid = seated(Coordinator(tmp_path, stock_app([refuse])), tmp_path)
    content = RecordDict({"arrays": ArrayRecord(ARRAYS)})
    [reply] = grid.send_and_receive([Message(content, NODE, "train")])
    assert (reply.error.code, reply.error.reason) == (77, "not today")
