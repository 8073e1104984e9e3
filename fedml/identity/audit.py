"""The audit log: who did what, when, and how it ended, each entry chained to the one before.

Whoever rewrites an entry must rewrite all that follow, and then the head no longer equals what
was noted elsewhere: print it in reports, send it to a colleague.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from fedml import durable
from fedml.durable import Log, Record
from fedml.errors import Corrupt

START = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One action; `when` is in seconds since the epoch, `outcome` "ok" or why not."""

    who: str
    what: str
    when: float
    outcome: str


class AuditLog:
    """A durable, hash-chained list of entries; opening it verifies the chain."""

    def __init__(self, path: Path) -> None:
        self._log = Log(path)
        self.verify()

    @property
    def head(self) -> str:
        """The hash of the newest entry; `START` while there is none."""
        return str(self._log.records[-1]["hash"]) if self._log.records else START

    def note(self, who: str, what: str, when: float, outcome: str = "ok") -> None:
        """Add an entry; it is on the disk when this returns."""
        body = asdict(Entry(who, what, when, outcome))
        self._log.append({**body, "hash": _chain(self.head, body)})

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first."""
        return [Entry(r["who"], r["what"], r["when"], r["outcome"]) for r in self._log.records]

    def verify(self, head: str | None = None) -> None:
        """Raise `Corrupt` if an entry was changed, removed or added, naming the first one.

        An end that was cut off shows only against a `head` that was noted elsewhere.
        """
        link, seen = START, head in (None, START)
        for number, record in enumerate(self._log.records):
            body = {key: value for key, value in record.items() if key != "hash"}
            link = _chain(link, body)
            if record.get("hash") != link:
                raise Corrupt(f"{self._log.path}: entry {number} was changed; alarm")
            seen = seen or link == head
        if not seen:
            raise Corrupt(f"{self._log.path}: its end was cut off, {head} is gone; alarm")


def _chain(link: str, body: Record) -> str:
    return hashlib.sha256(link.encode() + durable.dump_json(body)).hexdigest()
