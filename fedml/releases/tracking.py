"""Model versions in MLflow: its tracking pages for people, its registry tables for us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedml.durable import dump_json
from fedml.errors import ConfigError, Corrupt
from fedml.protocol.messages import RunId, check_name
from fedml.protocol.operations import ModelVersion
from fedml.releases.database import connect, mlflow_errors
from fedml.releases.manifest import MANIFEST, Manifest, open_bundle
from fedml.releases.registry import UNTOLD, Story, check_next, check_promotable, unknown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion as _Row

_P = ParamSpec("_P")
_R = TypeVar("_R")
_BATCH = 100  # params that MLflow takes at a time
_METRICS = 1000  # metrics
_LIVE: Literal["live"] = "live"
_CANDIDATE: Literal["candidate"] = "candidate"


def _guarded(
    method: Callable[Concatenate[MlflowRegistry, _P], _R],
) -> Callable[Concatenate[MlflowRegistry, _P], _R]:
    """Turn what MLflow raises into what a caller can act on."""

    def guarded(self: MlflowRegistry, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mlflow_errors(self.uri):
            return method(self, *args, **kwargs)

    update_wrapper(guarded, method)
    return guarded


class MlflowRegistry:
    """Versions in MLflow's tracking and registry tables, bundles in its artifact folder.

    `uri` is a database: `sqlite:////path/registry.db` or `postgresql://user@host/name`. A fresh
    database gets its tables here, which takes seconds, under a lock. Use from one thread.
    """

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri, self._artifacts = uri, artifacts.absolute()
        self._client: MlflowClient = connect(uri, artifacts)

    @_guarded
    def next_version(self, model: str) -> int:
        """See `Registry`. Versions that someone deleted in MLflow's own pages stay used up."""
        known = self._client.search_registered_models(f"name = '{check_name('model', model)}'")
        noted = int(known[0].tags.get("fedml.next", 1)) if known else 1
        return max([noted, *(int(row.version) + 1 for row in self._rows(model))])

    @_guarded
    def stage(self, bundle: Path, story: Story = UNTOLD) -> ModelVersion:
        """See `Registry`.

        The version is created last and in one transaction, so a crash before leaves at most an
        MLflow run that no version names.
        """
        manifest = open_bundle(bundle)
        for row in self._rows(manifest.model):
            if row.tags.get("fedml.digest") == manifest.digest:
                return self.get(manifest.model, int(row.version))
        check_next(manifest, self.next_version(manifest.model))
        run = self._record(bundle, manifest, story)
        client, model = self._client, manifest.model
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        uri = client.get_run(run).info.artifact_uri
        row = client.create_model_version(model, f"{uri}/bundle", run, tags=_tags(manifest))
        client.set_registered_model_tag(model, "fedml.next", str(int(row.version) + 1))
        if int(row.version) != manifest.version:
            client.delete_model_version(model, row.version)
            raise ConfigError(
                f"{model}: MLflow counts {row.version}, the bundle says {manifest.version}; "
                "someone deleted versions there. Stage again: the next number is right"
            )
        client.set_registered_model_alias(model, _CANDIDATE, row.version)
        return self.get(model, manifest.version)

    @_guarded
    def promote(self, model: str, version: int) -> ModelVersion:
        """See `Registry`. MLflow's alias `live` is what says so."""
        check_promotable(self.get(model, version))
        self._client.set_registered_model_alias(model, _LIVE, str(version))
        return self.get(model, version)

    @_guarded
    def withdraw(self, model: str, version: int, reason: str) -> ModelVersion:
        """See `Registry`. The reason becomes the version's tag `fedml.withdrawn`."""
        self.get(model, version)
        tag = reason.strip()[:1000] or "no reason given"
        self._client.set_model_version_tag(model, str(version), "fedml.withdrawn", tag)
        for alias, at in self._aliases(model).items():
            if at == version:
                self._client.delete_registered_model_alias(model, alias)
        return self.get(model, version)

    @_guarded
    def get(self, model: str, version: int) -> ModelVersion:
        """See `Registry`."""
        row = next((r for r in self._rows(model) if int(r.version) == version), None)
        if row is None:
            raise unknown(model, version)
        path = self._path(row) / MANIFEST
        found = _version(row, self._aliases(model))
        manifest = Manifest.decode(path.read_bytes()) if path.exists() else None
        if manifest is None or manifest.digest != found.digest:
            raise Corrupt(f"{path} is not what was staged; restore it from a backup")
        return replace(found, manifest=manifest.encode().decode())

    @_guarded
    def list(self, model: str = "") -> tuple[ModelVersion, ...]:
        """See `Registry`. Versions that fedml did not make are left out."""
        rows = [row for row in self._rows(model) if "fedml.digest" in row.tags]
        aliases = {name: self._aliases(name) for name in {row.name for row in rows}}
        rows.sort(key=lambda row: (row.name, int(row.version)))
        return tuple(_version(row, aliases[row.name]) for row in rows)

    @_guarded
    def bundle(self, model: str, version: int) -> Path:
        """See `Registry`."""
        for row in self._rows(model):
            if int(row.version) == version:
                return self._path(row)
        raise unknown(model, version)

    def _rows(self, model: str) -> Sequence[_Row]:
        test = f"name = '{check_name('model', model)}'" if model else None
        rows: list[_Row] = []
        token: str | None = None
        while True:
            page = self._client.search_model_versions(test, max_results=1000, page_token=token)
            rows.extend(page)
            token = page.token
            if not token:
                return rows

    def _aliases(self, model: str) -> dict[str, int]:
        raw = self._client.get_registered_model(model).aliases
        return {alias: int(version) for alias, version in raw.items()}

    def _path(self, row: _Row) -> Path:
        # not MLflow's download, which copies a bundle to a temporary folder each time
        return Path(url2pathname(urlsplit(str(row.source)).path))

    def _record(self, bundle: Path, manifest: Manifest, story: Story) -> str:
        from mlflow.entities import Param

        client, model = self._client, manifest.model
        experiment = client.get_experiment_by_name(f"fedml/{model}")
        place = (self._artifacts / model).as_uri()
        at = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(f"fedml/{model}", artifact_location=place)
        )
        name = f"{manifest.lineage.run}-v{manifest.version}"
        run: str = client.create_run(at, tags=_tags(manifest), run_name=name).info.run_id
        settings = [Param(key, value[:6000]) for key, value in story.settings.items()]
        for start in range(0, len(settings), _BATCH):
            client.log_batch(run, params=settings[start : start + _BATCH])
        metrics = list(_metrics(manifest, story))
        for start in range(0, len(metrics), _METRICS):
            client.log_batch(run, metrics=metrics[start : start + _METRICS])
        client.log_artifacts(run, str(bundle), "bundle")
        client.set_terminated(run)
        return run


def _metrics(manifest: Manifest, story: Story) -> Iterator[Metric]:
    from mlflow.entities import Metric

    rounds = manifest.lineage.rounds
    stamp = int(manifest.created * 1000)
    for receipt in story.receipts:
        at = int(receipt.closed * 1000)
        curves = {**receipt.metrics, **{f"score/{k}": v for k, v in receipt.scores.items()}}
        curves["sites counted"] = len(receipt.counted)
        curves |= {f"epsilon/{counted.site}": counted.epsilon for counted in receipt.counted}
        yield from (Metric(name, value, at, receipt.round) for name, value in curves.items())
    for name, value in manifest.scores.items():
        yield Metric(f"final/{name}", value, stamp, rounds)
    for site, epsilon in manifest.lineage.epsilon.items():
        yield Metric(f"final/epsilon/{site}", epsilon, stamp, rounds)


def _tags(manifest: Manifest) -> dict[str, str]:
    lineage = manifest.lineage
    return {
        "fedml.digest": manifest.digest,
        "fedml.run": lineage.run,
        "fedml.created": repr(manifest.created),
        "fedml.parent": str(lineage.parent),
        "fedml.recipe": f"{lineage.recipe.name} {lineage.recipe.digest}",
        "fedml.rounds": str(lineage.rounds),
        "fedml.plan": lineage.plan,
        "fedml.code": lineage.code,
        "fedml.scores": dump_json(dict(manifest.scores)).decode(),
        "fedml.epsilon": dump_json(dict(lineage.epsilon)).decode(),
        "fedml.delta": repr(lineage.delta),
    }


def _version(row: _Row, aliases: Mapping[str, int]) -> ModelVersion:
    tags = row.tags
    withdrawn, live = "fedml.withdrawn" in tags, aliases.get(_LIVE) == int(row.version)
    return ModelVersion(
        model=row.name,
        version=int(row.version),
        run=RunId(tags["fedml.run"]),
        state="withdrawn" if withdrawn else _LIVE if live else _CANDIDATE,
        digest=tags["fedml.digest"],
        created=float(tags["fedml.created"]),
        scores=json.loads(tags["fedml.scores"]),
        epsilon=json.loads(tags["fedml.epsilon"]),
    )
