"""A ServerApp's `Grid` over sites in this process: a message goes straight to the ClientApp."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedml.errors import ConfigError
from fedml.flower import private
from fedml.flower.contents import copied, question
from fedml.flower.randomness import apart
from fedml.flower.record import Kept, Record

Value = bool | float | int | str  # of a setting
RUN = 1
_FIRST = 1000  # the first site's node id
_ASKED = 5  # times in a row that a ServerApp may ask who is there


@dataclass(frozen=True)
class Failure:
    """A site, by its partition, that answered with an error; where that came from, if known."""

    site: int
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Exchange:
    """One batch of messages and what came of it."""

    kind: str
    asked: int
    replayed: int
    failures: tuple[Failure, ...]
    seconds: float


@dataclass
class _Site:
    """A site: its context, and how many messages it had."""

    number: int
    context: Context
    messages: int = 0


@dataclass
class _Batch:
    """What is counted of one `push_messages`."""

    replayed: int = 0
    failures: list[Failure] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)


class SimulatedGrid(Grid):
    """As many sites as asked for, always there, who work one after the other.

    What a site draws at random is a function of `seed`, the site and how many messages it had. A
    `record` answers what it holds; everything else is answered by `app` and kept in it.

    A ServerApp that waits for more sites than there are would wait forever: after `patience`
    seconds of asking who is there it gets a `ConfigError`.
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
        self._tell, self._patience = tell, patience
        self._sites = {_FIRST + k: _site(k, sites, config or {}) for k in range(sites)}
        self._replies = dict[str, Message]()
        self._mutex = threading.RLock()  # older apps push from several threads
        self._owner = threading.get_ident()
        self._asked, self._since = 0, 0.0
        self.set_run(private.empty_run(RUN))

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
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each message answered, in their order; return their ids."""
        with self._mutex:
            begun, batch, asked = time.perf_counter(), _Batch(), list(messages)
            self._asked = 0
            for message in asked:
                reply = self._answer(message, batch)
                self._replies[message.metadata.message_id] = reply
            if asked:
                kind, seconds = asked[0].metadata.message_type, time.perf_counter() - begun
                failures = tuple(batch.failures)
                self._tell(Exchange(kind, len(asked), batch.replayed, failures, seconds))
            return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each of them once."""
        with self._mutex:
            found = (self._replies.pop(id_, None) for id_ in list(message_ids))
            return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies to `messages`; a simulated site is never late for `timeout`."""
        return self.pull_messages(self.push_messages(messages))

    def _note_asking(self) -> None:
        """Raise `ConfigError` if nothing but asking who is there has been done for too long."""
        now = time.monotonic()
        self._since = self._since if self._asked else now
        self._asked += 1
        if self._asked > _ASKED and now - self._since >= self._patience:
            raise ConfigError(
                f"the ServerApp waits for more sites than the {len(self._sites)} there are; "
                "give more with --num-supernodes, or lower its min_available_nodes"
            )

    def _answer(self, message: Message, batch: _Batch) -> Message:
        """Return a site's reply, from the record if it is there."""
        node = message.metadata.dst_node_id
        site = self._sites.get(node)
        if site is None:
            private.give_id(message, f"{node}-nobody-{id(message)}")
            return _refusal(message, private.ABSENT, f"there is no node {node}")
        ordinal, site.messages = site.messages, site.messages + 1
        private.give_id(message, f"{node}-{ordinal}")
        if self._record is None:
            return self._work(message, site, ordinal, batch)
        asked = question(message, batch.digests)
        if (kept := self._record.find(node, ordinal)) is not None:
            if kept.question != asked:
                raise ConfigError(
                    f"the ServerApp asks site {site.number}, at its message {ordinal + 1}, other "
                    "than before it was interrupted: it depends on more than the seed and the "
                    "replies; begin the run anew"
                )
            return _replay(kept, site, batch)
        reply = self._work(message, site, ordinal, batch)
        self._record.keep(
            node,
            ordinal,
            Kept(asked, private.message_bytes(reply), private.context_bytes(site.context)),
        )
        return reply

    def _work(self, message: Message, site: _Site, ordinal: int, batch: _Batch) -> Message:
        """Let the ClientApp answer, with records of its own, as if it were far away."""
        task = private.received(message, copied(message.content))
        private.act_as(self._run.run_id, site.context.node_id)
        try:
            with apart(self._seed, site.number, ordinal):
                reply = self._app(task, site.context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an app may raise anything
            batch.failures.append(Failure(site.number, _brief(error), traceback.format_exc()))
            # in the words of Flower's own runtime
            reply = _refusal(task, private.RAISED, f"{type(error)}:<'{error}'>")
        finally:
            private.act_as(self._run.run_id, private.COORDINATOR)
        if reply.has_error() and reply.error.code != private.RAISED:  # a mod's, say
            batch.failures.append(Failure(site.number, str(reply.error.reason)))
        if reply.has_content():
            reply = private.received(reply, copied(reply.content))
        private.give_id(reply, f"{message.metadata.message_id}-reply")
        return reply


def _site(number: int, sites: int, config: Mapping[str, Value]) -> _Site:
    place: dict[str, Value] = {"partition-id": number, "num-partitions": sites}
    state = RecordDict()
    return _Site(number, Context(RUN, _FIRST + number, place, state, dict(config)))


def _refusal(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)


def _replay(kept: Kept, site: _Site, batch: _Batch) -> Message:
    """Return the kept reply, with the site as it was after it."""
    batch.replayed += 1
    site.context = private.read_context(kept.context)
    reply = private.read_message(kept.reply)
    if reply.has_error():
        batch.failures.append(Failure(site.number, str(reply.error.reason)))
    return reply


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
