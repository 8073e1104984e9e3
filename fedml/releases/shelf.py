"""The releases a site keeps: which one of each model is current, and the one before it.

    <model>/<version>/     a bundle, each file checked when it came
    <model>/current.json   {version, digest, previous}: the only thing that says what is served

A bundle appears under its name when it is complete, and the pointer is replaced in one step, so
`kill -9` at any moment leaves the old release or the new one current, and both whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedml import durable, failpoints
from fedml.errors import ConfigError, Corrupt, Untrusted
from fedml.protocol.messages import check_digest, check_name
from fedml.releases.manifest import MANIFEST, Manifest, is_whole, open_bundle

POINTER = "current.json"
Check = Callable[[Path], object]  # `session.rehearse`: raises `Untrusted` if a bundle fails


@dataclass(frozen=True)
class Kept:
    """A release on the shelf: version, and digest of its manifest."""

    version: int
    digest: str

    def __post_init__(self) -> None:
        check_digest("release", self.digest)
        if self.version < 1:
            raise ConfigError(f"release version {self.version}: versions start at 1")


@dataclass(frozen=True)
class Pointer:
    """What a site serves of a model, and what `back` would return to."""

    current: Kept
    previous: Kept | None = None


class Shelf:
    """Bundles in a folder. One process, the site's daemon, changes it; any may read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def models(self) -> tuple[str, ...]:
        """Return the models that have a current release."""
        return tuple(sorted(path.parent.name for path in self.folder.glob(f"*/{POINTER}")))

    def current(self, model: str) -> Pointer | None:
        """Return what is current of `model`, None if nothing; `Corrupt` if that is unreadable."""
        path = self._model(model) / POINTER
        if not path.exists():
            return None
        raw = durable.read_json(path)
        try:
            previous = raw["previous"]
            return Pointer(
                Kept(raw["version"], raw["digest"]), None if previous is None else Kept(**previous)
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise Corrupt(f"{path}: {error}; activate the release again") from error

    def bundle(self, model: str, version: int) -> Path:
        """Return the folder of a kept bundle; raises `ConfigError` if it is not on the shelf."""
        folder = self._model(model) / str(version)
        if not folder.is_dir():
            raise ConfigError(f"{model}/{version} is not on the shelf {self.folder}; fetch it")
        return folder

    def add(self, bundle: Path) -> Manifest:
        """Copy a bundle onto the shelf, whole or not at all, and return its manifest.

        Raises `Untrusted` if a file is not what the manifest names, or if the shelf holds other
        bytes under the same version.
        """
        manifest = open_bundle(bundle)
        folder = self._model(manifest.model) / str(manifest.version)
        draft = folder.with_name(f".{folder.name}.draft")
        if folder.is_dir():
            if is_whole(folder, manifest.digest):
                return manifest
            if self._is_pointed(manifest.model, manifest.version, manifest.digest):
                raise Untrusted(
                    f"{manifest.model}/{manifest.version} is on the shelf with other contents; "
                    "versions are never used twice"
                )
            shutil.rmtree(folder)  # damaged: what comes now was verified
        shutil.rmtree(draft, ignore_errors=True)
        for name in (*manifest.files, MANIFEST):
            durable.copy(bundle / name, draft / name)
        failpoints.reach("shelf.drafted")
        draft.rename(folder)
        durable.sync_folder(folder.parent)
        return manifest

    def activate(self, model: str, version: int, check: Check) -> Pointer:
        """Make a kept version current if `check` lets it pass; older ones but the last go.

        Activating what is current changes nothing. Raises what `check` raises; the pointer then
        stays as it was.
        """
        folder = self.bundle(model, version)
        kept = Kept(version, open_bundle(folder).digest)
        now = self.current(model)
        if now and now.current == kept:
            return now
        check(folder)
        failpoints.reach("shelf.checked")
        return self._point(model, Pointer(kept, now.current if now else None))

    def back(self, model: str) -> Pointer:
        """Make the previous release current again; raises `ConfigError` if there is none."""
        now = self.current(model)
        if now is None or now.previous is None:
            raise ConfigError(f"{model}: no previous release is kept here; nothing to go back to")
        open_bundle(self.bundle(model, now.previous.version), now.previous.digest)
        return self._point(model, Pointer(now.previous))

    def _point(self, model: str, pointer: Pointer) -> Pointer:
        previous = asdict(pointer.previous) if pointer.previous else None
        raw = {**asdict(pointer.current), "previous": previous}
        durable.replace(self._model(model) / POINTER, durable.dump_json(raw))
        failpoints.reach("shelf.switched")
        wanted = {str(kept.version) for kept in (pointer.current, pointer.previous) if kept}
        for folder in self._model(model).iterdir():
            if folder.is_dir() and folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)
        return pointer

    def _is_pointed(self, model: str, version: int, digest: str) -> bool:
        now = self.current(model)
        kept = (now.current, now.previous) if now else ()
        return any(k and k.version == version and k.digest != digest for k in kept)

    def _model(self, model: str) -> Path:
        return self.folder / check_name("model", model)
