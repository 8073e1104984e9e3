"""Flower's own runtime, a SuperLink and SuperNodes on the loopback, with an app of a few numbers.

The same app, from the same folder, runs under ours; it notes the time after each round.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedml.cli.demo.federation import free_ports
from fedml.errors import TaskFailed

SITES = 2
_PATIENCE = 120.0  # seconds
_PROJECT = """
[project]
name = "few-numbers"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "benchmarks"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "few_numbers.server_app:app"
clientapp = "few_numbers.client_app:app"
[tool.flwr.app.config]
rounds = 3
times = ""
"""
_SERVER = """
import time
import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config

    def note(round_: int, arrays: ArrayRecord) -> None:
        with open(settings["times"], "a") as file:
            file.write(f"{time.monotonic()}\\n")

    first = ArrayRecord([np.zeros(10, np.float32)])
    FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=first, num_rounds=settings["rounds"], evaluate_fn=note
    )
"""
_CLIENT = """
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    moved = [array + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    figures = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "m": figures}), reply_to=message)
"""


def write_app(folder: Path) -> Path:
    """Write the app, as `flwr new` lays one out, and return its folder."""
    app = folder / "few-numbers"
    package = app / "few_numbers"
    package.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PROJECT)
    (app / "LICENSE").write_text("Apache-2.0\n")
    for name, text in (("__init__", ""), ("server_app", _SERVER), ("client_app", _CLIENT)):
        (package / f"{name}.py").write_text(text)
    return app


def rounds_of(times: Path) -> list[float]:
    """Return the seconds of each round that the app noted; the first line is its start."""
    moments = [float(line) for line in times.read_text().split()] if times.exists() else []
    return [after - before for before, after in itertools.pairwise(moments)]


def play(app: Path, rounds: int) -> list[float]:
    """Return the seconds of each round under Flower's runtime, with two nodes.

    Raises `TaskFailed` if it does not come to an end in time.
    """
    times = app.parent / "their-times"
    with runtime(app.parent / "flower") as run:
        run(app, f'rounds={rounds} times="{times}"', lambda: len(rounds_of(times)) >= rounds)
    return rounds_of(times)


Run = Callable[[Path, str, Callable[[], bool]], None]


@contextlib.contextmanager
def runtime(home: Path) -> Iterator[Run]:
    """Have Flower's runtime run meanwhile, its files in `home`.

    Yield what runs an app with settings until a test holds, and raises `TaskFailed` if that
    takes too long.
    """
    home.mkdir()
    link, *ports = free_ports(1 + SITES)
    settings = f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (home / "config.toml").write_text(settings)
    place = ("--insecure", "--host", "127.0.0.1")

    def run(app: Path, config: str, is_over: Callable[[], bool]) -> None:
        _call(home, "flwr", "run", str(app), "here", "--run-config", config)
        deadline = time.monotonic() + _PATIENCE
        while not is_over():
            if time.monotonic() > deadline:
                log = (home / "flower-superlink.log").read_text()[-500:]
                raise TaskFailed(f"Flower's runtime is not through in time; {log}")
            time.sleep(0.2)

    with contextlib.ExitStack() as stack:
        install = "--disable-runtime-dependency-installation"
        stack.enter_context(
            _running(home, "flower-superlink", *place, "--port", str(link), install)
        )
        _await_port(link)
        for number, port in enumerate(ports):
            node = f"partition-id={number} num-partitions={SITES}"
            words = ("--superlink", f"127.0.0.1:{link}", "--port", str(port), "--node-config", node)
            stack.enter_context(_running(home, "flower-supernode", *place, *words))
        yield run


@contextlib.contextmanager
def _running(home: Path, program: str, *words: str) -> Iterator[None]:
    """Run a program of Flower's, in a group of its own, and end the group."""
    with (home / f"{program}.log").open("a") as log:
        process = subprocess.Popen(
            [_bin(program), *words],
            env=_environment(home),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _call(home: Path, program: str, *words: str) -> None:
    done = subprocess.run(
        [_bin(program), *words], env=_environment(home), capture_output=True, text=True
    )
    if done.returncode:
        raise TaskFailed(f"{program}: {(done.stderr or done.stdout)[-500:]}")


def _bin(program: str) -> str:
    return str(Path(sys.executable).parent / program)


def _environment(home: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **quiet, "FLWR_HOME": str(home), "PATH": path}


def _await_port(port: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise TaskFailed("Flower's SuperLink does not listen")
