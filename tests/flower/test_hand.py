"""Where ClientApps run: fresh for each message, warm, and with a chance of its own."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from flwr.app import ConfigRecord, Message, RecordDict

from fedml.codebase import digest
from fedml.errors import TaskFailed
from fedml.flower import private
from fedml.flower.grid import RUN
from fedml.protocol import codec
from fedml.protocol.apps import FIRST_NODE, AppTerms
from fedml.protocol.messages import (
    Assignment,
    Blob,
    Privacy,
    RecipeId,
    RunId,
    TaskId,
    Training,
)
from fedml.site.foreman import Foreman
from fedml.site.policy import Policy

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROJECT = """
[tool.flwr.app]
[tool.flwr.app.components]
serverapp = "ward:server"
clientapp = "ward:client"
"""
WARD = """
import random, sys
import numpy, torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

was_warm = "imaplib" in sys.modules
import imaplib

client, seen = ClientApp(), []

@client.train()
def train(message, context):
    seen.append(1)
    before = context.state.config_records.get("count", {"n": 0})["n"]
    context.state["count"] = ConfigRecord({"n": before + 1})
    if context.run_config.get("fails"):
        raise SystemExit("no such ward")
    drawn = [random.random(), numpy.random.random(), float(torch.rand(()))]
    found = {"warm": was_warm, "seen": len(seen), "drawn": drawn, "count": before + 1,
             "node": context.node_id, "place": context.node_config["place"],
             "setting": context.run_config.get("setting", 0), "id": message.metadata.message_id}
    return Message(RecordDict({"found": ConfigRecord(found)}), reply_to=message)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def foreman() -> AsyncIterator[Foreman]:
    a_foreman = Foreman(Policy(task_seconds=60.0), "fedml.flower.hand")
    yield a_foreman
    await a_foreman.stop()


class Site:
    """A site's folder for one task after the other."""

    def __init__(self, folder: Path, foreman: Foreman) -> None:
        self.folder, self.foreman, self.tasks = folder, foreman, 0
        self.app, self.slots = folder / "app", folder / "slots"
        self.app.mkdir()
        (self.app / "ward.py").write_text(WARD)
        (self.app / "pyproject.toml").write_text(PROJECT)
        self.digest = digest(self.app)

    async def answer(self, *, seeded: bool = False, seed: int = 5, **config: float) -> Message:
        self.tasks += 1
        desk = self.folder / str(self.tasks)
        desk.mkdir()
        private.act_as(RUN, private.COORDINATOR)
        asked = Message(RecordDict({"c": ConfigRecord({"n": 1})}), FIRST_NODE + 3, "train")
        (desk / "model").write_bytes(private.question_bytes(asked))
        order = replace(
            ORDER, app=AppTerms(FIRST_NODE + 3, self.tasks, config).to_json(), seed=seed
        )
        order = replace(order, recipe=RecipeId("ward", self.digest))
        (desk / "assignment").write_bytes(codec.encode(order))
        job = {
            "folder": str(desk), "app": str(self.app), "model": str(desk / "model"),
            "slots": str(self.slots), "node_config": {"place": "bern"}, "threads": 1,
            "seeded": seeded,
        }  # fmt: skip
        await self.foreman.run(job, desk / "outcome.json")
        (desk / "memory.safetensors").replace(self.slots)
        return private.read_message((desk / "update.safetensors").read_bytes())


ORDER = Assignment(
    task=TaskId("ward-1.1.1.bern"),
    run=RunId("ward-1"),
    round=1,
    kind="train",
    recipe=RecipeId("ward", "ab" * 32),
    dataset="ward",
    model=Blob("00" * 32, 10),
    training=Training(lr=1.0, steps=1),
    privacy=Privacy(),
)


def found(message: Message) -> ConfigRecord:
    return message.content.config_records["found"]


async def test_a_message_finds_what_it_should_and_state_alone_lasts(
    foreman: Foreman, tmp_path: Path
) -> None:
    site = Site(tmp_path, foreman)
    first, second = [found(await site.answer(setting=2.5)) for _ in range(2)]
    assert (first["warm"], second["warm"]) == (False, True)  # what packages were imported is
    assert (first["seen"], second["seen"]) == (1, 1)  # the app's own modules are fresh
    assert (first["count"], second["count"]) == (1, 2)
    assert (first["node"], first["place"], first["setting"]) == (FIRST_NODE + 3, "bern", 2.5)
    assert first["id"] == f"{FIRST_NODE + 3}-1"


async def test_chance_is_the_sites_own_unless_its_operator_wants_the_seeds(
    foreman: Foreman, tmp_path: Path
) -> None:
    site = Site(tmp_path, foreman)
    own = [found(await site.answer())["drawn"] for _ in range(2)]
    assert all(a != b for a, b in zip(*own, strict=True))
    same = [found(await site.answer(seeded=True))["drawn"] for _ in range(2)]
    other = found(await site.answer(seeded=True, seed=6))["drawn"]
    assert same[0] == same[1] != other


async def test_an_app_that_raises_or_exits_answers_and_what_it_counted_lasts(
    foreman: Foreman, tmp_path: Path
) -> None:
    site = Site(tmp_path, foreman)
    reply = await site.answer(fails=1)
    assert reply.error.code == private.RAISED
    assert "no such ward" in str(reply.error.reason)
    assert found(await site.answer())["count"] == 2


async def test_files_of_another_digest_are_not_imported(foreman: Foreman, tmp_path: Path) -> None:
    site = Site(tmp_path, foreman)
    mark = tmp_path / "mark"
    (site.app / "ward.py").write_text(f"open({str(mark)!r}, 'w')\n{WARD}")
    with pytest.raises(TaskFailed, match="its files are not those of the digest"):
        await site.answer()
    assert not mark.exists()


async def test_an_app_that_does_not_import_fails_in_a_line_and_the_next_one_runs(
    foreman: Foreman, tmp_path: Path
) -> None:
    site = Site(tmp_path, foreman)
    (site.app / "ward.py").write_text("import nowhere_to_be_found")
    site.digest = digest(site.app)
    with pytest.raises(TaskFailed, match="no module 'nowhere_to_be_found'"):
        await site.answer()
    (site.app / "ward.py").write_text(WARD)
    site.digest = digest(site.app)
    assert found(await site.answer())["count"] == 1
