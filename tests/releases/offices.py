"""A coordinator's repository and a site's trust in it, joined without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedml.errors import ConfigError
from fedml.protocol.messages import Blob
from fedml.releases.signing import Repository
from fedml.releases.trust import Trust


class Office:
    """Serves a repository's files to a site, and may lie: `lies` maps a name to other bytes."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self.folder, self.repository = folder, repository
        self.lies: dict[str, bytes | None] = {}
        self.asked: list[str] = []

    def fetch(self, name: str, limit: int) -> bytes | None:
        self.asked.append(name)
        if name in self.lies:
            return self.lies[name]
        try:
            return self.repository.file(name).read_bytes()
        except ConfigError:
            return None

    def download(self, blob: Blob) -> Path:
        self.asked.append(blob.digest)
        if (lie := self.lies.get(blob.digest)) is not None:
            path = self.folder / "lie"
            path.write_bytes(lie)
            return path
        return self.repository.blob(blob.digest)

    def site(self, name: str = "site", root: bytes | None = None) -> Trust:
        return Trust(self.folder / name, root or self.repository.root(), self.fetch, self.download)

    def state(self) -> Callable[[str], bytes]:
        """Take a copy of what the coordinator hands out now, by name."""
        folder = self.repository.folder
        copy = {
            path.name if root == "metadata" else f"channels/{path.name}": path.read_bytes()
            for root in ("metadata", "targets")
            for path in (folder / root).rglob("*.json")
        }
        return copy.__getitem__
