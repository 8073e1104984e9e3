"""The coordinator's side of trust: a TUF repository in a folder, one commit at a time.

`timestamp.json` is the commit point: everything it leads to is on the disk, under names that no
earlier timestamp leads to, before it is replaced. A crash leaves the old state or the new.

    keys/<key id>.pem          Ed25519, mode 600; root's may be moved elsewhere and brought back
    metadata/N.root.json  N.targets.json  N.snapshot.json  timestamp.json
    targets/channels/<sha256>.<model>.json
    blobs/<sha256>             the bundles' files

Source: The Update Framework 1.0.34, consistent snapshots; python-tuf 7.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fedml import durable
from fedml.errors import ConfigError, Corrupt
from fedml.releases.keys import Keys
from fedml.releases.manifest import MANIFEST, Channel, Manifest, open_bundle

Role = Literal["root", "targets", "snapshot", "timestamp"]
_ROLES: tuple[Role, ...] = ("root", "targets", "snapshot", "timestamp")
TIMESTAMP = "timestamp.json"
_NAME = re.compile(
    r"timestamp\.json|[1-9]\d{0,9}\.(root|snapshot|targets)\.json"
    r"|channels/[0-9a-f]{64}\.[a-z0-9][a-z0-9._-]{0,62}\.json"
)
_S = TypeVar("_S", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class Lifetimes:
    """For how many days each role's metadata is good; `refresh` renews it at half of that."""

    root: float = 365
    targets: float = 90
    snapshot: float = 90
    timestamp: float = 7

    def __post_init__(self) -> None:
        if min(self.root, self.targets, self.snapshot, self.timestamp) <= 0:
            raise ConfigError(f"{self}: each lifetime must be above 0 days")


def place(folder: Path, name: str) -> Path:
    """Return where a repository in `folder` has the metadata or channel file that sites ask for.

    Names come from elsewhere: anything but the known patterns is a `ConfigError`.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"no release file {name[:80]!r}")
    return folder / ("targets" if "/" in name else "metadata") / name


def locate(folder: Path, name: str) -> Path:
    """Return where that file lies; raises `ConfigError` if there is none."""
    path = place(folder, name)
    if not path.is_file():
        raise ConfigError(f"no release file {name!r}")
    return path


def _now() -> datetime:
    return datetime.now(UTC)


class Repository:
    """Releases as the sites will verify them. One process, the coordinator, writes it.

    Opening mends what a crash in the middle of a key rotation left. Raises `ConfigError` if the
    folder holds no repository or a key is missing, `Corrupt` if its metadata are damaged.
    """

    def __init__(
        self,
        folder: Path,
        lifetimes: Lifetimes | None = None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self.folder, self._lifetimes, self._clock = folder, lifetimes or Lifetimes(), clock
        self._keys = Keys(folder / "keys")
        self._load()
        if not self._is_signed():
            self._commit()

    @classmethod
    def create(
        cls,
        folder: Path,
        lifetimes: Lifetimes | None = None,
        clock: Callable[[], datetime] = _now,
    ) -> Repository:
        """Make keys and empty metadata in `folder`; raises `ConfigError` if it has some."""
        if (folder / "metadata" / TIMESTAMP).exists():
            raise ConfigError(f"{folder} already holds a release repository; open it instead")
        shutil.rmtree(folder / "metadata", ignore_errors=True)  # of a creation cut short
        self = cls.__new__(cls)
        self.folder, self._lifetimes, self._clock = folder, lifetimes or Lifetimes(), clock
        self._keys = Keys(folder / "keys")
        self._root = Metadata(Root(consistent_snapshot=True))
        for role in _ROLES:
            self._root.signed.add_key(self._keys.make(), role)
        self._targets, self._snapshot = Metadata(Targets()), Metadata(Snapshot())
        self._timestamp = Metadata(Timestamp())
        self._root.signed.version = 0
        self._commit_root()
        for empty in (self._targets, self._snapshot, self._timestamp):
            empty.signed.version = 0
        self._commit()
        return self

    # --- what sites fetch ---------------------------------------------------------------------

    def root(self) -> bytes:
        """Return the root metadata that a site is handed at enrolment and trusts from then on."""
        return self.file(f"{self._root.signed.version}.root.json").read_bytes()

    def file(self, name: str) -> Path:
        """Return where a metadata or channel file lies; `ConfigError` if there is none so named."""
        return locate(self.folder, name)

    def blob(self, digest: str) -> Path:
        """Return the path of a bundle's file by SHA-256; `ConfigError` if none is published."""
        path = self.folder / "blobs" / digest
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not path.is_file():
            raise ConfigError(f"no release file with digest {digest[:70]!r}")
        return path

    def models(self) -> list[str]:
        """Return the models that have a channel, sorted."""
        names = (path.removeprefix("channels/") for path in self._targets.signed.targets)
        return sorted(name.removesuffix(".json") for name in names if "/" not in name)

    def channel(self, model: str) -> Channel | None:
        """Return what the sites are told to serve of `model`, None before the first release."""
        path = f"channels/{model}.json"
        target = self._targets.signed.targets.get(path)
        if target is None:
            return None
        name = target.get_prefixed_paths()[0]
        return Channel.decode((self.folder / "targets" / name).read_bytes())

    # --- what operators do --------------------------------------------------------------------

    def publish(self, bundle: Path) -> Channel:
        """Sign the bundle's files and point the model's channel at it, in one commit.

        Publishing what the channel already names changes nothing, so a repeat after a crash is
        safe. Raises `ConfigError` if the version was published with other contents, `Untrusted`
        if the bundle's files are not what its manifest names.
        """
        manifest = open_bundle(bundle)
        now = self.channel(manifest.model)
        if now and (now.version, now.digest) == (manifest.version, manifest.digest):
            return now
        signed = self._digest(manifest.model, manifest.version)
        if signed not in ("", manifest.digest):
            raise ConfigError(
                f"{manifest.model}/{manifest.version} was published with other contents; "
                "versions are never used twice, stage a new one"
            )
        with self._whole():
            self._add_files(bundle, manifest)
            return self._point(manifest.model, manifest.version, manifest.digest)

    def rollback(self, model: str, version: int = 0) -> Channel:
        """Point the channel, under a new rev, at an older published version: by default the one
        before. Raises `ConfigError` if there is none."""
        now = self.channel(model)
        if now is None:
            raise ConfigError(f"nothing of {model!r} is published; publish a release first")
        known = self._versions(model)
        earlier = [v for v in known if v < now.version]
        wanted = version or max(earlier, default=0)
        if wanted not in known:
            raise ConfigError(
                f"{model}: no release {wanted or f'before {now.version}'} to go back to; "
                f"published are {known}"
            )
        with self._whole():
            return self._point(model, wanted, self._digest(model, wanted))

    def refresh(self) -> None:
        """Renew all metadata past half of its lifetime; call daily, and before each is needed.

        Raises `ConfigError` if a key it needs is not in the keys folder.
        """
        with self._whole():
            if self._is_stale(self._root.signed, "root"):
                self._commit_root()
            if self._is_stale(self._targets.signed, "targets"):
                self._commit()
            elif self._is_stale(self._snapshot.signed, "snapshot"):
                self._commit(targets=False)
            elif self._is_stale(self._timestamp.signed, "timestamp"):
                self._commit(targets=False, snapshot=False)

    def rotate(self, role: Role) -> None:
        """Replace the key of `role` with a new one and sign anew; sites follow by themselves.

        The old key counts no more and is deleted. Rotating root needs root's old key.
        """
        old = list(self._root.signed.roles[role].keyids)
        with self._whole():
            signers = [self._signer(key) for key in self._root.signed.roles["root"].keyids]
            for key in old:
                self._root.signed.revoke_key(key, role)
            self._root.signed.add_key(self._keys.make(), role)
            self._commit_root(signers)
            self._commit()
        for key in old:
            self._keys.forget(key)

    # --- how ----------------------------------------------------------------------------------

    def _load(self) -> None:
        folder = self.folder / "metadata"
        versions = [int(p.name.split(".")[0]) for p in folder.glob("[1-9]*.root.json")]
        if not versions:
            raise ConfigError(f"{self.folder} holds no release repository; is the folder right?")
        self._root = self._read(f"{max(versions)}.root.json", Root)
        self._timestamp = self._read(TIMESTAMP, Timestamp)
        at = self._timestamp.signed.snapshot_meta.version
        self._snapshot = self._read(f"{at}.snapshot.json", Snapshot)
        at = self._snapshot.signed.meta["targets.json"].version
        self._targets = self._read(f"{at}.targets.json", Targets)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """After a failure, a full disk say, go on from what the disk holds."""
        try:
            yield
        except BaseException:
            self._load()
            raise

    def _versions(self, model: str) -> list[int]:
        found = (
            re.fullmatch(rf"models/{re.escape(model)}/(\d+)/{re.escape(MANIFEST)}", path)
            for path in self._targets.signed.targets
        )
        return sorted(int(match[1]) for match in found if match)

    def _digest(self, model: str, version: int) -> str:
        target = self._targets.signed.targets.get(f"models/{model}/{version}/{MANIFEST}")
        return target.hashes["sha256"] if target else ""

    def _add_files(self, bundle: Path, manifest: Manifest) -> None:
        prefix = f"models/{manifest.model}/{manifest.version}"
        for name in (*manifest.files, MANIFEST):
            target = TargetFile.from_file(f"{prefix}/{name}", str(bundle / name), ["sha256"])
            path = self.folder / "blobs" / target.hashes["sha256"]
            if not path.is_file():
                durable.copy(bundle / name, path)
            self._targets.signed.targets[target.path] = target

    def _point(self, model: str, version: int, digest: str) -> Channel:
        now = self.channel(model)
        channel = Channel(model, now.rev + 1 if now else 1, version, digest)
        data = channel.encode()
        target = TargetFile.from_data(f"channels/{model}.json", data, ["sha256"])
        durable.replace(self.folder / "targets" / target.get_prefixed_paths()[0], data)
        self._targets.signed.targets[target.path] = target
        self._commit()
        return channel

    def _commit(self, *, targets: bool = True, snapshot: bool = True) -> None:
        if targets:
            data = self._sign(self._targets, "targets")
            at = self._targets.signed.version
            self._write(f"{at}.targets.json", data)
            self._snapshot.signed.meta["targets.json"] = MetaFile.from_data(at, data, ["sha256"])
        if targets or snapshot:
            data = self._sign(self._snapshot, "snapshot")
            at = self._snapshot.signed.version
            self._write(f"{at}.snapshot.json", data)
            self._timestamp.signed.snapshot_meta = MetaFile.from_data(at, data, ["sha256"])
        self._write(TIMESTAMP, self._sign(self._timestamp, "timestamp"))

    def _commit_root(self, old: list[CryptoSigner] | None = None) -> None:
        self._prepare(self._root.signed, "root")
        keys = self._root.signed.roles["root"].keyids
        signers = {s.public_key.keyid: s for s in old or ()}
        signers |= {key: self._signer(key) for key in keys if key not in signers}
        self._root.signatures.clear()
        for signer in signers.values():
            self._root.sign(signer, append=True)
        self._write(f"{self._root.signed.version}.root.json", self._root.to_bytes())

    def _sign(self, metadata: Metadata[_S], role: Role) -> bytes:
        self._prepare(metadata.signed, role)
        metadata.signatures.clear()
        for key in self._root.signed.roles[role].keyids:
            metadata.sign(self._signer(key), append=True)
        return metadata.to_bytes()

    def _prepare(self, signed: Signed, role: Role) -> None:
        signed.version += 1
        lifetime = timedelta(days=getattr(self._lifetimes, role))
        signed.expires = (self._clock() + lifetime).replace(microsecond=0)

    def _is_stale(self, signed: Signed, role: Role) -> bool:
        half = timedelta(days=getattr(self._lifetimes, role)) / 2
        return signed.expires - self._clock() < half

    def _is_signed(self) -> bool:
        root = self._root.signed
        try:
            for role, metadata in (
                ("targets", self._targets),
                ("snapshot", self._snapshot),
                ("timestamp", self._timestamp),
            ):
                root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            return False
        return True

    def _signer(self, key: str) -> CryptoSigner:
        found = self._root.signed.keys[key]
        assert isinstance(found, SSlibKey)  # we made it
        return self._keys.signer(found)

    def _read(self, name: str, kind: type[_S]) -> Metadata[_S]:
        path = self.folder / "metadata" / name
        try:
            metadata = Metadata[_S].from_bytes(path.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist; create the repository anew") from error
        except (OSError, RepositoryError) as error:
            raise Corrupt(f"{path} is damaged ({error}); restore it from a backup") from error
        if not isinstance(metadata.signed, kind):
            raise Corrupt(f"{path} is {metadata.signed.type} metadata; restore it from a backup")
        return metadata

    def _write(self, name: str, data: bytes) -> None:
        durable.replace(self.folder / "metadata" / name, data)
