"""Simulators side by side: each a tree of processes that does one round when it is told to.

Rounds are taken in turn, so that whatever else the machine does hits all alike, and a racer that
waits takes no time: it is stopped, for some spin where they wait. A racer is a module of
`benchmarks.racers`, run as
`python -m benchmarks.racers.NAME ADDRESS WORKLOAD WORKERS PRECISION`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from benchmarks.workloads import DEALT, WORKLOADS
from fedml.errors import TaskFailed

_PATIENCE = 300.0  # seconds; more than any simulator's start or round takes
# glibc keeps what it frees, for all racers alike
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}


@cache
def _dealt(workload: str) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the workload's rows, which goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="fedml-race-data-")
    WORKLOADS[workload].deal(Path(folder.name))
    return folder


class Gate:
    """A racer's end: it says when a round is over, and hears when to do the next."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address)

    def wait(self) -> str:
        """Return what is asked for next: "round", "score" or "stop"."""
        try:
            return str(self._connection.recv())
        except EOFError:
            return "stop"

    def tell(self, value: float) -> None:
        """Answer: a round is over, or the score that was asked for."""
        self._connection.send(value)


class Racer:
    """A simulator at work in processes of its own, driven round by round."""

    def __init__(self, name: str, started: float, process: int, connection: Connection) -> None:
        self.name, self._process, self._connection = name, process, connection
        self.seconds: list[float] = []
        self.cpu: list[float] = []  # seconds of all its processes together
        self.peak = 0.0  # bytes: the most that its processes took together, after a round
        self.first = self._ask("round", started)
        self._signal(signal.SIGSTOP)

    def rounds(self, count: int) -> None:
        """Do some rounds, one after the other, and note how long each took."""
        self.go()
        for _ in range(count):
            before = processor_time(self._process)
            self.seconds.append(self._ask("round", time.perf_counter()))
            self.cpu.append(processor_time(self._process) - before)
        self.peak = max(self.peak, proportional_memory(self._process))
        self._signal(signal.SIGSTOP)

    def go(self) -> None:
        """Let it run on, who is stopped between rounds."""
        self._signal(signal.SIGCONT)

    def score(self) -> float:
        """Return the accuracy of its model now."""
        self.go()
        self._connection.send("score")
        return self._answer()

    def _signal(self, what: signal.Signals) -> None:
        for one in (self._process, *descendants(self._process)):
            os.kill(one, what)

    def _ask(self, what: str, since: float) -> float:
        self._connection.send(what)
        self._answer()
        return time.perf_counter() - since

    def _answer(self) -> float:
        try:
            if self._connection.poll(_PATIENCE):
                return float(self._connection.recv())
        except EOFError:
            raise TaskFailed(f"{self.name} ended; see what it printed above") from None
        raise TaskFailed(f"{self.name} did not answer within {_PATIENCE:.0f} s")


def start(
    stack: ExitStack, name: str, workload: str, workers: int, precision: str = "fp32"
) -> Racer:
    """Start a racer and let it do its first round; it ends with `stack`.

    Raises `TaskFailed` if it does not make it.
    """
    return stack.enter_context(_started(name, [workload, str(workers), precision], workers))


@contextmanager
def _started(name: str, arguments: Sequence[str], workers: int) -> Iterator[Racer]:
    with tempfile.TemporaryDirectory(prefix="fedml-race-") as folder:
        address = str(Path(folder, "gate"))
        with Listener(address) as listener, Path(folder, "log").open("w+") as log:
            command = [*_launcher(name, workers), f"benchmarks.racers.{name}", address, *arguments]
            surroundings = {**ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
            surroundings[DEALT] = _dealt(arguments[0]).name
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **surroundings},
                start_new_session=True,
            )
            try:
                connection = _accept(listener, process, Path(folder, "log"), name)
                yield (racer := Racer(name, began, process.pid, connection))
                racer.go()
                connection.close()
            except TaskFailed:
                sys.stderr.write("".join(Path(folder, "log").read_text()[-2000:]))
                raise
            finally:
                _end(process)


def _launcher(name: str, workers: int) -> list[str]:
    if name == "pfl_research" and workers > 1:
        torchrun = "torch.distributed.run"
        return [sys.executable, "-m", torchrun, "--standalone", f"--nproc-per-node={workers}", "-m"]
    return [sys.executable, "-m"]


def _accept(
    listener: Listener, process: subprocess.Popen[bytes], log: Path, name: str
) -> Connection:
    end = time.monotonic() + _PATIENCE
    waiting = listener._listener._socket  # type: ignore[attr-defined]
    waiting.settimeout(0.2)
    while time.monotonic() < end:
        try:
            return listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                raise TaskFailed(f"{name} ended with {process.returncode}") from None
    raise TaskFailed(f"{name} did not start within {_PATIENCE:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a racer with all its descendants, of which some may have left its process group."""
    family = descendants(process.pid)
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found, front = list[int](), [pid]
    while front:
        front = [child for parent in front for child in parents.get(parent, [])]
        found += front
    return found


def proportional_memory(pid: int) -> float:
    """Return the bytes that a process and its descendants take, shared pages counted once."""
    total = 0
    for one in (pid, *descendants(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024.0


def processor_time(pid: int) -> float:
    """Return the seconds that a process and its living descendants have computed for."""
    ticks = 0
    for one in (pid, *descendants(pid)):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
