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

from fedml.errors import TaskFailed

_LINE = 2**24  # bytes of one line
Said = Mapping[str, object]


@dataclass(frozen=True)
class Stage:
    """A ServerApp that plays in `folder`; what it says is a JSON object a line."""

    folder: Path
    _process: asyncio.subprocess.Process

    async def hear(self) -> Said:
        """Return what it says next; raises `TaskFailed` if it ended without a word."""
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            told = json.loads(line) if line else None
        except ValueError as error:
            raise TaskFailed(f"the ServerApp's program does not make sense ({error})") from error
        if not isinstance(told, dict):
            status = await self._process.wait()
            raise TaskFailed(f"the ServerApp's program ended ({status}); see {self.log}")
        return told

    def answer(self, what: Said) -> None:
        """Answer what it said last."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    @property
    def log(self) -> Path:
        """Where all that it prints goes."""
        return self.folder / "app.log"


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
