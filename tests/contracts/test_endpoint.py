"""What a daemon's endpoint does with releases, and what it goes on serving whatever comes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedml.cli.endpoint import ROOT, ReleaseEndpoint
from fedml.errors import ConfigError, Refused, Unreachable, Untrusted
from fedml.protocol.messages import Blob, Command, Hello, SiteEvent, TaskId
from fedml.protocol.requests import Admission, Pong
from fedml.releases.shelf import Shelf
from fedml.releases.signing import Repository
from fedml.serving.engine import Engine
from fedml.serving.oip import Question
from fedml.transport.chunks import BlobStore
from tests.bundles import WIDTH, write_bundle


class Courier:
    """A link that carries releases straight from a repository, and may lie or be cut."""

    def __init__(self, repository: Repository) -> None:
        self.repository, self.cut = repository, False
        self.lies: dict[str, bytes] = {}

    async def fetch(self, name: str, limit: int) -> bytes:
        if self.cut:
            raise Unreachable("the cable is cut")
        return self.lies.get(name) or self.repository.file(name).read_bytes()

    async def download(self, blob: Blob, into: BlobStore) -> None:
        if self.cut:
            raise Unreachable("the cable is cut")
        data = self.lies.get(blob.digest) or self.repository.blob(blob.digest).read_bytes()
        if into.put_bytes(data) != blob:
            raise Untrusted("the blob is not what its name says")

    async def connect(self, hello: Hello) -> None:
        raise Refused("only releases travel here")

    async def receive(self, silence: float = 30.0) -> Command:
        raise Refused("only releases travel here")

    async def send(self, event: SiteEvent) -> None:
        raise Refused("only releases travel here")

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        raise Refused("only releases travel here")

    async def ping(self) -> Pong:
        raise Refused("only releases travel here")

    async def leave(self) -> None:
        raise Refused("only releases travel here")

    async def renew(self, csr: bytes) -> Admission:
        raise Refused("only releases travel here")

    async def close(self) -> None:
        pass


class Place:
    """A repository with a version 1 and 2 of a model, and a site that trusts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository.create(folder / "repository")
        for version in (1, 2):
            bundle = folder / f"bundle-{version}"
            write_bundle(bundle, version=version, factor=float(version))
            self.bundles = {**getattr(self, "bundles", {}), version: bundle}
        self.courier = Courier(self.repository)
        self.site = folder / "site"
        (self.site / ROOT).parent.mkdir(parents=True)
        (self.site / ROOT).write_bytes(self.repository.root())
        self.engine = Engine(Shelf(self.site / "shelf"))
        self.endpoint = ReleaseEndpoint(self.site, self.engine)

    async def answer(self) -> float:
        """Return what the served model makes of a row of ones: WIDTH times its version."""
        import numpy as np

        rows = np.ones((1, WIDTH), np.float32)
        found = await self.engine.infer(Question("heart", {"input": rows}))
        return float(found.outputs["output"][0, 0]) / WIDTH


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    made = Place(tmp_path)
    yield made
    await made.engine.close()


async def test_a_release_is_fetched_verified_and_served(place: Place) -> None:
    channel = place.repository.publish(place.bundles[1])
    serving = await place.endpoint.update("heart", place.courier)
    assert (serving.state, serving.version, serving.digest) == ("live", 1, channel.digest)
    assert place.endpoint.serving() == (serving,)
    assert await place.answer() == 1.0


async def test_a_new_release_replaces_it_and_a_rollback_brings_it_back(place: Place) -> None:
    for version in (1, 2):
        place.repository.publish(place.bundles[version])
        await place.endpoint.update("heart", place.courier)
        assert await place.answer() == version
    place.repository.rollback("heart")
    assert (await place.endpoint.update("heart", place.courier)).version == 1
    assert await place.answer() == 1.0


async def test_a_tampered_release_is_refused_and_the_old_one_served_on(place: Place) -> None:
    place.repository.publish(place.bundles[1])
    await place.endpoint.update("heart", place.courier)
    place.repository.publish(place.bundles[2])
    for blob in (place.repository.folder / "blobs").iterdir():
        place.courier.lies[blob.name] = blob.read_bytes() + b"!"
    with pytest.raises(Untrusted):
        await place.endpoint.update("heart", place.courier)
    assert [s.version for s in place.endpoint.serving()] == [1]
    assert await place.answer() == 1.0


async def test_an_unsigned_release_is_refused(place: Place) -> None:
    place.repository.publish(place.bundles[1])
    forger = Repository.create(place.folder / "forger")
    forger.publish(place.bundles[1])
    with pytest.raises(Untrusted, match="signature"):
        await place.endpoint.update("heart", Courier(forger))
    assert place.endpoint.serving() == ()


async def test_rolled_back_metadata_are_refused(place: Place) -> None:
    place.repository.publish(place.bundles[1])
    old = place.repository.file("timestamp.json").read_bytes()
    place.repository.publish(place.bundles[2])
    await place.endpoint.update("heart", place.courier)
    place.courier.lies["timestamp.json"] = old
    with pytest.raises(Untrusted, match="older"):
        await place.endpoint.update("heart", place.courier)
    assert await place.answer() == 2.0


async def test_a_release_that_answers_differently_here_is_refused(place: Place) -> None:
    bundle = place.folder / "odd"
    write_bundle(bundle, version=3, golden_error=0.5)
    place.repository.publish(place.bundles[1])
    await place.endpoint.update("heart", place.courier)
    place.repository.publish(bundle)
    with pytest.raises(Untrusted, match="golden"):
        await place.endpoint.update("heart", place.courier)
    assert await place.answer() == 1.0


async def test_with_the_cable_cut_what_is_served_stays(place: Place) -> None:
    place.repository.publish(place.bundles[1])
    await place.endpoint.update("heart", place.courier)
    place.courier.cut = True
    with pytest.raises(Unreachable):
        await place.endpoint.update("heart", place.courier)
    assert await place.answer() == 1.0


async def test_a_site_that_starts_without_the_coordinator_serves_its_shelf(place: Place) -> None:
    place.repository.publish(place.bundles[2])
    await place.endpoint.update("heart", place.courier)
    alone = Engine(Shelf(place.site / "shelf"))
    try:
        [serving] = await alone.refresh()
        assert (serving.state, serving.version) == ("live", 2)
    finally:
        await alone.close()


async def test_a_model_nobody_published_is_said(place: Place) -> None:
    with pytest.raises(ConfigError, match="no release of 'heart' is published"):
        await place.endpoint.update("heart", place.courier)
