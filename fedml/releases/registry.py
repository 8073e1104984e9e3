"""Every model version with where it came from: what a registry promises, and one in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from fedml.errors import ConfigError
from fedml.protocol.messages import check_name
from fedml.protocol.operations import ModelVersion, Receipt
from fedml.releases.manifest import Manifest, open_bundle


@dataclass(frozen=True)
class Story:
    """How a run went, for people to look at: its receipts, and its settings as flat text."""

    receipts: Sequence[Receipt] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


UNTOLD = Story()


class Registry(Protocol):
    """Where model versions live between training and release; all calls block."""

    def next_version(self, model: str) -> int:
        """Return the number that the next version of `model` must carry in its manifest."""

    def stage(self, bundle: Path, story: Story = UNTOLD) -> ModelVersion:
        """Take a bundle in as a candidate. Staging the same one twice changes nothing.

        Raises `ConfigError` unless its version is `next_version`, `Untrusted` if its files are
        not what its manifest names.
        """

    def promote(self, model: str, version: int) -> ModelVersion:
        """Make a version live, and the one that was live a candidate again.

        Raises `ConfigError` if it was withdrawn or does not exist.
        """

    def withdraw(self, model: str, version: int, reason: str) -> ModelVersion:
        """Mark a version as never to be released, for good; live or not."""

    def get(self, model: str, version: int) -> ModelVersion:
        """Return a version with its manifest; raises `ConfigError` if it does not exist."""

    def list(self, model: str = "") -> tuple[ModelVersion, ...]:
        """Return all versions, of one model or of all, without manifests; oldest first."""

    def bundle(self, model: str, version: int) -> Path:
        """Return a folder with a version's bundle; it is to be read only."""


class MemoryRegistry:
    """A registry that forgets when the process ends; for tests and trials. Bundles are copied."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[tuple[str, int], ModelVersion] = {}

    def next_version(self, model: str) -> int:
        """See `Registry`."""
        return max((row.version for row in self.list(model)), default=0) + 1

    def stage(self, bundle: Path, story: Story = UNTOLD) -> ModelVersion:
        """See `Registry`; the story is not kept."""
        manifest = open_bundle(bundle)
        key = manifest.model, manifest.version
        if key in self._rows and self._rows[key].digest == manifest.digest:
            return self._rows[key]
        check_next(manifest, self.next_version(manifest.model))
        shutil.copytree(bundle, self._place(*key))
        self._rows[key] = _row(manifest)
        return self._rows[key]

    def promote(self, model: str, version: int) -> ModelVersion:
        """See `Registry`."""
        row = check_promotable(self.get(model, version))
        for other in self.list(model):
            if other.state == "live":
                self._rows[model, other.version] = replace(
                    self._rows[model, other.version], state="candidate"
                )
        self._rows[model, version] = replace(row, state="live")
        return self._rows[model, version]

    def withdraw(self, model: str, version: int, reason: str) -> ModelVersion:
        """See `Registry`."""
        self._rows[model, version] = replace(self.get(model, version), state="withdrawn")
        return self._rows[model, version]

    def get(self, model: str, version: int) -> ModelVersion:
        """See `Registry`."""
        if (model, version) not in self._rows:
            raise unknown(model, version)
        return self._rows[model, version]

    def list(self, model: str = "") -> tuple[ModelVersion, ...]:
        """See `Registry`."""
        rows = (row for (name, _), row in sorted(self._rows.items()) if model in ("", name))
        return tuple(replace(row, manifest="") for row in rows)

    def bundle(self, model: str, version: int) -> Path:
        """See `Registry`."""
        self.get(model, version)
        return self._place(model, version)

    def _place(self, model: str, version: int) -> Path:
        return self._folder / check_name("model", model) / str(version)


def _row(manifest: Manifest) -> ModelVersion:
    return ModelVersion(
        model=manifest.model,
        version=manifest.version,
        run=manifest.lineage.run,
        state="candidate",
        digest=manifest.digest,
        created=manifest.created,
        scores=dict(manifest.scores),
        epsilon=dict(manifest.lineage.epsilon),
        manifest=manifest.encode().decode(),
    )


def check_next(manifest: Manifest, wanted: int) -> None:
    """Raise `ConfigError` unless the manifest carries the number `wanted`."""
    if manifest.version != wanted:
        raise ConfigError(
            f"{manifest.model}: the bundle says version {manifest.version}, the next one is "
            f"{wanted}; build it with that number"
        )


def check_promotable(row: ModelVersion) -> ModelVersion:
    """Return `row`; raise `ConfigError` if it was withdrawn."""
    if row.state == "withdrawn":
        raise ConfigError(f"{row.model}/{row.version} was withdrawn; stage a new version instead")
    return row


def unknown(model: str, version: int) -> ConfigError:
    """Return the error for a version that is not registered."""
    return ConfigError(f"no version {version} of model {model!r} is registered; list them first")
