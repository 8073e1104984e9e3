"""The child process that plays a Flower app's ServerApp: heard and answered line by line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedml.errors import ConfigError, TaskFailed
from fedml.records import from_record

_LINE = 2**24  # bytes of one line


@dataclass(frozen=True)
class Ready:
    """It wants to know what to play."""

    ready: bool


@dataclass(frozen=True)
class Order:
    """A message of a wave, to the site of that number; unless it is kept it is in a file."""

    site: int
    messages: int
    seed: int
    path: str
    digest: str
    is_kept: bool


@dataclass(frozen=True)
class Wave:
    """What the ServerApp asks at once."""

    wave: int
    about: str
    timeout: float
    orders: tuple[Order, ...]


@dataclass(frozen=True)
class Kept:
    """What it has on its disk of a wave: digests of replies, or reasons, by the site's number."""

    kept: int
    digests: Mapping[str, str]
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Done:
    """It has come to its end; the outcome is in that file."""

    done: str


@dataclass(frozen=True)
class Broken:
    """It has failed."""

    failed: str


@dataclass(frozen=True)
class Stands:
    """It cannot go on until something is mended here, and the coordinator started again."""

    stands: str


Said = Ready | Wave | Kept | Done | Broken | Stands


@dataclass(frozen=True)
class Stage:
    """A ServerApp that plays in `folder`; what it says is a JSON object a line."""

    folder: Path
    _process: asyncio.subprocess.Process

    async def hear(self) -> Said:
        """Return what it says next; raises `TaskFailed` if it ended without a word."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            status = await self._process.wait()
            raise TaskFailed(f"the ServerApp's program ended ({status}); see {self.log}")
        try:
            return _read(json.loads(line))
        except (ValueError, ConfigError) as error:
            raise TaskFailed(f"the ServerApp's program does not make sense ({error})") from error

    def answer(self, what: Mapping[str, object]) -> None:
        """Answer what it said last."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    @property
    def log(self) -> Path:
        """Where all that it prints goes."""
        return self.folder / "app.log"


def _read(told: object) -> Said:
    kinds: dict[str, type[Said]] = {
        "wave": Wave,
        "kept": Kept,
        "done": Done,
        "failed": Broken,
        "stands": Stands,
    }
    found = [kind for key, kind in kinds.items() if isinstance(told, dict) and key in told]
    return from_record(found[0] if found else Ready, told, "what it says")


@asynccontextmanager
async def played(folder: Path) -> AsyncIterator[Stage]:
    """Have the ServerApp play in `folder` meanwhile; it ends with us, whatever it does then."""
    with (folder / "app.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fedml.flower.player",
            str(folder.resolve()),
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=folder,
            limit=_LINE,
        )
    try:
        yield Stage(folder, process)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()
