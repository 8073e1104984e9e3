"""A ServerApp's `Grid` over real sites: the coordinator carries messages, we keep what came.

A wave is what is asked at once, a message a site at most. The coordinator notes each wave before
it goes out; what the sites replied is on our disk before it notes that the wave is over, and only
then do they forget. So a run that goes on asks again for the wave that was open, no other, and
the sites answer with what they kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from flwr.app import Message

from fedml.errors import Corrupt, MalformedMessage
from fedml.flower import private
from fedml.flower.answer import Failure, refusal
from fedml.flower.contents import question
from fedml.flower.grid import Batch, Exchange, SeatedGrid, absent, check_question
from fedml.flower.randomness import draw
from fedml.flower.record import Kept, Record
from fedml.protocol.apps import FIRST_NODE, Values, read_values
from fedml.records import Reader, from_record

Ask = Callable[[Mapping[str, object]], Mapping[str, object]]


@dataclass(frozen=True)
class Came:
    """What came of one message: a file with the reply, or the reason why there is none."""

    path: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """What the coordinator says of a run; waves up to `committed` are over for it."""

    app: str  # its folder
    digest: str
    config: Values
    sites: int
    seed: int
    committed: int


PART_READERS: Mapping[object, Reader] = {Values: read_values}


@dataclass
class _Asked:
    """One message of a wave."""

    message: Message
    site: int
    ordinal: int
    question: bytes
    kept: Kept | None


class RemoteGrid(SeatedGrid):
    """The sites that a coordinator has given a run.

    `ask` tells the coordinator something and returns what it says to it. What travels is in
    `folder`.
    """

    def __init__(
        self,
        part: Part,
        *,
        ask: Ask,
        record: Record,
        folder: Path,
        tell: Callable[[Exchange], None],
        patience: float = 5.0,
    ) -> None:
        self._ask, self._record, self._folder = ask, record, folder
        self._seed, self._committed, self._wave = part.seed, part.committed, 0
        self._messages = [0] * part.sites  # that each site had
        super().__init__(part.sites, tell, patience)

    def _answers(
        self, messages: Sequence[Message], batch: Batch, timeout: float | None
    ) -> Iterable[Message]:
        replies = dict[int, Message]()
        waves = list[list[int]]()
        for place, message in enumerate(messages):
            node = message.metadata.dst_node_id
            if node not in self._nodes:
                replies[place] = absent(message)
                continue
            nodes = ({messages[k].metadata.dst_node_id for k in wave} for wave in waves)
            free = next((k for k, seen in enumerate(nodes) if node not in seen), len(waves))
            waves[free:free] = [[]] if free == len(waves) else []
            waves[free].append(place)
        for wave in waves:
            found = self._exchange([messages[k] for k in wave], batch, timeout)
            replies |= zip(wave, found, strict=True)
        return [replies[place] for place in range(len(messages))]

    def _exchange(
        self, messages: Sequence[Message], batch: Batch, timeout: float | None
    ) -> list[Message]:
        """Return the replies to one wave, which are on the disk by then."""
        self._wave += 1
        wave = [self._asked_of(message, batch) for message in messages]
        if self._wave > self._committed:
            self._have_answered(wave, timeout)
        elif any(each.kept is None for each in wave):
            raise Corrupt(
                f"{self._record.path} lacks replies that the coordinator knows to be there; "
                "restore it from a backup, or submit the app anew"
            )
        return [self._reply(each, batch) for each in wave]

    def _asked_of(self, message: Message, batch: Batch) -> _Asked:
        node = message.metadata.dst_node_id
        site = node - FIRST_NODE
        ordinal, self._messages[site] = self._messages[site], self._messages[site] + 1
        private.give_id(message, f"{node}-{ordinal}")
        asked, kept = question(message, batch.digests), self._record.find(node, ordinal)
        if kept is not None:
            check_question(kept, asked, site, ordinal)
            batch.replayed += 1
        return _Asked(message, site, ordinal, asked, kept)

    def _have_answered(self, wave: list[_Asked], timeout: float | None) -> None:
        """Have the coordinator ask for what is not kept, keep it, and have the wave noted."""
        about = wave[0].message.metadata
        outbox = self._folder / "outbox"
        shutil.rmtree(outbox, ignore_errors=True)
        outbox.mkdir(parents=True)
        written = dict[tuple[int, str, str, float], tuple[str, str]]()
        told = [self._order(each, outbox, written) for each in wave]
        answer = self._ask(
            {
                "wave": self._wave,
                "about": " ".join(f"{about.message_type} {about.group_id}".split()),
                "timeout": about.ttl if timeout is None else timeout,
                "orders": told,
            }
        )
        came = from_record(dict[str, Came], answer.get("came"), "what came")
        for each in wave:
            if each.kept is None:
                each.kept = _taken(each, came.get(str(each.site), Came(reason="no reply came")))
                self._record.keep(FIRST_NODE + each.site, each.ordinal, each.kept)
        self._record.flush()
        digests = {str(each.site): _digest(each.kept) for each in wave}
        reasons = {
            str(each.site): each.kept.context.decode()
            for each in wave
            if each.kept is not None and not each.kept.reply
        }
        self._ask({"kept": self._wave, "digests": digests, "reasons": reasons})
        shutil.rmtree(outbox, ignore_errors=True)

    def _order(
        self,
        each: _Asked,
        outbox: Path,
        written: dict[tuple[int, str, str, float], tuple[str, str]],
    ) -> Mapping[str, object]:
        """Return what the coordinator is told of a message, which lies in a file if it must go.

        The messages of a round mostly share their content, and so a file.
        """
        about = each.message.metadata
        key = (id(each.message.content), about.message_type, about.group_id, about.ttl)
        if key not in written:
            data = private.question_bytes(each.message)
            path = outbox / str(len(written))
            path.write_bytes(data)
            written[key] = str(path), blake3(data).hexdigest()
        place, digest = written[key]
        return {
            "site": each.site,
            "messages": each.ordinal,
            "seed": draw(self._seed, each.site, each.ordinal),
            "path": place,
            "digest": digest,
            "is_kept": each.kept is not None,
        }

    def _reply(self, each: _Asked, batch: Batch) -> Message:
        assert each.kept is not None
        if not each.kept.reply:
            reason = each.kept.context.decode()
            batch.failures.append(Failure(each.site, reason))
            reply = refusal(each.message, private.ABSENT, reason)
        else:
            reply = private.read_reply(each.kept.reply, each.message)
            if reply.has_error():
                batch.failures.append(Failure(each.site, str(reply.error.reason)))
        private.give_id(reply, f"{each.message.metadata.message_id}-reply")
        return reply


def _taken(each: _Asked, came: Came) -> Kept:
    """Return a reply as it is kept; one that does not read is none."""
    data, reason = b"", came.reason
    if came.path:
        data = Path(came.path).read_bytes()
        try:
            private.read_reply(data, each.message)
        except MalformedMessage as error:
            data, reason = b"", f"reply refused: {error}"
    return Kept(each.question, data, b"" if data else (reason or "no reply came").encode())


def _digest(kept: Kept | None) -> str:
    return blake3(kept.reply).hexdigest() if kept is not None and kept.reply else ""
