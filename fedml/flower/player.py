"""Plays a ServerApp at a coordinator, which starts it and carries its messages.

`python -m fedml.flower.player FOLDER PARENT` reads what to play from standard input and says
what it asks on standard output, a JSON object a line; each line is answered with one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from flwr.serverapp import Grid

from fedml import durable
from fedml.errors import ConfigError, FedmlError, TaskFailed
from fedml.flower import app as apps
from fedml.flower import simulation
from fedml.flower.record import Record
from fedml.flower.remote import PART_READERS, Ask, Part, RemoteGrid
from fedml.lifeline import die_with_parent
from fedml.records import from_record


class _Unfit(FedmlError):
    """A run that is under way cannot go on here as it was begun, until that is mended."""


def main() -> None:
    """Play one app to its end, and say what it came to."""
    folder = Path(sys.argv[1])
    die_with_parent(int(sys.argv[2]))
    logging.getLogger("flwr").setLevel(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # an app that prints must not speak into the protocol

    def ask(told: Mapping[str, object]) -> Mapping[str, object]:
        print(json.dumps(told), file=answers)
        heard = sys.stdin.readline()
        if not heard:
            raise TaskFailed("the coordinator is gone")
        found: Mapping[str, object] = json.loads(heard)
        return found

    try:
        said = {"done": _play(folder, ask)}
    except _Unfit as error:
        said = {"stands": str(error)}
    except FedmlError as error:
        said = {"failed": str(error)}
    except Exception as error:  # noqa: BLE001 - the outermost loop of this program
        traceback.print_exc()
        said = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(said), file=answers)


def _play(folder: Path, ask: Ask) -> str:
    """Return where the outcome is; it is there already if the coordinator did not hear of it."""
    result = folder / "result.json"
    if result.exists():
        return str(result)
    part = from_record(Part, ask({"ready": True}), "part", PART_READERS)
    flower = version("flwr")
    setup = simulation.Setup(part.app, part.digest, part.config, part.sites, part.seed, flower)
    try:
        _check(folder, setup)
    except ConfigError as error:
        raise _Unfit(str(error)) if part.committed else error from error

    def seat(record: Record, tell: simulation.Tell) -> Grid:
        return RemoteGrid(part, ask=ask, record=record, folder=folder, tell=tell)

    simulation.play(setup, folder, seat=seat)
    durable.sync_folder(folder)
    return str(result)


def _check(folder: Path, setup: simulation.Setup) -> None:
    """Raise `ConfigError` unless the run can be played here, and goes on as it was begun."""
    if (folder / "run.json").exists() and simulation.begun(folder) != setup:
        raise ConfigError(f"{folder} has another run; restore it from a backup")
    app = apps.read(Path(setup.app))
    if app.digest() != setup.digest:
        raise ConfigError(f"{setup.app} is not what was taken in; delete it, and allow it again")
    app.load_server()


if __name__ == "__main__":
    main()
