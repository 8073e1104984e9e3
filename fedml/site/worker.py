"""The worker: the only process of a site that imports recipes and touches rows.

`python -m fedml.site.worker DAEMON` reads one job a line, forks a child for it, and answers
with the child's process id and later its exit status. The child reads the brief, trains or
scores, and leaves files in the task's folder, `outcome.json` last. It never talks to the network.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedml import durable, failpoints
from fedml.errors import ConfigError, FedmlError
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Recipe, load
from fedml.learning.trainer import Trainer
from fedml.lifeline import die_with_parent
from fedml.params import decode, encode
from fedml.protocol import codec
from fedml.protocol.messages import Assignment, SiteId
from fedml.protocol.secagg import Masking
from fedml.protocol.tasks import Brief, Slots, Task
from fedml.rounds import vectors
from fedml.secagg.masking import Floats


def main() -> None:
    """Serve jobs until standard input ends. The argument is the process id of the daemon."""
    die_with_parent(int(sys.argv[1]))
    for told in (signal.SIGTERM, signal.SIGINT):  # of a whole service or terminal: to the daemon
        signal.signal(told, signal.SIG_IGN)
    worker = os.getpid()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a recipe that prints must not speak into the protocol
    if not select.select([0], [], [], 0)[0]:  # nobody waits for it: this takes a second
        _prepare_privacy()
    for line in sys.stdin:
        job = json.loads(line)
        if job["private"]:
            _prepare_privacy()
        child = os.fork()
        if child == 0:
            die_with_parent(worker)
            answers.close()
            os._exit(_do(job))
        print(json.dumps({"pid": child}), file=answers)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers)


def _prepare_privacy() -> None:
    """Import what private training takes, once, so that children find it imported."""
    import fedml.learning.private  # noqa: F401


def _do(job: Mapping[str, Any]) -> int:
    """Return 0 when the task's outcome is on disk, 1 with `error.json` when it is not."""
    folder = Path(job["folder"])
    try:
        torch.set_num_threads(int(job["threads"]))
        _work(job, folder)
    except FedmlError as error:
        _complain(folder, str(error))
        return 1
    except BaseException as error:  # noqa: BLE001 - the outermost loop of this process
        traceback.print_exc()
        _complain(folder, f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


def _complain(folder: Path, text: str) -> None:
    with suppress(FedmlError):  # no room, or no such task any more: the status must do
        durable.replace(folder / "error.json", durable.dump_json({"error": text}))


def _work(job: Mapping[str, Any], folder: Path) -> None:
    failpoints.reach("worker.begun")
    assignment = codec.decode(Assignment, (folder / "assignment").read_bytes())
    recipe = load(assignment.recipe, job["recipe_files"])
    tensors = decode(Path(job["model"]).read_bytes())
    brief = Brief(tensors.pop(""), assignment.rule, assignment.settings, tensors)
    task = Task(
        assignment.task,
        assignment.run,
        assignment.round,
        SiteId(str(job["site"])),
        assignment.kind,
        brief,
    )
    _check_device(str(job["device"]))
    slots = Path(job["slots"])
    memory = decode(slots.read_bytes()) if slots.exists() else {}
    if assignment.kind == "train":
        _train(job, assignment, task, recipe, memory)
    else:
        rows = recipe.read(Path(job["rows"]))
        report = evaluate(recipe, task, rows, assignment.privacy, str(job["device"]), memory)
        outcome: dict[str, object] = {"totals": dict(report.totals), "count": report.count}
        if assignment.masking:
            settings = Masking.from_json(assignment.masking).settings
            parts = _leave_vector(folder, vectors.scores_of(report, settings))
            outcome = {"parts": parts, "weight": settings.weight_cap}
        durable.replace(folder / "outcome.json", durable.dump_json(outcome))


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"policy device = {device!r}, but this machine has no usable GPU")


def _train(
    job: Mapping[str, Any], assignment: Assignment, task: Task, recipe: Recipe, memory: Slots
) -> None:
    folder = Path(job["folder"])
    trainer = Trainer(recipe, assignment.training, assignment.privacy, device=str(job["device"]))
    update, kept = trainer.train(
        task,
        recipe.read(Path(job["rows"])),
        memory,
        seed=assignment.seed,
        public_rows=int(job["public_rows"]),
    )
    outcome: dict[str, object] = {"weight": update.weight, "metrics": dict(update.metrics)}
    if assignment.masking:
        settings = Masking.from_json(assignment.masking).settings
        parts = _leave_vector(folder, vectors.numbers_of(update, task.brief, settings))
        outcome = {"parts": parts, "weight": update.weight}
    else:
        _write(folder / "update.safetensors", {"delta": update.delta, **update.slots})
    if kept:
        _write(folder / "memory.safetensors", kept)
    failpoints.reach("worker.trained")
    durable.replace(folder / "outcome.json", durable.dump_json(outcome))


def _leave_vector(folder: Path, values: Mapping[str, Floats]) -> list[tuple[str, str, int]]:
    """Write the numbers that go into a masked sum one after the other; return what they are."""
    durable.replace(folder / "vector", *(array.tobytes() for array in values.values()))
    return [(name, str(array.dtype), len(array)) for name, array in values.items()]


def _write(path: Path, parts: Mapping[str, Any]) -> None:
    durable.replace(path, b"".join(encode(parts)))


if __name__ == "__main__":
    main()
