"""The processes of one measurement: started together, watched, and gone when it is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedml.errors import TaskFailed

T = TypeVar("T")


class Crew:
    """Starts Python modules as processes; leave the `with` block and all have ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._members: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members.values():
            member.terminate()
        for member in self._members.values():
            try:
                member.wait(5)
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()

    def start(self, name: str, module: str, *arguments: str | Path | int) -> int:
        """Start `python -m module arguments` under `name`; return its process id."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        with self.log(name).open("wb") as log:
            self._members[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self._members[name].pid

    def cpu(self, name: str) -> float:
        """Return the seconds of processor that a process has used, all its threads together."""
        stat = Path(f"/proc/{self._members[name].pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log(self, name: str) -> Path:
        """Return the file that holds what the process has printed."""
        return self._folder / f"{name}.log"

    def last_word(self, name: str) -> Any:  # noqa: ANN401 - JSON is what it is
        """Return the JSON value on the last line that a process printed."""
        return json.loads(self.log(name).read_text().splitlines()[-1])

    def await_line(self, name: str, read: Callable[[str], T | None], patience: float = 60.0) -> T:
        """Return what `read` makes of the first line it knows among those `name` prints."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            ended = self._members[name].poll() is not None
            for line in self.log(name).read_text().splitlines(keepends=True):
                if line.endswith("\n") and (found := read(line)) is not None:
                    return found
            if ended:
                raise TaskFailed(f"{name} ended: {self._last_words(name)}")
            time.sleep(0.05)
        raise TaskFailed(f"{name} said nothing of use within {patience:.0f} s")

    def check(self, names: Sequence[str]) -> None:
        """Raise `TaskFailed` if one of these processes has ended."""
        for name in names:
            if self._members[name].poll() is not None:
                raise TaskFailed(f"{name} ended: {self._last_words(name)}")

    def await_ends(self, names: Sequence[str], patience: float) -> None:
        """Return when these processes have ended well; raises `TaskFailed` if one did not."""
        end = time.monotonic() + patience
        for name in names:
            try:
                status = self._members[name].wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise TaskFailed(f"{name} still runs after {patience:.0f} s") from error
            if status != 0:
                raise TaskFailed(f"{name} ended with {status}: {self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        lines = self.log(name).read_text().strip().splitlines()
        return lines[-1] if lines else "without a word"
