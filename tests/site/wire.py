"""A site's daemon on a link whose far end is the test. No torch here, as in the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from fedml import durable
from fedml.errors import FedmlError, Unreachable
from fedml.learning.recipe import identify
from fedml.privacy import chain
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Blob,
    Command,
    Hello,
    Privacy,
    RunId,
    SiteEvent,
    TaskId,
    Training,
    Welcome,
)
from fedml.protocol.requests import Admission, Pong
from fedml.site.daemon import Daemon, Endpoint
from fedml.site.policy import AllowedRecipe, Dataset, Policy
from fedml.site.settings import Settings
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore
from fedml.transport.link import SILENCE

E = TypeVar("E")
RECIPE = identify("breast_cancer")
SETTINGS = Settings("bern", "localhost:1")
MODEL = b"the model's bytes"
UPDATE = b"the update's bytes"
QUICK = Backoff(0.001, 0.004)
ORDER = Assignment(
    task=TaskId("run-1.1.1.bern"),
    run=RunId("run-1"),
    round=1,
    kind="train",
    recipe=RECIPE,
    dataset="records",
    model=Blob(blake3(MODEL).hexdigest(), len(MODEL)),
    training=Training(lr=0.5, steps=2),
    privacy=Privacy("record", 1.0, 1e-5, rounds=1, evaluation_epsilon=0.5),
    cohort=3,
)
UPDATED = Blob(blake3(UPDATE).hexdigest(), len(UPDATE))


def policy(folder: Path, *, epsilon: float = 1.2) -> Policy:
    """A site that allows breast cancer on `records` under privacy, and on `open` without."""
    names = ("breast_cancer",)
    return Policy(
        minimum_cohort=3,
        recipes={"breast_cancer": AllowedRecipe(RECIPE.digest)},
        datasets={
            "records": Dataset(folder / "train.csv", 100, names, epsilon=epsilon),
            "open": Dataset(folder / "train.csv", 100, names, privacy="none"),
        },
    )


@dataclass
class Wire:
    """A `Link` played by the test: it says what comes, and sees all that leaves."""

    hellos: asyncio.Queue[Hello] = field(default_factory=asyncio.Queue)
    events: asyncio.Queue[SiteEvent] = field(default_factory=asyncio.Queue)
    heard: list[SiteEvent] = field(default_factory=list)  # the same, all of them
    commands: asyncio.Queue[Command | FedmlError] = field(default_factory=asyncio.Queue)
    failing: list[FedmlError] = field(default_factory=list)  # of the next calls of `connect`
    uploads: list[bytes] = field(default_factory=list)
    downloads: int = 0
    on_download: Callable[[], object] = lambda: None
    on_upload: Callable[[], object] = lambda: None
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # shut, no model comes
    connected: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    async def connect(self, hello: Hello) -> None:
        if self.failing:
            raise self.failing.pop(0)
        self.connected = True
        self.hellos.put_nowait(hello)

    async def receive(self, silence: float = SILENCE) -> Command:
        try:
            async with asyncio.timeout(silence):
                command = await self.commands.get()
        except TimeoutError as error:
            raise Unreachable(f"the coordinator was silent for {silence:g} s") from error
        if isinstance(command, FedmlError):
            raise command
        return command

    async def send(self, event: SiteEvent) -> None:
        if not self.connected:
            raise Unreachable("the stream is down")
        self.heard.append(event)
        self.events.put_nowait(event)

    async def download(self, blob: Blob, into: BlobStore) -> None:
        self.downloads += 1
        self.on_download()
        await self.gate.wait()
        assert into.put_bytes(MODEL) == blob

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        self.on_upload()
        self.uploads.append(source.path(blob.digest).read_bytes())

    async def fetch(self, name: str, limit: int) -> bytes:
        raise AssertionError("the daemon itself fetches no files")

    async def ping(self) -> Pong:
        raise Unreachable("nobody answers here")

    async def leave(self) -> None:
        raise Unreachable("nobody answers here")

    async def renew(self, csr: bytes) -> Admission:
        raise AssertionError("the daemon itself renews nothing")

    async def close(self) -> None:
        self.connected = False

    # --- what the test does -------------------------------------------------------------------

    def say(self, *commands: Command | FedmlError) -> None:
        for command in commands:
            self.commands.put_nowait(command)

    async def hello(self) -> Hello:
        async with asyncio.timeout(60):
            return await self.hellos.get()

    async def event(self, kind: type[E]) -> E:
        """Return the next event of a kind; others are passed over."""
        async with asyncio.timeout(60):
            while True:
                event = await self.events.get()
                if isinstance(event, kind):
                    return event


@asynccontextmanager
async def running(
    folder: Path,
    wire: Wire,
    a_policy: Policy | None = None,
    *,
    endpoint: Endpoint | None = None,
    backoff: Backoff = QUICK,
    heartbeat: float = 60.0,
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a daemon that has said hello and was welcomed; stop it at the end as a crash would."""
    daemon = Daemon(folder, SETTINGS, a_policy or policy(folder), wire, endpoint, backoff)
    task = asyncio.create_task(daemon.run())
    try:
        hello = asyncio.create_task(wire.hello())
        await asyncio.wait([hello, task], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            hello.cancel()
            task.result()
        wire.say(Welcome("test", heartbeat))
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def worked(folder: Path, order: Assignment = ORDER) -> None:
    """Leave on the disk what a worker leaves that is done; nothing is charged yet."""
    desk = folder / "tasks" / order.task
    durable.replace(desk / "assignment", codec.encode(order))
    durable.replace(desk / "update.safetensors", UPDATE)
    outcome = {"weight": 100.0, "metrics": {"loss": 0.5}}
    durable.replace(desk / "outcome.json", durable.dump_json(outcome))


def entries(folder: Path, dataset: str = "records") -> dict[str, str]:
    """Return each task's state, as the ledger's file has it now."""
    path = folder / "ledger" / f"{dataset}.jsonl"
    return {entry.task: entry.state for entry in chain.read(path)}


def records(folder: Path, dataset: str = "records") -> list[str]:
    """Return the kinds of all records in the ledger's file."""
    return [r["kind"] for r in durable.read_log(folder / "ledger" / f"{dataset}.jsonl")][1:]
