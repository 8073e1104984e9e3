"""A simulation's run in MLflow: its settings, curves and files, and where all of it comes from."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fedml import __version__, durable
from fedml.records import flatten
from fedml.releases.database import connect, mlflow_errors
from fedml.releases.manifest import Environment, code_digest
from fedml.rounds import Plan
from fedml.simulation.results import Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

State = Literal["FINISHED", "FAILED", "KILLED"]
_NOTE, _BATCH = "tracking.json", 100  # where a run's id is kept; params taken at a time
_METRICS = 1000  # metrics taken at a time
_LONGEST = 6000  # characters of a param


@dataclass(frozen=True)
class Story:
    """What is to be known of one simulation, beyond its curves.

    `folder` holds its files and `data` is the SHA-256 of its rows, "" if they are not to be had.
    `sweep` is the folder of the multirun that it belongs to, if any.
    """

    plan: Plan
    settings: Mapping[str, object]
    folder: Path
    data: str = ""
    sweep: Path | None = None


class Tracking(Protocol):
    """Where a simulation is recorded for good, beside its folder."""

    def record(self, story: Story, entries: Sequence[Entry], state: State) -> str:
        """Record the run as far as it has come and return one line about it, or "".

        A run that was resumed goes on in its old record; nothing is recorded twice.
        """

    def conclude(self, sweep: Path, state: State) -> str:
        """Record that a multirun is over, with the files that summarise it."""


@dataclass(frozen=True)
class Untracked:
    """Records nothing: the folder is all."""

    def record(self, story: Story, entries: Sequence[Entry], state: State) -> str:
        """See `Tracking`."""
        return ""

    def conclude(self, sweep: Path, state: State) -> str:
        """See `Tracking`."""
        return ""


@dataclass(frozen=True)
class Mlflow:
    """Records in the MLflow at `uri`, a database or a server; a multirun is a parent of its jobs.

    `artifacts` is where a database's files go. With `uri` "sqlite:///outputs/mlflow.db",
    `mlflow ui --backend-store-uri` that shows it.
    """

    uri: str
    experiment: str
    artifacts: str = "outputs/mlflow"

    def record(self, story: Story, entries: Sequence[Entry], state: State) -> str:
        """See `Tracking`. Raises `Unreachable` or `ConfigError` if MLflow cannot be used."""
        client = self._client()
        with mlflow_errors(self.uri):
            note = story.folder / _NOTE
            kept = durable.read_json(note) if note.exists() else None
            run = kept["run"] if kept else self._begin(client, story)
            logged = int(kept["logged"]) if kept else 0
            metrics = [metric for entry in entries[logged:] for metric in _metrics(entry)]
            for start in range(0, len(metrics), _METRICS):
                client.log_batch(run, metrics=metrics[start : start + _METRICS])
            durable.replace(note, json.dumps({"run": run, "logged": len(entries)}).encode())
            _log_files(client, run, story.folder)
            client.set_terminated(run, state)
        return f"recorded in MLflow at {self.uri}, experiment {self.experiment}, run {run}"

    def conclude(self, sweep: Path, state: State) -> str:
        """See `Tracking`."""
        note = sweep / _NOTE
        if not note.exists():
            return ""
        client, run = self._client(), durable.read_json(note)["run"]
        with mlflow_errors(self.uri):
            _log_files(client, run, sweep)
            client.set_terminated(run, state)
        return f"recorded in MLflow at {self.uri}, experiment {self.experiment}, run {run}"

    def _client(self) -> MlflowClient:
        place = self.uri.removeprefix("sqlite:///")
        if place != self.uri:
            durable.make_folder(Path(place).parent)
        return connect(self.uri, Path(self.artifacts))

    def _begin(self, client: MlflowClient, story: Story) -> str:
        from mlflow.entities import Param

        tags = {**_lineage(story), "mlflow.source.name": "fedml simulate"}
        if story.sweep is not None:
            tags["mlflow.parentRunId"] = self._parent(client, story.sweep)
        name = story.folder.name
        run: str = client.create_run(self._experiment(client), tags=tags, run_name=name).info.run_id
        flat = flatten(dict(story.settings))
        params = [Param(key, value[:_LONGEST]) for key, value in flat.items()]
        for start in range(0, len(params), _BATCH):
            client.log_batch(run, params=params[start : start + _BATCH])
        return run

    def _parent(self, client: MlflowClient, sweep: Path) -> str:
        note = sweep / _NOTE
        if not note.exists():
            at, tags = self._experiment(client), {"mlflow.source.name": "fedml simulate -m"}
            run: str = client.create_run(at, tags=tags, run_name=sweep.name).info.run_id
            durable.replace(note, json.dumps({"run": run}).encode())
        return str(durable.read_json(note)["run"])

    def _experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found:
            return str(found.experiment_id)
        local = not self.uri.startswith("http")
        place = Path(self.artifacts, self.experiment).absolute().as_uri() if local else None
        return str(client.create_experiment(self.experiment, artifact_location=place))


def _metrics(entry: Entry) -> Iterator[Metric]:
    from mlflow.entities import Metric

    receipt, at = entry.receipt, int(time.time() * 1000)
    found = {**receipt.metrics, **{f"score/{name}": v for name, v in receipt.scores.items()}}
    found["sites counted"] = len(receipt.counted)
    if receipt.kind == "train":
        found["seconds"] = entry.seconds
    if spent := max((one.epsilon for one in receipt.counted), default=0.0):
        found["epsilon" if receipt.kind == "train" else "epsilon of scoring"] = spent
    return (Metric(name, value, at, receipt.round) for name, value in found.items())


def _log_files(client: MlflowClient, run: str, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != _NOTE:
            client.log_artifact(run, str(path))


def _lineage(story: Story) -> dict[str, str]:
    """Return tags that say what the run was made of."""
    plan = story.plan
    environment, _ = Environment.observe(__version__)
    return {
        "fedml.plan": plan.digest(),
        "fedml.recipe": f"{plan.recipe.name} {plan.recipe.digest}",
        "fedml.data": story.data,
        "fedml.code": code_digest(),
        "fedml.version": __version__,
        "fedml.environment": environment.digest,
        "fedml.python": environment.python,
        "fedml.folder": str(story.folder.absolute()),
        "mlflow.source.git.commit": _commit(),
    }


def _commit() -> str:
    """Return the git commit of this source tree, "" outside one."""
    here = Path(__file__).parent
    try:
        asked = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
