"""The contract with Flower: what we touch that is not public, and that nobody hears of a run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAvg, Result

import fedml.flower
from fedml.errors import MalformedUpdate
from fedml.flower import private
from fedml.flower.contents import copied, digest, params_of
from fedml.flower.grid import SimulatedGrid
from tests.flower.apps import FIRST, stock_app

FOLDER = Path(fedml.flower.__file__).parent
PUBLIC = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.clientapp.mod",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def imported(path: Path) -> set[str]:
    """Return the modules of Flower that a file names in its imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "flwr"}


def test_only_one_file_touches_what_is_not_public() -> None:
    others = [path for path in FOLDER.glob("*.py") if path.name != "private.py"]
    assert len(others) > 5
    for path in others:
        assert imported(path) <= PUBLIC, path
    assert imported(FOLDER / "private.py") - PUBLIC


@pytest.mark.parametrize("wish", ["1", None])
def test_telemetry_and_update_checks_are_off(wish: str | None) -> None:
    look = (
        "import fedml.flower.grid, os, flwr.supercore.telemetry as t;"
        "from flwr.supercore.constant import FLWR_DISABLE_UPDATE_CHECK as name;"
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ[name])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLWR")}
    env |= {"FLWR_TELEMETRY_ENABLED": wish} if wish else {}
    done = subprocess.run(
        [sys.executable, "-c", look], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]


def test_messages_are_of_the_run_and_node_that_we_act_as() -> None:
    private.act_as(7, 8)
    message = Message(RecordDict(), 5, "train")
    about = message.metadata
    assert (about.run_id, about.src_node_id, about.dst_node_id) == (7, 8, 5)
    private.give_id(message, "mine")
    reply = Message(RecordDict(), reply_to=message)
    assert about.message_id == "mine"
    assert reply.metadata.reply_to_message_id == "mine"
    assert private.empty_run(7).run_id == 7


def test_a_message_as_received_has_everything_but_its_content_from_the_sent_one() -> None:
    private.act_as(7, 8)
    sent = Message(RecordDict(), 5, "train.fit", ttl=9.0, group_id="g")
    private.give_id(sent, "mine")
    content = RecordDict({"m": MetricRecord({"a": 1})})
    got = private.received(sent, content)
    assert got.content is content
    assert vars(got.metadata) == vars(sent.metadata)
    got.metadata.message_type = "train.other"
    assert sent.metadata.message_type == "train.fit"


def test_replies_and_contexts_survive_as_bytes() -> None:
    private.act_as(7, 8)
    sent = Message(RecordDict(), 5, "train")
    content = RecordDict(
        {"arrays": ArrayRecord(FIRST), "metrics": MetricRecord({"a": 1, "b": [0.5, 2.0]})}
    )
    reply = private.read_message(private.message_bytes(Message(content, reply_to=sent)))
    assert reply.content == content
    assert digest(reply.content) == digest(content)
    failed = private.read_message(private.message_bytes(Message(Error(2, "why"), reply_to=sent)))
    assert (failed.error.code, failed.error.reason) == (2, "why")
    context = Context(7, 5, {"partition-id": 3}, content, {"lr": 0.1, "on": True, "name": "x"})
    assert private.read_context(private.context_bytes(context)) == context


def test_results_of_strategies_are_overheard_and_only_meanwhile() -> None:
    heard = list[Result]()
    grid, first = SimulatedGrid(stock_app(), 2), ArrayRecord(FIRST)
    with private.overheard(heard.append):
        result = FedAvg().start(grid, first, num_rounds=1)
    assert heard == [result]
    FedAvg().start(grid, first, num_rounds=1)
    assert len(heard) == 1


def test_a_model_s_params_have_its_names_kinds_and_numbers() -> None:
    arrays: dict[str, np.ndarray] = {
        "w": FIRST[0],
        "half": np.array([0.5, 2.0], np.float16),
        "n": np.array(7),
        "on": FIRST[1] > 0,
    }
    params = params_of(ArrayRecord({name: Array(array) for name, array in arrays.items()}))
    assert set(params) == set(arrays)
    for name, array in arrays.items():
        found = params[name].numpy()
        assert (found.dtype, found.shape, found.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )


def test_an_array_that_is_no_numbers_is_refused_by_its_name() -> None:
    text = ArrayRecord({"words": Array(np.array(["a", "b"]))})
    with pytest.raises(MalformedUpdate, match="array 'words' of <U1"):
        params_of(text)


def test_contents_differ_if_and_only_if_their_digests_do() -> None:
    content = RecordDict({"a": ArrayRecord(FIRST), "m": MetricRecord({"x": 1, "y": [1.0]})})
    same = copied(content)
    assert digest(same) == digest(content)
    same.metric_records["m"]["x"] = 1.0
    assert digest(same) != digest(content)
    other = copied(content)
    other.array_records["a"] = ArrayRecord([FIRST[0] + 1, FIRST[1]])
    assert digest(other) != digest(content)
    assert digest(RecordDict({"b": content["a"], "m": content["m"]})) != digest(content)
    word, number = (RecordDict({"c": ConfigRecord({"x": x})}) for x in ("1", 1))
    assert digest(word) != digest(number)
