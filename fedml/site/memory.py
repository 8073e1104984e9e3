"""What a site remembers of tasks, on its disk: order, result, and the algorithm's own state.

A finished result is kept, byte for byte, until the coordinator says that the round is over, so
a retry or a crash on either side never makes the site compute, or charge, the same task again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedml import durable, failpoints
from fedml.errors import ConfigError, MalformedMessage, Untrusted
from fedml.protocol import codec
from fedml.protocol.messages import Assignment, RunId, Scored, TaskId, Trained, check_id

Result = Trained | Scored


@dataclass(frozen=True)
class Desk:
    """The folder of one task: what came in, what the worker left, what goes out."""

    folder: Path

    @property
    def model(self) -> Path:
        """The brief's tensors, as they came."""
        return self.folder / "model.safetensors"

    @property
    def model_parcel(self) -> Path:
        """The same as it came, if it was packed."""
        return self.folder / "model.parcel"

    @property
    def update(self) -> Path:
        """The finished update's tensors, as they will travel."""
        return self.folder / "update.safetensors"

    @property
    def update_parcel(self) -> Path:
        """The same packed, if that is how it will travel."""
        return self.folder / "update.parcel"

    @property
    def outcome(self) -> Path:
        """What the worker says of its work, written last."""
        return self.folder / "outcome.json"

    @property
    def unpacked(self) -> Path:
        """What the worker says of the model that it unpacked."""
        return self.folder / "unpacked.json"

    @property
    def memory(self) -> Path:
        """The algorithm's state after this task, kept for good once the task has counted."""
        return self.folder / "memory.safetensors"


class Memory:
    """All tasks a site has not been told to forget, and each run's site-side state."""

    def __init__(self, folder: Path) -> None:
        self._tasks, self._slots = folder / "tasks", folder / "slots"
        self._models = folder / "models"
        self._tasks.mkdir(parents=True, exist_ok=True)

    def desk(self, task: TaskId) -> Desk:
        """Return the folder of `task`; it may not exist yet.

        Raises `Untrusted` if the id is no plain file name: it might name another folder.
        """
        return Desk(self._tasks / _file_name("task", task))

    def accept(self, assignment: Assignment) -> Desk:
        """Note an assignment; the same one twice is one. Its desk is clean unless finished.

        Raises `Untrusted` if another order came under the same id: the terms of one must never
        cover the work of another.
        """
        desk, known = self.desk(assignment.task), self.assignment(assignment.task)
        if known is None:
            shutil.rmtree(desk.folder, ignore_errors=True)
            durable.replace(desk.folder / "assignment", codec.encode(assignment))
        elif known != assignment:
            raise Untrusted(
                f"task {assignment.task} came before as another order; refuse the coordinator"
            )
        return desk

    def assignment(self, task: TaskId) -> Assignment | None:
        """Return the noted assignment, or None."""
        path = self.desk(task).folder / "assignment"
        return codec.decode(Assignment, path.read_bytes()) if path.exists() else None

    def finish(self, result: Result) -> None:
        """Keep what will be sent; from now on `result` answers it."""
        name = "trained" if isinstance(result, Trained) else "scored"
        durable.replace(self.desk(result.task).folder / name, codec.encode(result))

    def result(self, task: TaskId) -> Result | None:
        """Return the kept result, or None while there is none."""
        folder = self.desk(task).folder
        if (folder / "trained").exists():
            return codec.decode(Trained, (folder / "trained").read_bytes())
        if (folder / "scored").exists():
            return codec.decode(Scored, (folder / "scored").read_bytes())
        return None

    def unfinished(self) -> list[Assignment]:
        """Return assignments without a result, for instance after a crash."""
        found = []
        for folder in sorted(self._tasks.iterdir()):
            task = TaskId(folder.name)
            try:
                assignment = self.assignment(task)
            except MalformedMessage:  # from a version whose words we no longer know
                assignment = None
            if assignment is None:
                shutil.rmtree(folder)
            elif self.result(task) is None:
                found.append(assignment)
        return found

    def kept(self) -> tuple[TaskId, ...]:
        """Return the tasks on the disk, finished or not; what else lies there is not told."""
        names = sorted(folder.name for folder in self._tasks.iterdir())
        return tuple(TaskId(name) for name in names if _is_id(name))

    def forget(self, task: TaskId, *, counted: bool) -> None:
        """Delete a task. If it counted, its site-side state becomes its run's."""
        desk, assignment = self.desk(task), self.assignment(task)
        if assignment is not None and counted and desk.memory.exists():
            durable.replace(self.slots(assignment.run), desk.memory.read_bytes())
        failpoints.reach("task.forgetting")
        shutil.rmtree(desk.folder, ignore_errors=True)

    def runs(self) -> tuple[RunId, ...]:
        """Return the runs of which there is site-side state, or a model."""
        names = {path.stem for path in self._slots.glob("*.safetensors")}
        names |= {path.name for path in self._models.glob("*")}
        return tuple(RunId(name) for name in sorted(names) if _is_id(name))

    def model(self, run: RunId, digest: str) -> Path | None:
        """Return where a run's last model lies, if it is the one with that digest.

        Hold it against its digest before you believe it: it was written in no hurry.
        """
        path = self._models / _file_name("run", run) / _file_name("model", digest)
        return path if path.is_file() else None

    def keep_model(self, run: RunId, digest: str, model: Path) -> None:
        """Keep a run's model by a second name until the next one comes, or the run is over."""
        folder = self._models / _file_name("run", run)
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / _file_name("model", digest)
        for older in folder.iterdir():
            if older != place:
                older.unlink(missing_ok=True)
        place.unlink(missing_ok=True)
        place.hardlink_to(model)

    def conclude(self, run: RunId) -> None:
        """Delete the site-side state of a run that is over, and its last model."""
        self.slots(run).unlink(missing_ok=True)
        shutil.rmtree(self._models / _file_name("run", run), ignore_errors=True)

    def slots(self, run: RunId) -> Path:
        """Where the run's site-side state lies, if there is any."""
        return self._slots / f"{_file_name('run', run)}.safetensors"


def _file_name(what: str, id: str) -> str:
    try:
        return check_id(what, id)
    except ConfigError as error:
        raise Untrusted(str(error)) from error


def _is_id(name: str) -> bool:
    try:
        check_id("task", name)
    except ConfigError:
        return False
    return True
