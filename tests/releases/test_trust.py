from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedml.errors import ConfigError, Unreachable, Untrusted
from fedml.protocol.messages import Blob
from fedml.releases.manifest import open_bundle
from fedml.releases.signing import Lifetimes, Repository, Role
from fedml.releases.trust import Trust
from tests.bundles import write_bundle
from tests.releases.offices import Office


@pytest.fixture
def office(tmp_path: Path) -> Office:
    office = Office(tmp_path, Repository.create(tmp_path / "repository"))
    write_bundle(tmp_path / "b1")
    office.repository.publish(tmp_path / "b1")
    return office


def publish(office: Office, version: int) -> None:
    folder = office.folder / f"b{version}"
    write_bundle(folder, version=version, factor=version)
    office.repository.publish(folder)


def test_a_site_gets_the_published_release_whole(office: Office) -> None:
    site = office.site()
    folder = site.obtain("heart")
    channel = site.current("heart")
    assert channel is not None
    assert (channel.rev, channel.version) == (1, 1)
    assert open_bundle(folder, channel.digest) == write_bundle(office.folder / "again")


def test_nothing_is_fetched_twice(office: Office) -> None:
    site = office.site()
    site.obtain("heart")
    office.asked.clear()
    site.refresh()
    site.obtain("heart")
    fetched = [name for name in office.asked if not name.startswith("channels/")]
    assert sorted(fetched) == ["2.root.json", "timestamp.json"]


def test_a_site_follows_to_new_versions_and_back(office: Office) -> None:
    site = office.site()
    site.obtain("heart")
    publish(office, 2)
    site.refresh()
    channel = site.current("heart")
    assert channel and (channel.rev, channel.version) == (2, 2)
    office.repository.rollback("heart")
    site.refresh()
    channel = site.current("heart")
    assert channel and (channel.rev, channel.version) == (3, 1)
    assert site.obtain("heart").name == "1"


def test_a_model_without_a_release_has_no_channel(office: Office) -> None:
    site = office.site()
    assert site.current("lungs") is None
    with pytest.raises(ConfigError, match="no release of 'lungs'"):
        site.obtain("lungs")
    with pytest.raises(ConfigError):
        site.current("../heart")


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_sites_follow_a_key_rotation(office: Office, role: Role) -> None:
    root = office.repository.root()
    site, keys = office.site(root=root), office.repository.folder / "keys"
    site.obtain("heart")
    before = set(keys.iterdir())
    office.repository.rotate(role)
    assert len(set(keys.iterdir()) - before) == 1
    assert len(before - set(keys.iterdir())) == 1
    publish(office, 2)
    site.refresh()
    assert site.obtain("heart").name == "2"
    newcomer = office.site("newcomer", root)  # enrolled with the old root
    assert newcomer.obtain("heart").name == "2"


def test_trust_outlives_the_process(office: Office) -> None:
    old = office.state()
    publish(office, 2)
    office.site().obtain("heart")
    office.lies["timestamp.json"] = old("timestamp.json")
    with pytest.raises(Untrusted, match="older"):
        office.site().refresh()


def test_a_coordinator_that_cannot_be_reached_is_no_breach(office: Office) -> None:
    def fetch(name: str, limit: int) -> bytes:
        raise Unreachable("no route to the coordinator")

    def download(blob: Blob) -> Path:
        raise Unreachable("no route to the coordinator")

    with pytest.raises(Unreachable):
        Trust(office.folder / "site", office.repository.root(), fetch, download).refresh()
    site = Trust(office.folder / "site", office.repository.root(), office.fetch, download)
    with pytest.raises(Unreachable):
        site.obtain("heart")
    assert office.site().obtain("heart").name == "1"


def test_expired_metadata_stop_updates_until_they_are_signed_anew(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    old = Repository.create(tmp_path / "r", clock=lambda: now - timedelta(days=8))
    write_bundle(tmp_path / "b1")
    old.publish(tmp_path / "b1")
    office = Office(tmp_path, old)
    with pytest.raises(Untrusted, match="expired; updates wait"):
        office.site().refresh()
    office.repository = Repository(tmp_path / "r")
    office.repository.refresh()
    assert office.site().obtain("heart").name == "1"


def test_refresh_renews_each_role_at_half_its_life(tmp_path: Path) -> None:
    day = 0.0
    start = datetime.now(UTC)
    repository = Repository.create(tmp_path, Lifetimes(), clock=lambda: start + timedelta(days=day))
    counts = []
    for day in range(400):  # noqa: B007 - the clock reads it
        repository.refresh()
        counts.append(len(list((tmp_path / "metadata").glob("*.root.json"))))
    metadata = tmp_path / "metadata"
    assert counts[182] == 1 and counts[183] == 2 and counts[-1] == 3
    assert len(list(metadata.glob("*.targets.json"))) == 1 + 399 // 46
    assert (metadata / "timestamp.json").stat().st_size < 1000


def test_two_threads_may_ask_at_once(office: Office) -> None:
    site = office.site()
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(site.obtain("heart"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
