"""What a parent releases reaches leaves through their region, under the parent's signatures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedml.errors import Unreachable, Untrusted
from fedml.protocol.messages import Blob, ReleaseNotice, SiteId
from fedml.protocol.messages import Serving as Served
from fedml.releases.manifest import MODEL, fingerprint
from fedml.releases.signing import Repository
from fedml.releases.trust import Trust
from fedml.transport.chunks import BlobStore
from fedml.transport.fetching import Fetching, first_root
from tests.bundles import write_bundle
from tests.coordinator.tree import Tree, tree
from tests.coordinator.world import Site

LEAVES = {"north": ("bern", "oslo")}


@pytest.fixture
async def grown(tmp_path: Path) -> AsyncIterator[Tree]:
    async with tree(tmp_path, LEAVES) as a_tree:
        yield a_tree


def releases(grown: Tree) -> Repository:
    return grown.hub.releases


def write(grown: Tree, version: int) -> Path:
    folder = grown.folder / f"b{version}"
    if not folder.exists():
        write_bundle(folder, version=version, factor=version)
    return folder


def release(grown: Tree, version: int) -> None:
    """Publish a version of "heart" at the parent, which tells its sites."""
    releases(grown).publish(write(grown, version))
    grown.hub.runs.desk.announce("heart")


async def obtain(grown: Tree, leaf: Site, root: bytes | None = None) -> int:
    """Have a leaf look, as its endpoint does; return which version it got."""
    place = grown.folder / "leaf" / leaf.name
    store = BlobStore(place / "files", 2**24)
    calls = Fetching(leaf.link, asyncio.get_running_loop(), store)
    trust = Trust(place, root or releases(grown).root(), calls.fetch, calls.download)

    def look() -> int:
        trust.refresh()
        return int(trust.obtain("heart").name)

    return await asyncio.to_thread(look)


async def told(leaf: Site) -> str:
    return (await leaf.next(ReleaseNotice)).model


def mirrored(grown: Tree) -> Path:
    return grown.places["north"].path / "parent" / "releases"


def blobs(grown: Tree) -> set[str]:
    return {path.name for path in (mirrored(grown) / "blobs").iterdir()}


async def test_a_release_reaches_leaves_and_the_parent_hears_what_they_serve(grown: Tree) -> None:
    release(grown, 1)
    for leaf in grown.leaves.values():
        assert await told(leaf) == "heart"
        assert await first_root(leaf.link) == releases(grown).file("1.root.json").read_bytes()
        assert await obtain(grown, leaf) == 1
        await leaf.send(Served("heart", 1, "0" * 64, "live"))

    def serving() -> dict[SiteId, list[int]]:
        infos = grown.hub.runs.desk.sites()
        return {info.site: [s.version for s in info.serving] for info in infos if info.region}

    await grown.until(lambda: serving() == {"bern": [1], "oslo": [1]})
    release(grown, 2)
    assert await told(grown.leaves["bern"]) == "heart"
    assert await obtain(grown, grown.leaves["bern"]) == 2
    releases(grown).rollback("heart")
    grown.hub.runs.desk.announce("heart")
    assert await told(grown.leaves["bern"]) == "heart"
    assert await obtain(grown, grown.leaves["bern"]) == 1


async def test_a_region_without_its_parent_serves_what_it_has_to_whoever_comes(
    grown: Tree,
) -> None:
    release(grown, 1)
    await told(grown.leaves["bern"])
    north = grown.places["north"]
    await north.crash()
    north.start(grown.hub)
    await north.cable.cut()
    late = await Site(grown.folder, "riga").connect(north)
    assert await told(late) == "heart"
    assert await obtain(grown, late) == 1


async def test_a_region_that_was_away_has_what_was_released_meanwhile(grown: Tree) -> None:
    north = grown.places["north"]
    await north.crash()
    release(grown, 1)
    release(grown, 2)
    north.start(grown.hub)
    late = await Site(grown.folder, "riga").connect(north)
    assert await told(late) == "heart"
    assert await obtain(grown, late) == 2


async def test_what_the_last_two_states_need_is_kept_and_no_more(grown: Tree) -> None:
    """A leaf may still be at what it saw last."""
    models = []
    for version in (1, 2, 3):
        release(grown, version)
        await told(grown.leaves["bern"])
        models.append(fingerprint(write(grown, version) / MODEL).digest)
    assert len(set(models)) == 3
    assert set(models[1:]) <= blobs(grown)
    assert models[0] not in blobs(grown)
    north = grown.places["north"]
    await north.crash()
    north.start(grown.hub)
    assert models[2] in blobs(grown)
    assert models[1] not in blobs(grown)


# --- attacks and mishaps ------------------------------------------------------------------------


async def test_a_region_that_changes_a_model_is_not_believed(grown: Tree) -> None:
    release(grown, 1)
    leaf = grown.leaves["bern"]
    await told(leaf)
    path = mirrored(grown) / "blobs" / fingerprint(write(grown, 1) / MODEL).digest
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(Untrusted):
        await obtain(grown, leaf)


async def test_a_region_that_signs_for_itself_is_not_believed(grown: Tree) -> None:
    release(grown, 1)
    leaf, north = grown.leaves["bern"], grown.places["north"]
    await told(leaf)
    north.folder.releases.publish(write(grown, 2))
    forged = north.folder.releases.file("timestamp.json").read_bytes()
    (mirrored(grown) / "metadata" / "timestamp.json").write_bytes(forged)
    with pytest.raises(Untrusted, match="key this site does not trust"):
        await obtain(grown, leaf)


async def test_a_region_refuses_what_its_parent_did_not_sign(grown: Tree) -> None:
    """And leaves keep what they have, whole."""
    release(grown, 1)
    leaf, north = grown.leaves["bern"], grown.places["north"]
    await told(leaf)
    releases(grown).publish(write(grown, 2))
    path = releases(grown).blob(fingerprint(write(grown, 2) / MODEL).digest)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"!")
    with pytest.raises(Untrusted):
        await north.region.mirror.follow("heart")
    assert await obtain(grown, leaf) == 1
    path.write_bytes(good)
    await north.region.mirror.follow("heart")
    assert await obtain(grown, leaf) == 2


@pytest.mark.parametrize("step", range(1, 12))
async def test_a_line_that_dies_at_any_step_leaves_what_leaves_see_whole(
    grown: Tree, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    release(grown, 1)
    leaf, north = grown.leaves["bern"], grown.places["north"]
    await told(leaf)
    releases(grown).publish(write(grown, 2))
    fetch, download, steps = north.cable.fetch, north.cable.download, iter(range(1, 1000))

    async def dying_fetch(name: str, limit: int) -> bytes:
        if next(steps) == step:
            raise Unreachable("cut")
        return await fetch(name, limit)

    async def dying_download(blob: Blob, into: BlobStore) -> None:
        if next(steps) == step:
            raise Unreachable("cut")
        await download(blob, into)

    monkeypatch.setattr(north.cable, "fetch", dying_fetch)
    monkeypatch.setattr(north.cable, "download", dying_download)
    try:
        await north.region.mirror.follow("heart")
    except Unreachable:
        assert await obtain(grown, leaf) == 1
        await north.crash()
        north.start(grown.hub)
        await leaf.connect(north)
        await north.region.mirror.follow("heart")
    else:
        assert next(steps) <= step  # there are no more steps than that
    assert await obtain(grown, leaf) == 2


async def test_the_newest_signatures_of_the_parent_are_had_without_a_release(grown: Tree) -> None:
    release(grown, 1)
    leaf, north = grown.leaves["bern"], grown.places["north"]
    await told(leaf)
    before = await leaf.link.fetch("timestamp.json", 10**6)
    releases(grown).rotate("timestamp")
    await north.region.mirror.follow()
    assert await leaf.link.fetch("timestamp.json", 10**6) != before
    assert await obtain(grown, leaf) == 1
