"""The grid: sites apart from one another, errors as Flower tells them, chance in its place."""

import math
import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import FedAvg

from fedml.errors import ConfigError
from fedml.flower.grid import Exchange, SimulatedGrid
from fedml.flower.randomness import sow
from tests.flower.apps import FIRST, scored, stock_app, trained


def ask(
    grid: SimulatedGrid, content: RecordDict | None = None, kind: str = "train"
) -> list[Message]:
    """Ask every site the same, as strategies do: with one content for all."""
    shared = RecordDict({"config": ConfigRecord({"n": 0})}) if content is None else content
    asked = [Message(shared, node, "train") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(asked))


def told(message: Message, **figures: float) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({**figures})}), reply_to=message)


def counts(replies: list[Message], name: str = "n") -> list[object]:
    return [reply.content.metric_records["metrics"][name] for reply in replies]


def test_what_a_site_does_to_its_message_no_other_site_sees() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        config["n"] = int(str(config["n"])) + 1
        return told(message, n=int(str(config["n"])))

    shared = RecordDict({"config": ConfigRecord({"n": 0})})
    grid = SimulatedGrid(app, 3)
    assert counts(ask(grid, shared)) == [1, 1, 1]
    assert shared.config_records["config"]["n"] == 0


def test_what_a_strategy_does_to_a_reply_no_site_sees() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mine = context.state.metric_records.setdefault("m", MetricRecord({"n": 5}))
        return Message(RecordDict({"metrics": mine}), reply_to=message)

    grid = SimulatedGrid(app, 1)
    [reply] = ask(grid)
    reply.content.metric_records["metrics"]["n"] = 99
    assert counts(ask(grid)) == [5]


def test_a_site_keeps_its_state_and_knows_its_partition() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mine = context.state.metric_records.setdefault("m", MetricRecord({"n": 0}))
        mine["n"] = int(str(mine["n"])) + int(context.node_config["partition-id"])
        return told(message, n=int(str(mine["n"])), of=int(context.node_config["num-partitions"]))

    grid = SimulatedGrid(app, 3, config={"lr": 0.5})
    ask(grid)
    replies = ask(grid)
    assert counts(replies) == [0, 2, 4]
    assert counts(replies, "of") == [3, 3, 3]


def test_a_site_that_raises_answers_with_an_error_in_flowers_words() -> None:
    app, seen = ClientApp(), list[Exchange]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        if site == 1:
            raise ZeroDivisionError("division by zero")
        if site == 2:
            raise SystemExit(3)
        return Message(trained(message.content.array_records["arrays"], site), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(scored(message.content.array_records["arrays"], 0), reply_to=message)

    grid = SimulatedGrid(app, 4, tell=seen.append)
    replies = ask(grid, RecordDict({"arrays": ArrayRecord(FIRST)}))
    assert [reply.has_error() for reply in replies] == [False, True, True, False]
    assert replies[1].error.code == 2
    assert replies[1].error.reason == "<class 'ZeroDivisionError'>:<'division by zero'>"
    assert [(f.site, f.reason) for f in seen[0].failures] == [
        (1, "ZeroDivisionError: division by zero"),
        (2, "SystemExit: 3"),
    ]
    assert "in train" in seen[0].failures[0].trace
    result = FedAvg().start(grid, ArrayRecord(FIRST), num_rounds=1)
    mean = [trained(ArrayRecord(FIRST), site).array_records["arrays"] for site in (0, 3)]
    first, last = (arrays.to_numpy_ndarrays()[1] for arrays in mean)
    found = result.arrays.to_numpy_ndarrays()[1]
    np.testing.assert_allclose(found, (10 * first + 13 * last) / 23, rtol=1e-6)


def test_a_client_app_that_returns_nothing_is_an_error_reply() -> None:
    app = ClientApp()
    app.train()(lambda message, context: None)  # type: ignore[arg-type, return-value]
    [reply] = ask(SimulatedGrid(app, 1))
    assert "returned NoneType, not a Message" in str(reply.error.reason)


def test_mods_act_in_their_order_around_the_app() -> None:
    heard = list[str]()

    def mod(name: str) -> Mod:
        def act(message: Message, context: Context, call: ClientAppCallable) -> Message:
            heard.append(f"{name} in")
            reply = call(message, context)
            heard.append(f"{name} out")
            return reply

        return act

    app = ClientApp(mods=[mod("outer"), arrays_size_mod, message_size_mod])

    @app.train(mods=[mod("inner")])
    def train(message: Message, context: Context) -> Message:
        heard.append("app")
        return Message(trained(message.content.array_records["arrays"], 0), reply_to=message)

    ask(SimulatedGrid(app, 1), RecordDict({"arrays": ArrayRecord(FIRST)}))
    assert heard == ["outer in", "inner in", "app", "inner out", "outer out"]


def test_a_mods_own_refusal_is_counted_as_a_failure() -> None:
    seen = list[Exchange]()
    grid = SimulatedGrid(stock_app([fixedclipping_mod]), 2, tell=seen.append)
    content = RecordDict({"arrays": ArrayRecord(FIRST), "config": ConfigRecord()})
    assert all(reply.has_error() for reply in ask(grid, content))
    assert [failure.site for failure in seen[0].failures] == [0, 1]


def test_a_mods_noise_differs_by_site_and_message_and_follows_from_the_seed() -> None:
    content = RecordDict({"arrays": ArrayRecord(FIRST)})

    def noisy(seed: int) -> list[bytes]:
        grid = SimulatedGrid(stock_app([LocalDpMod(1e-9, 1.0, 0.5, 1e-5)]), 2, seed=seed)
        replies = [*ask(grid, content), *ask(grid, content)]
        return [reply.content.array_records["arrays"]["1"].data for reply in replies]

    first = noisy(1)
    assert len(set(first)) == 4
    assert noisy(1) == first
    assert not set(noisy(2)) & set(first)


def test_what_sites_draw_does_not_move_what_the_server_app_draws() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        random.random()
        np.random.normal(size=7)
        torch.rand(7)
        return told(message, n=0)

    sow(3)
    expected = random.random(), np.random.normal(), float(torch.rand(()))
    sow(3)
    ask(SimulatedGrid(app, 5))
    assert (random.random(), np.random.normal(), float(torch.rand(()))) == expected
    sow(4)
    others = random.random(), np.random.normal(), float(torch.rand(()))
    assert not set(others) & set(expected)


def test_a_reply_says_which_message_it_answers() -> None:
    app = ClientApp()
    app.train()(lambda message, context: told(message, n=0))
    grid = SimulatedGrid(app, 2)
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    ids = list(grid.push_messages(asked))
    assert ids == [message.metadata.message_id for message in asked]
    assert len(set(ids)) == 2
    replies = list(grid.pull_messages(reversed(ids)))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids[::-1]
    assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())[::-1]
    assert list(grid.pull_messages(ids)) == []


def test_a_message_to_nobody_is_answered_with_an_error() -> None:
    grid = SimulatedGrid(ClientApp(), 2)
    [reply] = grid.send_and_receive([Message(RecordDict(), 77, "train")])
    assert reply.error.reason == "there is no node 77"


def test_a_strategy_that_waits_for_more_sites_than_there_are_is_told() -> None:
    grid = SimulatedGrid(stock_app(), 2, patience=0.0)
    with pytest.raises(ConfigError, match="waits for more sites than the 2 there are"):
        while len(list(grid.get_node_ids())) < 3:
            pass


def test_asking_who_is_there_is_no_waiting_while_messages_go() -> None:
    app = ClientApp()
    app.train()(lambda message, context: told(message, n=0))
    grid = SimulatedGrid(app, 2, patience=0.0)
    for _ in range(20):
        assert len(ask(grid)) == 2
    patient = SimulatedGrid(app, 2, patience=math.inf)
    for _ in range(20):
        assert len(list(patient.get_node_ids())) == 2


def test_the_older_ways_to_make_a_message_and_to_list_nodes_work() -> None:
    app = ClientApp()

    @app.query("ask")
    def query(message: Message, context: Context) -> Message:
        assert message.metadata.group_id == "7"
        return told(message, n=int(context.node_config["partition-id"]))

    grid = SimulatedGrid(app, 2)
    nodes = [node.node_id for node in grid.get_nodes()]
    assert nodes == list(grid.get_node_ids())
    asked = [grid.create_message(RecordDict(), "query.ask", node, "7", ttl=60.0) for node in nodes]
    assert counts(list(grid.send_and_receive(asked, timeout=0.0))) == [0, 1]
