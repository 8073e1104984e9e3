"""A tree in process: a hub whose sites are behind regions, everything real but the network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fedml.coordinator.folder import Folder, create
from fedml.coordinator.mirror import Mirror
from fedml.coordinator.region import Region
from fedml.coordinator.regional import desks_of
from fedml.coordinator.settings import RELEASES, Settings
from fedml.errors import Unreachable
from fedml.protocol.messages import Hello
from fedml.releases.registry import MemoryRegistry
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore
from fedml.transport.memory import MemoryCoordinator, MemoryLink
from tests.coordinator.world import HEARTBEAT, Hub, Site, who

GRACE = 1.0  # seconds: more than a busy machine takes to bring all leaves back
LEAVES: Mapping[str, tuple[str, ...]] = {
    "north": ("bern", "oslo", "riga"),
    "south": ("kyoto", "lima", "quito"),
}


class Cable(MemoryLink):
    """A region's link, which can be cut and mended."""

    is_cut = False

    async def connect(self, hello: Hello) -> None:
        """Fail while it is cut."""
        if self.is_cut:
            raise Unreachable("the cable is cut")
        await super().connect(hello)

    async def cut(self) -> None:
        """End the stream, and let no other begin."""
        self.is_cut = True
        if self._stream is not None:
            await self._stream.close()


class Place:
    """A region's folder; `start` and `crash` make and end the region in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        create(self.path, Settings(heartbeat=HEARTBEAT, grace=GRACE))
        self.folder = Folder.open(self.path)

    def start(self, hub: Hub, grace: float = GRACE) -> None:
        """Begin, or go on, as a region of `hub`."""
        blobs = BlobStore.in_transit(self.path / "blobs", 2**24)
        self.cable = Cable(hub.coordinator, who(self.name, "region"))
        backoff = Backoff(0.01, 0.05)
        self.region = Region(
            self.path / "shares",
            self.cable,
            blobs,
            Mirror(self.path / RELEASES, self.cable, 2**24),
            heartbeat=HEARTBEAT,
            grace=grace,
            backoff=backoff,
        )
        desks = desks_of(self.folder, self.region, blobs, f"{self.name} is a region of hub")
        self.coordinator = MemoryCoordinator(desks, self.folder.access)
        self.operator = self.coordinator.operations(who("admin", "operator"))
        self._work = asyncio.create_task(self.region.run())

    async def crash(self) -> None:
        """End at once; the folder is as it was."""
        self._work.cancel()
        await asyncio.wait([self._work])
        await self.coordinator.stop()

    def shares(self) -> list[str]:
        """Return what lies in the folder of open rounds."""
        folder = self.path / "shares"
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class Tree:
    """A hub, its regions, and their leaves, which are played by the test."""

    def __init__(self, folder: Path, hub: Hub, kind: type[Site] = Site) -> None:
        self.folder, self.hub, self._kind = folder, hub, kind
        self.places: dict[str, Place] = {}
        self.leaves: dict[str, Site] = {}

    async def grow(self, leaves: Mapping[str, Sequence[str]], patience: float = 20.0) -> None:
        """Start regions with these leaves, and wait until the hub has them all."""
        for name, sites in leaves.items():
            self.places[name] = Place(self.folder, name)
            self.places[name].start(self.hub)
            for site in sites:
                self.leaves[site] = await self._kind(self.folder, site).connect(self.places[name])
        await self.until(lambda: self.here() == set(self.leaves), patience)

    def here(self) -> set[str]:
        """Return the sites that the hub could ask."""
        return {str(s.site) for s in self.hub.runs.desk.statuses() if s.connected}

    async def until(self, test: Callable[[], bool], patience: float = 20.0) -> None:
        """Return once `test` holds; who comes and goes makes no event that a test could await."""
        async with asyncio.timeout(patience):
            while not test():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        """End everything."""
        for place in self.places.values():
            await place.crash()


@asynccontextmanager
async def tree(
    folder: Path,
    leaves: Mapping[str, Sequence[str]] = LEAVES,
    kind: type[Site] = Site,
    grace: float = GRACE,
) -> AsyncIterator[Tree]:
    """Return a tree that has grown."""
    settings = Settings(heartbeat=HEARTBEAT, grace=grace)
    hub = Hub(folder / "hub", MemoryRegistry(folder / "registry"), settings)
    grown = Tree(folder, hub, kind)
    try:
        await grown.grow(leaves)
        yield grown
    finally:
        await grown.close()
        await grown.hub.close()
