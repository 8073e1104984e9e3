"""A region's copy of what its parent has released, for its leaves.

The region makes sure of a release as a site does, and hands on the parent's own signatures: a
leaf trusts the root that it was handed when it joined, which is the parent's, so a region can
keep a release back and not change a byte of it. What leaves see is complete at any moment:
`timestamp.json` is replaced last, when all that it leads to is here.

    metadata/  targets/  blobs/   as `releases.signing` has them
    trust/                        what we believe ourselves
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from fedml import durable
from fedml.protocol.messages import Blob
from fedml.releases.manifest import MANIFEST, Manifest, fingerprint
from fedml.releases.signing import TIMESTAMP, locate, place
from fedml.releases.trust import Trust
from fedml.transport.chunks import BlobStore
from fedml.transport.fetching import FIRST_ROOT, Fetching, first_root
from fedml.transport.link import Link


class Mirror:
    """The mirror in `folder`, filled over `link`; the region's process alone writes it."""

    def __init__(self, folder: Path, link: Link, limit_bytes: int) -> None:
        self._folder, self._link = folder, link
        self.store = BlobStore(folder / "blobs", limit_bytes)
        self._turn = asyncio.Lock()
        self._known = set(self.models())
        self._shown = self._last = self._digests()  # of the last two states that leaves saw
        self.store.sweep(self._shown)
        self._timestamp = b""

    def models(self) -> list[str]:
        """Return the models of which leaves get a release here, sorted."""
        return sorted({bundle.parent.name for bundle in self._bundles()})

    def file(self, name: str) -> Path:
        """Return where a metadata or channel file lies; `ConfigError` if there is none so named."""
        return locate(self._folder, name)

    async def follow(self, model: str = "") -> None:
        """Bring all models that we have, and `model`, to what the parent vouches for now.

        What leaves see changes at the end, in one step. Raises `Unreachable` if the parent is
        away, `Untrusted` if anything is not what it signed: leaves then see what they saw.
        """
        async with self._turn:
            root = place(self._folder, FIRST_ROOT)
            if not root.exists():  # of a region that joined before regions had releases
                durable.replace(root, await first_root(self._link))
            if model:
                self._known.add(model)
            calls = Fetching(self._link, asyncio.get_running_loop(), self.store)
            await asyncio.to_thread(self._follow, calls, root.read_bytes())

    def _follow(self, calls: Fetching, root: bytes) -> None:
        def fetch(name: str, limit: int) -> bytes | None:
            """Keep what comes before it is believed, lest a crash leave us believing the lost."""
            data = calls.fetch(name, limit)
            if data is not None and name == TIMESTAMP:
                self._timestamp = data
            elif data is not None:
                durable.replace(place(self._folder, name), data)
            return data

        trust = Trust(self._folder / "trust", root, fetch, calls.download)
        trust.refresh()
        for model in sorted(self._known):
            for blob in _files(trust.obtain(model)):
                if not self.store.has(blob.digest):
                    calls.download(blob)
        durable.replace(place(self._folder, TIMESTAMP), self._timestamp)
        shown = self._digests()
        for digest in self._last - self._shown - shown:  # a leaf may still fetch what it saw last
            self.store.drop(digest)
        self._last, self._shown = self._shown, shown

    def _digests(self) -> set[str]:
        return {blob.digest for bundle in self._bundles() for blob in _files(bundle)}

    def _bundles(self) -> Iterator[Path]:
        return (self._folder / "trust" / "bundles").glob("*/[0-9]*")


def _files(bundle: Path) -> list[Blob]:
    manifest = bundle / MANIFEST
    return [fingerprint(manifest), *Manifest.decode(manifest.read_bytes()).files.values()]
