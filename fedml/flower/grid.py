"""A ServerApp's `Grid` over sites that stay the same, who answer what is pushed before it returns.

Over sites in this process (`SimulatedGrid`) a message goes straight to the ClientApp; real ones
are in `remote`.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedml.errors import ConfigError
from fedml.flower import private
from fedml.flower.answer import Failure, answer, refusal
from fedml.flower.contents import copied, question
from fedml.flower.randomness import apart, draw
from fedml.flower.record import Kept, Record
from fedml.protocol.apps import FIRST_NODE, Value

RUN = 1
_ASKED = 5  # times in a row that a ServerApp may ask who is there


@dataclass(frozen=True)
class Exchange:
    """One batch of messages and what came of it."""

    kind: str
    asked: int
    replayed: int
    failures: tuple[Failure, ...]
    seconds: float


@dataclass
class Batch:
    """What is counted of one `push_messages`."""

    replayed: int = 0
    failures: list[Failure] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)


class SeatedGrid(Grid):
    """As many sites as there are, from node `FIRST_NODE` on, for the whole run.

    A ServerApp that waits for more sites than there are would wait forever: after `patience`
    seconds of asking who is there it gets a `ConfigError`.
    """

    def __init__(self, sites: int, tell: Callable[[Exchange], None], patience: float) -> None:
        self._nodes = range(FIRST_NODE, FIRST_NODE + sites)
        self._tell, self._patience = tell, patience
        self._replies = dict[str, Message]()
        self._mutex = threading.RLock()  # older apps push from several threads
        self._owner = threading.get_ident()
        self._asked, self._since = 0, 0.0
        self.set_run(private.empty_run(RUN))

    @abstractmethod
    def _answers(
        self, messages: Sequence[Message], batch: Batch, timeout: float | None
    ) -> Iterable[Message]:
        """Return the reply to each message, in their order; each has an id by then."""

    def set_run(self, run: private.Run) -> None:
        """Let the ServerApp's messages be of `run`."""
        self._run = run
        private.act_as(run.run_id, private.COORDINATOR)

    @property
    def run(self) -> private.Run:
        """The run that messages are of."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the sites, in the order of their partitions."""
        if threading.get_ident() == self._owner:
            self._note_asking()
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each message answered; return their ids."""
        return self._push(messages, None)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each of them once."""
        with self._mutex:
            found = (self._replies.pop(id_, None) for id_ in list(message_ids))
            return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies to `messages`; who is late for `timeout` has an error for one."""
        return self.pull_messages(self._push(messages, timeout))

    def _push(self, messages: Iterable[Message], timeout: float | None) -> list[str]:
        with self._mutex:
            begun, batch, asked = time.perf_counter(), Batch(), list(messages)
            self._asked = 0
            replies = list(self._answers(asked, batch, timeout))
            ids = [message.metadata.message_id for message in asked]
            self._replies |= zip(ids, replies, strict=True)
            if asked:
                kind, seconds = asked[0].metadata.message_type, time.perf_counter() - begun
                failures = tuple(batch.failures)
                self._tell(Exchange(kind, len(asked), batch.replayed, failures, seconds))
            return ids

    def _note_asking(self) -> None:
        """Raise `ConfigError` if nothing but asking who is there has been done for too long."""
        now = time.monotonic()
        self._since = self._since if self._asked else now
        self._asked += 1
        if self._asked > _ASKED and now - self._since >= self._patience:
            raise ConfigError(
                f"the ServerApp waits for more sites than the {len(self._nodes)} there are; "
                "give more with --num-supernodes, or lower its min_available_nodes"
            )


def absent(message: Message) -> Message:
    """Return the reply to a message to a node that is none."""
    node = message.metadata.dst_node_id
    private.give_id(message, f"{node}-nobody-{id(message)}")
    return refusal(message, private.ABSENT, f"there is no node {node}")


def check_question(kept: Kept, asked: bytes, site: int, ordinal: int) -> None:
    """Raise `ConfigError` if a kept answer is to another question."""
    if kept.question != asked:
        raise ConfigError(
            f"the ServerApp asks site {site}, at its message {ordinal + 1}, other than before it "
            "was interrupted: it depends on more than the seed and the replies; begin the run anew"
        )


@dataclass
class _Site:
    """A site: its context, and how many messages it had."""

    number: int
    context: Context
    messages: int = 0


class SimulatedGrid(SeatedGrid):
    """As many sites as asked for, always there, who work one after the other, and never late.

    What a site draws at random is a function of `seed`, the site and how many messages it had. A
    `record` answers what it holds; everything else is answered by `app` and kept in it.
    """

    def __init__(
        self,
        app: ClientApp,
        sites: int,
        *,
        config: Mapping[str, Value] | None = None,
        seed: int = 0,
        record: Record | None = None,
        tell: Callable[[Exchange], None] = lambda exchange: None,
        patience: float = 5.0,
    ) -> None:
        self._app, self._seed, self._record = app, seed, record
        self._sites = {FIRST_NODE + k: _site(k, sites, config or {}) for k in range(sites)}
        super().__init__(sites, tell, patience)

    def _answers(
        self, messages: Sequence[Message], batch: Batch, timeout: float | None
    ) -> Iterable[Message]:
        return [self._answer(message, batch) for message in messages]

    def _answer(self, message: Message, batch: Batch) -> Message:
        """Return a site's reply, from the record if it is there."""
        node = message.metadata.dst_node_id
        site = self._sites.get(node)
        if site is None:
            return absent(message)
        ordinal, site.messages = site.messages, site.messages + 1
        private.give_id(message, f"{node}-{ordinal}")
        if self._record is None:
            return self._work(message, site, ordinal, batch)
        asked = question(message, batch.digests)
        if (kept := self._record.find(node, ordinal)) is not None:
            check_question(kept, asked, site.number, ordinal)
            return _replay(kept, site, batch)
        reply = self._work(message, site, ordinal, batch)
        self._record.keep(
            node,
            ordinal,
            Kept(asked, private.message_bytes(reply), private.context_bytes(site.context)),
        )
        return reply

    def _work(self, message: Message, site: _Site, ordinal: int, batch: Batch) -> Message:
        """Let the ClientApp answer, with records of its own, as if it were far away."""
        task = private.received(message, copied(message.content))
        private.act_as(self._run.run_id, site.context.node_id)
        try:
            with apart(draw(self._seed, site.number, ordinal)):
                reply, failure = answer(self._app, task, site.context, site.number)
        finally:
            private.act_as(self._run.run_id, private.COORDINATOR)
        if failure is not None:
            batch.failures.append(failure)
        if reply.has_content():
            reply = private.received(reply, copied(reply.content))
        private.give_id(reply, f"{message.metadata.message_id}-reply")
        return reply


def _site(number: int, sites: int, config: Mapping[str, Value]) -> _Site:
    place: dict[str, Value] = {"partition-id": number, "num-partitions": sites}
    state = RecordDict()
    return _Site(number, Context(RUN, FIRST_NODE + number, place, state, dict(config)))


def _replay(kept: Kept, site: _Site, batch: Batch) -> Message:
    """Return the kept reply, with the site as it was after it."""
    batch.replayed += 1
    site.context = private.read_context(kept.context)
    reply = private.read_message(kept.reply)
    if reply.has_error():
        batch.failures.append(Failure(site.number, str(reply.error.reason)))
    return reply
