"""The worker: the only process of a site that imports recipes and touches rows.

`python -m fedml.site.worker DAEMON` forks a child for each job (`fedml.forks`). The child reads
the brief, trains or scores, and leaves files in the task's folder, `outcome.json` last. It never
talks to the network.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedml import durable, failpoints, forks
from fedml.errors import ConfigError, FedmlError, Refused
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Recipe, Rows, load
from fedml.learning.trainer import Trainer
from fedml.params import decode, encode
from fedml.protocol import codec
from fedml.protocol.messages import Assignment, SiteId
from fedml.protocol.parcels import form_of, is_coarse, pack, rounded, unpack
from fedml.protocol.secagg import Masking
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.rounds import vectors
from fedml.secagg.masking import Floats


def main() -> None:
    """Serve jobs until standard input ends. The argument is the process id of the daemon."""
    forks.serve(int(sys.argv[1]), _do, _wanted)


def _wanted(job: Mapping[str, Any]) -> Iterable[str]:
    """Return what this model, as few do, has imported: the next child finds it there."""
    return ["opacus.grad_sample"] if "opacus" in sys.modules else []


class _Unreadable(FedmlError):
    """A recipe could not read its file, and may quote it."""


def _do(job: Mapping[str, Any]) -> int:
    """Return 0 when the task's outcome is on disk, 1 with `error.json` when it is not."""
    folder = Path(job["folder"])
    try:
        torch.set_num_threads(int(job["threads"]))
        if "parcel" in job:
            _unpack(job, folder)
        else:
            _work(job, folder)
    except FedmlError as error:
        ours = isinstance(error, ConfigError | Refused)
        _complain(folder, str(error), told=ours or not job["private"])
        return 1
    except BaseException as error:  # noqa: BLE001 - the outermost loop of this process
        traceback.print_exc()
        _complain(folder, _one_line(error), told=not job["private"])
        return 1
    return 0


def _complain(folder: Path, text: str, *, told: bool) -> None:
    """Leave word of an error; under privacy only what is sure to quote no row may be `told`."""
    word = {"error": text, "told": told}
    with suppress(FedmlError):  # no room, or no such task any more: the status must do
        durable.replace(folder / "error.json", durable.dump_json(word))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _rows(recipe: Recipe, job: Mapping[str, Any], part: str = "rows") -> Rows:
    """Read a file of the job's; raises `ConfigError`, which is told, if there is none."""
    path = Path(job[part])
    if not path.exists():
        raise ConfigError(f"{path}: No such file or directory; mend it, or the policy's path")
    try:
        return recipe.read(path)
    except FedmlError as error:
        raise _Unreadable(str(error)) from error
    except Exception as error:
        raise _Unreadable(_one_line(error)) from error


def _unpack(job: Mapping[str, Any], folder: Path) -> None:
    """Leave the order's model, to the bit, where the job wants it, or nothing there."""
    assignment = codec.decode(Assignment, (folder / "assignment").read_bytes())
    model, base = Path(job["model"]), Path(job["base"]) if job["base"] else None
    draft = model.with_name(f".{model.name}.draft")
    try:
        unpack(Path(job["parcel"]), str(job["form"]), assignment.model, draft, base, _written)
        draft.replace(model)
    except OSError as error:
        raise Refused(_one_line(error)) from error
    durable.replace(folder / "unpacked.json", durable.dump_json({}))


def _written() -> None:
    failpoints.reach("parcel.unpacked")


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
    if assignment.privacy.mode == "patient" and job["held_out"]:
        from fedml.learning.persons import check_apart

        check_apart(*(_rows(recipe, job, part) for part in ("train", "held_out")))
    if assignment.kind == "train":
        _train(job, assignment, task, recipe, memory)
    else:
        rows = _rows(recipe, job)
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
    rows, public = _rows(recipe, job), int(job["public_rows"])
    about = {"seed": assignment.seed, "public_rows": public}
    if assignment.privacy.shares_noise:  # masked: the gate has looked
        whole, kept = trainer.share(task, rows, memory, **about)
        parts = _leave_vector(folder, vectors.shares_of(whole, task.brief))
        outcome: dict[str, object] = {"parts": parts}  # what it counts is public: the door's
    elif assignment.masking:
        update, kept = trainer.train(task, rows, memory, **about)
        settings = Masking.from_json(assignment.masking).settings
        parts = _leave_vector(folder, vectors.numbers_of(update, task.brief, settings))
        outcome = {"parts": parts, "weight": update.weight}
    else:
        update, kept = trainer.train(task, rows, memory, **about)
        form = _leave_update(folder, update, assignment.up)
        metrics = dict(update.metrics)
        outcome = {"weight": update.weight, "metrics": metrics, "form": form}
    if kept:
        _write(folder / "memory.safetensors", kept)
    failpoints.reach("worker.trained")
    durable.replace(folder / "outcome.json", durable.dump_json(outcome))


def _leave_update(folder: Path, update: Update, up: str) -> str:
    """Write the update, rounded if `up` says so; return the form of its parcel, "" if it has none.

    What is rounded has had its noise. A parcel that saves nothing is none.
    """
    delta = rounded(update.delta) if is_coarse(up) else update.delta
    whole, parcel = folder / "update.safetensors", folder / "update.parcel"
    _write(whole, {"delta": delta, **update.slots})
    if not (form := form_of(up)):
        return ""
    durable.fill(parcel, pack(whole, form))
    failpoints.reach("parcel.packed")
    return form if parcel.stat().st_size < whole.stat().st_size else ""


def _leave_vector(folder: Path, values: Mapping[str, Floats]) -> list[tuple[str, str, int]]:
    """Write the numbers that go into a masked sum one after the other; return what they are."""
    durable.replace(folder / "vector", *(array.tobytes() for array in values.values()))
    return [(name, str(array.dtype), len(array)) for name, array in values.items()]


def _write(path: Path, parts: Mapping[str, Any]) -> None:
    durable.replace(path, b"".join(encode(parts)))


if __name__ == "__main__":
    main()
