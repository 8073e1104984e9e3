"""The doctor looks at what a folder must never lose: logs and ledgers, whole to their last line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fedml import durable
from fedml.doctor.finding import Finding
from fedml.durable import Record
from fedml.privacy.chain import read, spent
from fedml.site.door import Book

_NEARLY = 0.9  # of a budget
_MOMENT = 0.1  # seconds; a record that is just being written looks torn


def log(path: Path) -> tuple[Finding, Sequence[Record]]:
    """Look at a log; return its whole records too. Raises `Corrupt` on damage within."""
    if not path.exists():
        return Finding("ok", path.name, "not there yet"), ()
    records, torn = durable.look(path)
    if torn:
        time.sleep(_MOMENT)
        records, torn = durable.look(path)
    if torn:
        found = f"{_count(records)}, then {torn} bytes of a torn one"
        advice = "a crash left it; the next start cuts it off"
        return Finding("warn", path.name, found, advice), records
    return Finding("ok", path.name, f"{_count(records)}, whole"), records


def _count(records: Sequence[Record]) -> str:
    return f"{len(records)} record{'' if len(records) == 1 else 's'}"


def title(book: Book) -> str:
    """Return what a ledger is called."""
    return f"ledger {book.name}" + ("" if book.unit == "record" else f", by {book.unit}")


def ledger(book: Book) -> Finding:
    """Look at a dataset's ledger: its chain, its end, and what is left of the budget."""
    path, what, limit = book.path, title(book), book.limits.epsilon
    if not path.exists():
        return Finding("ok", what, "not there yet: nothing was spent")
    torn, _ = log(path)
    total = spent(read(path), book.limits.delta)
    found = f"epsilon {total:.3f} of {limit:g} spent; {torn.found}"
    if torn.state == "ok" and total > _NEARLY * limit:
        advice = "tasks that would pass the limit are refused, as the policy says"
        return Finding("warn", what, found, advice)
    return Finding(torn.state, what, found, torn.advice)


def latest(records: Sequence[Record], key: str, now: float) -> list[Finding]:
    """Look at whether the clock stands before what was last noted."""
    last = max((float(record.get(key, 0.0)) for record in records), default=0.0)
    if last <= now + 1.0:
        return []
    found = f"the last record is {last - now:.0f} s ahead of this machine's clock"
    return [Finding("fail", "clock", found, "set this machine's clock (timedatectl set-ntp true)")]
