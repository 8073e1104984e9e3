"""Starts, watches and stops the worker: the child process in which recipes run.

The daemon itself never imports a recipe. The worker process loads the libraries once and forks
for every task, so a task starts in milliseconds, a crash is one lost task, and all memory, a
GPU's too, goes back when the task ends. If the daemon dies, the kernel ends the worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import structlog

from fedml.errors import TaskFailed
from fedml.site.policy import Policy

_WATCH = 0.2  # seconds between looks at the memory of a running task
_UNTOLD = "the work failed; under privacy the reason, which may quote rows, stays in the site's log"
_log = structlog.get_logger()


class Foreman:
    """Runs one task at a time in a worker, within the policy's time and memory.

    The worker's `program` is ours, or that of Flower apps, which imports what they import.
    """

    def __init__(self, policy: Policy, program: str = "fedml.site.worker") -> None:
        self._policy, self._program = policy, program
        self._server: asyncio.subprocess.Process | None = None
        self._busy = asyncio.Lock()

    @property
    def process(self) -> int:
        """The worker's process id, 0 while there is none."""
        running = self._server is not None and self._server.returncode is None
        return self._server.pid if self._server is not None and running else 0

    async def start(self) -> None:
        """Start the worker process ahead of the first task."""
        threads = str(self._policy.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        self._server = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._program,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=2**20,
        )

    async def stop(self) -> None:
        """End the worker and whatever it is doing."""
        server, self._server = self._server, None
        if server is not None and server.returncode is None:
            server.kill()
            await server.wait()

    async def run(self, job: Mapping[str, Any], outcome: Path) -> Mapping[str, Any]:
        """Do `job` and return what the worker wrote to `outcome`.

        Raises `TaskFailed` with the reason if it failed, crashed, or went over a limit.
        Cancelling this call kills the task at once.
        """
        async with self._busy:
            outcome.with_name("error.json").unlink(missing_ok=True)  # of an earlier try
            status, breach = await self._fork(job)
        if breach:
            raise TaskFailed(breach)
        return _read_outcome(status, outcome)

    async def _fork(self, job: Mapping[str, Any]) -> tuple[int, str]:
        """Return the task's exit status, and which limit it broke, if any."""
        if not self.process:
            await self.start()
        assert self._server is not None
        born: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        talk = asyncio.create_task(_converse(self._server, job, born))
        try:
            breach = await self._watch(born, talk)
        except asyncio.CancelledError:
            breach = "cancelled"
        if not talk.done():
            await _in_any_case(_wind_down(talk, born))
        if breach == "cancelled":
            if talk.exception() is not None:  # the worker ended too, and shall not get the next
                await _in_any_case(self.stop())
            raise asyncio.CancelledError
        try:
            return talk.result(), breach
        except (ValueError, KeyError, ConnectionError) as error:
            await self.stop()
            raise TaskFailed(f"the worker process ended ({error}); it will be restarted") from error

    async def _watch(self, born: asyncio.Future[int], talk: asyncio.Task[int]) -> str:
        """Wait for the end, or until a limit is broken; return which."""
        loop = asyncio.get_running_loop()
        close = loop.time() + self._policy.task_seconds
        while True:
            await asyncio.wait([talk], timeout=_WATCH)
            if talk.done():
                return ""
            used = _resident(born.result()) / 2**20 if born.done() else 0.0
            if used > self._policy.task_memory_mb:
                return (
                    f"the task took {used:.0f} MB, policy task_memory_mb = "
                    f"{self._policy.task_memory_mb}; raise it or use smaller batches"
                )
            if loop.time() > close:
                return (
                    f"the task ran longer than policy task_seconds = "
                    f"{self._policy.task_seconds:.0f}; raise it or give it less to do"
                )


async def _wind_down(talk: asyncio.Task[int], born: asyncio.Future[int]) -> None:
    """Kill the task's process, and hear of its end: the pipe must not hold half an answer."""
    await asyncio.wait([born, talk], return_when=asyncio.FIRST_COMPLETED)
    if born.done():
        _kill(born.result())
    await asyncio.wait([talk])


async def _in_any_case(work: Coroutine[None, None, None]) -> None:
    """Do short work to its end, however often our caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):  # whoever cancels us twice has been heard once
            await asyncio.shield(task)


async def _converse(
    server: asyncio.subprocess.Process, job: Mapping[str, Any], born: asyncio.Future[int]
) -> int:
    """Hand over a job, tell the child's process id, return its exit status."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(job).encode() + b"\n")
    await server.stdin.drain()
    born.set_result(int(json.loads(await server.stdout.readline())["pid"]))
    return int(json.loads(await server.stdout.readline())["status"])


def _read_outcome(status: int, outcome: Path) -> Mapping[str, Any]:
    if status == 0 and outcome.exists():
        return dict(json.loads(outcome.read_bytes()))
    error = outcome.with_name("error.json")
    if error.exists():
        word = json.loads(error.read_bytes())
        if word["told"]:
            raise TaskFailed(str(word["error"]))
        _log.error("task failed, and the coordinator is not told why", reason=word["error"])
        raise TaskFailed(_UNTOLD)
    what = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    raise TaskFailed(f"the worker crashed ({what}); see the site's log")


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
