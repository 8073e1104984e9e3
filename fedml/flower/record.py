"""The replies of an unfinished run, on the disk: what a killed run is gone on from.

Flower's strategies keep their state to themselves, so it is not state that is kept but what they
were told. A run that goes on plays its ServerApp from the start; what it asks again is answered
from here, and no site works twice. A site's reply stands with the site's context after it.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from fedml import durable
from fedml.errors import ConfigError, Corrupt

_HEAD = struct.Struct("<qQ32sQQ")  # site, which of its messages, question, two lengths
_SEAL = 32
_COST = 20  # keeping may take this fraction of the time between


@dataclass(frozen=True)
class Kept:
    """One answer: what was asked, the reply, and the site's context after it, as bytes.

    A real site keeps its context to itself. Where none replied, the reply is empty and the reason
    stands in the place of the context.
    """

    question: bytes
    reply: bytes
    context: bytes


class Record:
    """The answers in one file, by site and by how many messages the site had before.

    Opening reads them; a torn end, which a crash leaves, is cut off. New ones reach the disk
    every `least` seconds, seen what it costs: so much work a crash may take. Raises `Corrupt` if
    the file is damaged elsewhere.
    """

    def __init__(self, path: Path, least: float = 1.0) -> None:
        self.path, self._least = path, least
        durable.make_folder(path.parent)
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; mend the rights") from error
        self._places = dict[tuple[int, int], int]()
        end = 0
        try:
            for place, site, ordinal, after in self._frames():
                self._places[site, ordinal], end = place, after
        except Corrupt:
            self._file.close()
            raise
        self._file.truncate(end)
        self._waiting = list[bytes]()
        self._due = time.monotonic() + least

    def find(self, site: int, ordinal: int) -> Kept | None:
        """Return the answer to a site's message number `ordinal`, if it was kept."""
        place = self._places.get((site, ordinal))
        if place is None:
            return None
        self._file.seek(place)
        _, _, question, reply, context = _HEAD.unpack(self._file.read(_HEAD.size))
        return Kept(question, self._file.read(reply), self._file.read(context))

    def keep(self, site: int, ordinal: int, kept: Kept) -> None:
        """Keep an answer; it is on the disk when it is due, or after `flush`."""
        head = _HEAD.pack(site, ordinal, kept.question, len(kept.reply), len(kept.context))
        frame = b"".join((head, kept.reply, kept.context))
        self._waiting.append(frame + blake3(frame).digest())
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Put on the disk what is not there yet."""
        begun = time.monotonic()
        frames, self._waiting = self._waiting, []
        try:
            self._file.writelines(frames)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise durable.failure(f"cannot write {self.path}", error) from error
        now = time.monotonic()
        self._due = now + max(self._least, _COST * (now - begun) if self._least else 0.0)

    def close(self) -> None:
        """Put the rest on the disk, and let go of the file."""
        with self._file:
            self.flush()

    def discard(self) -> None:
        """Remove the record: the run is over."""
        self._waiting = []
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _frames(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield where each whole frame begins, whose it is and where it ends, until a torn one."""
        self._file.seek(0, os.SEEK_END)
        total, place = self._file.tell(), 0
        while place + _HEAD.size <= total:
            self._file.seek(place)
            head = self._file.read(_HEAD.size)
            site, ordinal, _, reply, context = _HEAD.unpack(head)
            after = place + _HEAD.size + reply + context + _SEAL
            seal = blake3(head + self._file.read(reply + context)).digest()
            if seal != self._file.read(_SEAL):
                if after < total:
                    raise Corrupt(f"{self.path}: damaged at byte {place}; begin the run anew")
                return
            yield place, site, ordinal, after
            place = after
