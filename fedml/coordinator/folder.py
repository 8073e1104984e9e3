"""A coordinator's folder: everything it owns, made once by `init` and opened by `run`.

coordinator.toml   settings            journal.jsonl  states/   runs
ca/                authority, sealer   blobs/                   what is on its way
enrolment/         tokens, revoked     releases/                the signed repository
operator/          the first profile   registry/                MLflow, unless elsewhere
audit.jsonl        who did what        press/                   bundles in the making
parent/  shares/   a region's papers and releases of its parent, its rounds that are open
strategies/        files that 'fedml coordinator allow' took in, by digest
flower/            apps that 'fedml coordinator allow-app' took in, and their runs
roster.json        sites that mask, and their keys: put there by an operator
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fedml import settings as files
from fedml.coordinator.settings import Settings, read_settings
from fedml.errors import ConfigError
from fedml.identity.access import Access, Revocations
from fedml.identity.audit import AuditLog
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr
from fedml.identity.enrolment import Invitations
from fedml.identity.receipts import Sealer
from fedml.installed import lend_kept
from fedml.releases.registries import open_registry
from fedml.releases.registry import Registry
from fedml.releases.signing import Repository
from fedml.secagg import Roster

FIRST_OPERATOR = "admin"
STRATEGIES = "strategies"
APPS = "flower"
_OPERATOR_DAYS = 365.0


@dataclass(frozen=True)
class Folder:
    """A coordinator's folder, opened. The registry, which is slow to open, is opened on its own."""

    path: Path
    settings: Settings
    authority: Authority
    invitations: Invitations
    revocations: Revocations
    access: Access
    audit: AuditLog
    releases: Repository
    sealer: Sealer
    roster: Roster | None = None  # of masked rounds

    @staticmethod
    def open(path: Path) -> Folder:
        """Open what `create` made; raises `ConfigError` or, for damage, `Corrupt`."""
        settings = read_settings(path)
        lend_kept("strategy", path / STRATEGIES)
        revocations = Revocations(path / "enrolment" / "revoked.jsonl")
        authority = Authority.load(path / "ca")
        return Folder(
            path,
            settings,
            authority,
            Invitations(path / "enrolment" / "tokens.jsonl"),
            revocations,
            Access(revocations),
            AuditLog(path / "audit.jsonl"),
            Repository(path / "releases"),
            Sealer.open(path / "ca" / "receipts.json", authority),
            _roster(path / "roster.json"),
        )

    def registry(self) -> Registry:
        """Open the model registry; takes seconds, and migrates its database when it must."""
        folder = self.path / "registry"
        uri = self.settings.registry or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        return open_registry(uri, folder)


def _roster(path: Path) -> Roster | None:
    return Roster.parse(path.read_bytes(), str(path)) if path.exists() else None


def create(path: Path, settings: Settings) -> None:
    """Make a coordinator's folder, with a first operator's profile in `operator/`.

    Raises `ConfigError` if the folder is one already.
    """
    if (path / "coordinator.toml").exists():
        raise ConfigError(f"{path} is a coordinator's folder already; run it, or choose another")
    now = time.time()
    authority = Authority.create(path / "ca", now)
    Repository.create(path / "releases")
    key, csr = new_key_and_csr(FIRST_OPERATOR)
    certificate = authority.issue(csr, FIRST_OPERATOR, "operator", now, days=_OPERATOR_DAYS)
    address = f"{settings.host}:{settings.port}"
    profile = Credentials(
        address=address, certificate=certificate, key=key, ca=authority.certificate
    )
    profile.save(path / "operator")
    files.write(settings, path / "coordinator.toml")
