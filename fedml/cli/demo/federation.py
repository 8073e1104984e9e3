"""A federation of real processes on this machine: one coordinator, and a daemon for each site."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fedml.errors import ConfigError, FedmlError, TaskFailed, Unreachable
from fedml.identity.certificates import Credentials
from fedml.protocol.operations import SiteInfo
from fedml.transport.link import Operations
from fedml.transport.rpc import OperationsClient

T = TypeVar("T")
_PORTS = range(20_000, 32_000)
_PATIENCE = 60.0  # seconds for anything here to come about


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports nobody listens on now, all different.

    They are below those that systems give to connections that go out, or one of these might have
    a port before the program does that it is for.
    """
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ConfigError(f"{count} free ports are not to be had between {_PORTS[0]} and {_PORTS[-1]}")


class Federation:
    """Starts, watches and ends the processes; leave the `with` block and all are gone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hub = folder, folder / "coordinator"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._runner = asyncio.Runner()  # one loop: gRPC complains when its loop is closed

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.terminate()  # told twice, it does not wait for what is under way
                _wait_or_kill(process)
        self._runner.close()

    def site(self, name: str) -> Path:
        """Return a site's folder."""
        return self.folder / "sites" / name

    def command(self, *arguments: str) -> str:
        """Run a `fedml` command to its end; raises `TaskFailed` with what it complained of."""
        return self.commands([arguments])[0]

    def commands(self, lines: Sequence[Sequence[str]]) -> list[str]:
        """Run several `fedml` commands side by side; return what each printed."""
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "fedml", *line],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for line in lines
        ]
        outputs = []
        for line, process in zip(lines, running, strict=True):
            output, errors = process.communicate()
            if process.returncode != 0:
                complaint = errors.strip().splitlines() or [f"status {process.returncode}"]
                raise TaskFailed(f"fedml {' '.join(line[:2])}: {complaint[-1]}")
            outputs.append(output.strip())
        return outputs

    def start(self, name: str, *arguments: str) -> None:
        """Start a long-lived `fedml` command under `name`; its log goes to logs/."""
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedml", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start_coordinator(self) -> None:
        """Start the coordinator, and return when it answers."""
        self.start("coordinator", "coordinator", "run", str(self.hub))
        self.wait_for("coordinator", lambda: self.ask(lambda c: c.list_runs()))

    def kill(self, name: str) -> int:
        """End a process as a power cut would, with SIGKILL; return its process id."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        return process.pid

    def is_running(self, name: str) -> bool:
        """True while the process started under `name` has not ended."""
        return name in self._processes and self._processes[name].poll() is None

    def ask(self, work: Callable[[Operations], Awaitable[T]]) -> T:
        """Do `work` as the coordinator's operator."""

        async def go() -> T:
            client = OperationsClient(Credentials.load(self.hub / "operator"))
            try:
                await client.reach(1.0)
                return await work(client)
            finally:
                await client.close()

        return self._runner.run(go())

    def wait_for(self, name: str, test: Callable[[], T]) -> T:
        """Return what `test` returns once it is true; raises `TaskFailed` if `name` ends first."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                if (found := test()) is not None and found is not False:
                    return found
            except Unreachable:
                pass
            if not self.is_running(name):
                raise TaskFailed(f"{name} ended: {self._last_line(name)}")
            if time.monotonic() > end:
                raise TaskFailed(f"{name}: nothing within {_PATIENCE:.0f} s; see its log")
            time.sleep(0.1)

    def wait_until_serving(self, names: Sequence[str], digest: str) -> None:
        """Return when every site says that it serves the release with this digest."""

        def all_live() -> bool:
            infos = {info.site: info for info in self.ask(lambda c: c.list_sites())}
            for name in names:
                self._check_refusal(infos.get(name))  # type: ignore[call-overload]
            return all(
                any(s.digest == digest and s.state == "live" for s in infos[name].serving)  # type: ignore[index]
                for name in names
                if name in infos
            ) and set(names) <= set(infos)

        self.wait_for("coordinator", lambda: all_live() or None)

    @staticmethod
    def _check_refusal(info: SiteInfo | None) -> None:
        for serving in info.serving if info else ():
            if serving.state == "refused":
                raise FedmlError(f"{info.site if info else ''} refused: {serving.detail}")

    def _last_line(self, name: str) -> str:
        lines = (self.folder / "logs" / f"{name}.log").read_text().strip().splitlines()
        return lines[-1] if lines else "without a word"
