"""A site's part in masked rounds: its identity, the roster it accepted, and a session a task.

A session lives in memory alone: a daemon that is started again has none, and the rounds that it
was in go on without it. What outlives it is for which sums shares were given.

secagg/identity   the Ed25519 key, raw      secagg/roster.json   as the operator accepted it
secagg/released   sums whose shares were given
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableSet
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml import durable
from fedml.errors import ConfigError, Corrupt, FedmlError, TaskFailed, Untrusted
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Failed,
    SecaggSaid,
    SecaggTold,
    SiteEvent,
    SiteId,
    TaskId,
)
from fedml.protocol.secagg import Adverts, Boxes, Consents, Masking, Survivors
from fedml.secagg import Demands, Roster, Site, Terms
from fedml.secagg.masking import Floats

_log = structlog.get_logger()
Tell = Callable[[SiteEvent], Awaitable[None]]
_DTYPES = {"float32": np.float32, "float64": np.float64}


def identity(folder: Path) -> Ed25519PrivateKey:
    """Return the site's identity key; it is made at the first call."""
    path = folder / "secagg" / "identity"
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        durable.replace(path, key.private_bytes_raw(), mode=0o600)
    try:
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except ValueError as error:
        raise Corrupt(f"{path} is damaged; restore it from a backup") from error


def accepted(folder: Path) -> Roster | None:
    """Return the roster that the operator accepted, if there is one."""
    path = folder / "secagg" / "roster.json"
    return Roster.parse(path.read_bytes(), str(path)) if path.exists() else None


def accept(folder: Path, site: SiteId, text: bytes, what: str) -> Roster:
    """Take a roster as the site's own from now on; raises `ConfigError` unless it is on it."""
    roster = Roster.parse(text, what)
    mine = identity(folder).public_key().public_bytes_raw()
    if roster.keys.get(site) != mine:
        raise ConfigError(f"{what}: {site} is not on it with this site's key {mine.hex()}")
    durable.replace(folder / "secagg" / "roster.json", text)
    return roster


@dataclass
class _Seat:
    order: Assignment
    session: Site
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # the others' shares are here
    said: dict[str, SecaggSaid | None] = field(default_factory=dict)  # by what was told
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # a repeated word waits for the first


class Masks:
    """All masked tasks of a site's daemon. `tell` sends an event if it can."""

    def __init__(self, folder: Path, site: str, demands: Demands, tell: Tell) -> None:
        self._site, self._demands, self._tell = SiteId(site), demands, tell
        self._roster = accepted(folder)
        self._identity = identity(folder) if self._roster else None
        self._released = _Released(folder / "secagg" / "released") if self._roster else None
        self._seats: dict[TaskId, _Seat] = {}

    @property
    def roster(self) -> str:
        """The accepted roster's digest in hex; "" if there is none."""
        return self._roster.digest.hex() if self._roster else ""

    def open(self, order: Assignment, *, known: bool) -> None:
        """Begin a task's session, or go on with it; raises what the policy has against it.

        `known` says that the task was noted before: without a session it was another daemon's.
        """
        if order.task in self._seats:
            return
        if self._roster is None or self._identity is None or self._released is None:
            raise Untrusted(
                "the round is masked, and this site has accepted no roster: "
                "run 'fedml site roster' with the consortium's"
            )
        if known:
            raise TaskFailed("the site was started again, and the keys of its masked round went")
        terms = Terms.of(order, Masking.from_json(order.masking), self._roster)
        session = Site(
            self._site,
            self._identity,
            self._roster,
            terms,
            demands=self._demands,
            released=self._released,
        )
        self._seats[order.task] = _Seat(order, session)

    async def advertise(self, order: Assignment) -> None:
        """Say this site's keys for the round; a second time, the same ones."""
        if (seat := self._seats.get(order.task)) is None:
            return
        if (said := seat.said.get("")) is None:
            advert = codec.encode(seat.session.advertise())
            seat.said[""] = said = SecaggSaid(order.task, "advert", advert)
        await self._tell(said)

    async def hear(self, told: SecaggTold) -> None:
        """Do what the coordinator's message asks; the same one again has the same answer."""
        seat = self._seats.get(told.task)
        if seat is None:
            reason = "this site has no session for that round: it was started again, or refused"
            return await self._tell(Failed(told.task, reason))
        try:
            async with seat.turn:
                if told.word not in seat.said:
                    seat.said[told.word] = await asyncio.to_thread(_answer, seat.session, told)
        except FedmlError as error:
            _log.error("masked round refused", task=told.task, reason=str(error))
            self.drop(told.task)
            return await self._tell(Failed(told.task, str(error)))
        if told.word == "boxes":
            seat.ready.set()
        if (said := seat.said[told.word]) is not None:
            await self._tell(said)

    async def mask(self, order: Assignment, folder: Path, parts: object, weight: float) -> Path:
        """Return the file of masked words, made of the numbers that the worker left.

        `parts` lists them: name, dtype and count, in the order of the file `vector`.
        """
        seat = self._seats.get(order.task)
        if seat is None:
            raise TaskFailed("the masked round's session was ended")
        await seat.ready.wait()
        if order.task not in self._seats:
            raise TaskFailed("the masked round's session was ended")
        return await asyncio.to_thread(_write, seat.session, folder, parts, weight)

    def drop(self, task: TaskId) -> None:
        """Forget a task's session: its round is over, or goes on without this site."""
        seat = self._seats.pop(task, None)
        if seat is not None:
            seat.session.forget()
            seat.ready.set()


class _Released(MutableSet[str]):
    """The sums for which shares were given, on the disk before they are."""

    def __init__(self, path: Path) -> None:
        self._log = durable.Log(path)
        self._sums = {str(record["sum"]) for record in self._log.records}

    def __contains__(self, sum: object) -> bool:
        return sum in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, sum: str) -> None:
        """Note it; raises what `Log.append` does, and then nothing is given."""
        self._log.append({"sum": sum})
        self._sums.add(sum)

    def discard(self, sum: str) -> None:
        """Never: what was given cannot be taken back."""
        raise AssertionError(f"{sum} was given")


def _answer(session: Site, told: SecaggTold) -> SecaggSaid | None:
    match told.word:
        case "adverts":
            shares = session.share(codec.decode(Adverts, told.data))
            return SecaggSaid(told.task, "shares", codec.encode(shares))
        case "boxes":
            session.receive(codec.decode(Boxes, told.data))
            return None
        case "survivors":
            consent = session.consent(codec.decode(Survivors, told.data))
            return SecaggSaid(told.task, "consent", codec.encode(consent))
        case "consents":
            unmasking = session.unmask(codec.decode(Consents, told.data))
            return SecaggSaid(told.task, "unmasking", codec.encode(unmasking))


def _write(session: Site, folder: Path, parts: object, weight: float) -> Path:
    """Write the masked words, slice by slice; what they were made of goes."""
    source, target = folder / "vector", folder / "masked"
    with target.open("wb") as file:
        for words in session.mask(_read(source, parts), weight):
            file.write(words.data)
    source.unlink()
    return target


def _read(path: Path, parts: object) -> Mapping[str, Floats]:
    try:
        raw, values, start = np.memmap(path, np.uint8, "r"), dict[str, Floats](), 0
        for name, dtype, count in parts:  # type: ignore[attr-defined]
            end = start + int(count) * np.dtype(_DTYPES[dtype]).itemsize
            values[str(name)] = raw[start:end].view(_DTYPES[dtype])
            start = end
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path} does not hold what the worker said ({error!r})") from error
    return values
