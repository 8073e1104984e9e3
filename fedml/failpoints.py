"""Named points at which a test lets a program die, run out of disk, stall or hang.

Nothing happens, and nothing is looked up, unless FEDML_FAILPOINT is set when the program starts:
`point:count:action`, several joined by commas, or `@/path/of/a/file` that holds such a text and is
read again at each point, so that a program under way can be armed. The action is done once, at
the `count`th time that the point is reached since it was armed:

    kill         SIGKILL to this very process
    enospc       OSError, as from a disk that is full, where a disk is written
    delay=2.5    this thread sleeps so many seconds
    hang         this thread sleeps for ever

A file is deleted before its last action: a program that is started again is not struck again,
and whoever armed it sees that it was struck. Points stand in what acts, never in what decides.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedml.errors import ConfigError

VARIABLE = "FEDML_FAILPOINT"
WRITES = (
    "durable.replace",
    "durable.append",
    "chunk.taken",
    "parcel.unpacked",
)  # where a disk may be full
POINTS: Mapping[str, str] = {  # what has just happened, or is about to
    "durable.replace": "a file's new contents are on the disk, under another name",
    "durable.append": "a record is about to be written to any log",
    "journal.append": "the coordinator is about to note something",
    "journal.appended": "it is noted, and nothing has come of it",
    "journal.state": "a round's state is a file that no record names",
    "task.assigned": "a site was sent a task",
    "update.read": "an update was read and not counted",
    "event.taken": "the run took an event in, for instance counted an update",
    "round.committed": "a round is on the disk, the run does not know it",
    "task.forgotten": "a site was told to forget a task",
    "version.pressed": "a bundle is made and not staged",
    "version.staged": "a version is staged and not noted",
    "version.noted": "a version is noted, its bundle not cleared away",
    "release.published": "a release is signed, its version not live",
    "release.promoted": "a version is live, and no site told",
    "registry.drafted": "a fresh registry's tables are made, under another name",
    "parcel.packed": "a model or an update is packed, and nobody told of it",
    "parcel.unpacked": "a window of a parcel is unpacked",
    "chunk.poured": "a chunk of a blob is about to be sent",
    "chunk.taken": "a chunk of a blob was written",
    "blob.kept": "a blob has come whole, and has its name",
    "ledger.append": "a site is about to reserve, charge or void",
    "ledger.appended": "that is on the disk, the ledger's head is one behind",
    "order.noted": "a site has an order on its disk, nothing reserved",
    "model.fetched": "the round's model is at the site",
    "worker.begun": "the worker's child begins a task",
    "worker.trained": "an update is on the disk, its outcome is not",
    "work.done": "the worker is done, nothing charged",
    "work.charged": "a task is charged, its result not kept",
    "result.kept": "a result is kept, nothing sent",
    "update.uploaded": "an update is at the coordinator, not announced",
    "update.announced": "a result was announced",
    "orders.noted": "a region has a round's orders on its disk, no leaf was asked",
    "sum.kept": "a region's sum is on its disk, nothing sent",
    "sum.uploaded": "a region's sum is at its parent, not announced",
    "task.voided": "a reservation was given back, its order not deleted",
    "task.forgetting": "a site is about to delete what it kept of a task",
    "shelf.drafted": "a bundle is copied onto the shelf, under another name",
    "shelf.checked": "a bundle passed its check and is not current",
    "shelf.switched": "a bundle is current, older ones lie there still",
}


def reach(point: str) -> None:
    """Pass `point`, unless the environment asks for something to happen there."""
    if _armed is not None:
        _armed.reach(point)


@dataclass(frozen=True)
class Strike:
    """What is to happen, and at which pass of which point."""

    point: str
    count: int
    action: str

    @staticmethod
    def parse(text: str) -> Strike:
        """Read `point:count:action`; raises `ConfigError` for what is none."""
        point, _, rest = text.strip().partition(":")
        count, _, action = rest.partition(":")
        word, _, seconds = action.partition("=")
        timed = seconds.replace(".", "", 1).isdigit() if word == "delay" else not seconds
        known = word in ("kill", "enospc", "delay", "hang") and timed
        known = known and (word != "enospc" or point in WRITES)
        if point not in POINTS or not count.isdigit() or count == "0" or not known:
            raise ConfigError(
                f"{VARIABLE} {text!r}: write point:count:action with one of {', '.join(POINTS)}, "
                "a count from 1 on, and kill, delay=SECONDS, hang or, "
                f"at {', '.join(WRITES)}, enospc"
            )
        return Strike(point, int(count), action)


class Armed:
    """The strikes of one program, and how often each point was passed since they were set."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._mutex, self._passed = threading.Lock(), Counter[str]()
        self._text, self._strikes = "", list[Strike]()
        if self._file is None:
            self._set(text)

    def reach(self, point: str) -> None:
        """Count a pass of `point`, and do what is due there."""
        with self._mutex:
            if self._file is not None:
                self._read(self._file)
            self._passed[point] += 1
            due = [s for s in self._strikes if (s.point, s.count) == (point, self._passed[point])]
            self._strikes = [s for s in self._strikes if s not in due]
            if due and not self._strikes and self._file is not None:
                self._file.unlink(missing_ok=True)
        for strike in due:
            _act(strike.action)

    @property
    def due(self) -> tuple[Strike, ...]:
        """What has not happened yet."""
        return tuple(self._strikes)

    def _read(self, file: Path) -> None:
        try:
            text = file.read_text()
        except FileNotFoundError:
            text = ""
        if text != self._text:
            self._set(text)

    def _set(self, text: str) -> None:
        self._strikes = [Strike.parse(part) for part in text.split(",") if part.strip()]
        self._text = text
        self._passed.clear()


def _act(action: str) -> None:
    word, _, seconds = action.partition("=")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif word == "delay":
        time.sleep(float(seconds))
    while word in ("kill", "hang"):  # the signal is on its way
        time.sleep(3600)


_armed = Armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
