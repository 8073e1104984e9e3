"""A federation of real processes for tests: real TLS, real ports, real files; four hospitals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fedml.cli.demo.federation import Federation, free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit, allow
from fedml.privacy.chain import Entry, read
from fedml.protocol.messages import RunId
from fedml.protocol.operations import RunDetail

PLAN = (
    "task=breast_cancer", "privacy=record", "privacy.epsilon=0.5", "privacy.evaluation_epsilon=0.1",
    "training.lr=2.0", "cohort.quorum=2", "cohort.deadline=60",
)  # fmt: skip


def fedml(*arguments: str, profile: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments, profile=profile), capture_output=True, text=True, timeout=120
    )


def command(*arguments: str, profile: Path | None = None) -> list[str]:
    options = ["--profile", str(profile)] if profile else []
    return [sys.executable, "-m", "fedml", *arguments, *options]


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line a failed command says."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a program that logged before; nowhere is there a traceback."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    *logs, line = done.stderr.splitlines()
    assert all(log.startswith("{") for log in logs), done.stderr
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class Town(Federation):
    """Four hospitals that have joined and may train, and their coordinator, which is running."""

    def found(self) -> None:
        self.begin(grace=2.0)
        case = admit("breast_cancer", None, self.folder / "sites", SPLIT_SEED)
        self.names = [hospital.name for hospital in case.hospitals]
        self.commands([self.joining(name, self.token(name)) for name in self.names])
        self.commands([allow(case, h, self.site(h.name)) for h in case.hospitals])
        for name in self.names:
            self.open(name)
        self.wait_for("coordinator", lambda: self.here() == set(self.names))

    def begin(self, grace: float) -> None:
        """Make a coordinator, and start it."""
        port, enrolment = free_ports(2)
        self.command(
            "coordinator", "init", str(self.hub),
            "--port", str(port), "--enrolment-port", str(enrolment),
        )  # fmt: skip
        self.settle(heartbeat=0.5, grace=grace)
        self.start_coordinator()

    def settle(self, **changes: float) -> None:
        """Change settings of the coordinator, for its next start."""
        path = self.hub / "coordinator.toml"
        lines = [
            line for line in path.read_text().splitlines() if line.split(" ")[0] not in changes
        ]
        lines += [f"{key} = {value}" for key, value in changes.items()]
        path.write_text("\n".join(lines) + "\n")

    def token(self, name: str, ttl: float = 3600.0) -> str:
        return self.ask(lambda c: c.invite(name, "site", ttl)).token

    def joining(self, name: str, token: str) -> list[str]:
        ports = ("--rest-port", "0", "--grpc-port", "0")
        return ["site", "join", token, "--dir", str(self.site(name)), *ports]

    def open(self, name: str) -> None:
        self.start(name, "site", "run", str(self.site(name)))

    def here(self) -> set[str]:
        return {str(info.site) for info in self.ask(lambda c: c.list_sites()) if info.connected}

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def end(self, name: str) -> int:
        """Wait for a process to end by itself; return its status."""
        return self._processes[name].wait(60)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def submit(self, *overrides: str) -> RunId:
        from fedml.cli.compose import compose_plan

        plan = compose_plan("run", [*PLAN, *overrides]).to_json()
        return self.ask(lambda c: c.submit(plan)).id

    def until(self, run: RunId, test: Callable[[RunDetail], bool]) -> RunDetail:
        """Return the run once `test` holds for it."""

        def look() -> RunDetail | None:
            detail = self.ask(lambda c: c.show_run(run))
            return detail if test(detail) else None

        found = self.wait_for("coordinator", look)
        assert found is not None
        return found

    def finish(self, run: RunId) -> RunDetail:
        return self.until(run, lambda d: d.info.state in ("done", "failed", "stopped"))

    def ledger(self, name: str) -> Sequence[Entry]:
        return read(self.site(name) / "ledger" / "breast_cancer.jsonl")


class Started:
    """A command under way; what it says goes to files, so it never waits for a reader."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        folder.mkdir(parents=True)
        self.arguments = arguments
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for the command's own end."""
        status = self.process.wait(60)
        output, errors = self._out.read_text(), self._err.read_text()
        return subprocess.CompletedProcess(self.arguments, status, output, errors)

    def until_it_says(self, sign: str) -> None:
        """Wait until `sign` is among what it said, on either stream."""
        end = time.monotonic() + 60
        while sign not in (said := self._out.read_text() + self._err.read_text()):
            assert self.process.poll() is None, f"{self.arguments} ended after {said!r}"
            assert time.monotonic() < end, f"{self.arguments}: {said!r} and then nothing"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Start(Protocol):
    """How a test starts a `fedml` command that it does not wait for."""

    def __call__(self, *arguments: str, profile: Path | None = None) -> Started: ...
