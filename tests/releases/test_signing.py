from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedml import durable
from fedml.errors import ConfigError, Untrusted
from fedml.releases.manifest import MANIFEST
from fedml.releases.signing import Repository
from tests.bundles import write_bundle
from tests.releases.offices import Office


class Cut(BaseException):
    """The power goes."""


def cut_power_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let so many files be written, then stop the process's world."""
    real, left = durable.replace, [writes]

    def replace(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if not left[0]:
            raise Cut
        left[0] -= 1
        real(path, data, mode=mode)

    monkeypatch.setattr(durable, "replace", replace)


def test_private_keys_are_for_the_owner_only(tmp_path: Path) -> None:
    Repository.create(tmp_path)
    keys = list((tmp_path / "keys").iterdir())
    assert len(keys) == 4
    assert all(key.stat().st_mode & 0o777 == 0o600 for key in keys)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_creating_twice_is_refused(tmp_path: Path) -> None:
    Repository.create(tmp_path)
    with pytest.raises(ConfigError, match="already holds"):
        Repository.create(tmp_path)
    with pytest.raises(ConfigError, match="holds no release repository"):
        Repository(tmp_path / "elsewhere")


def test_publishing_the_same_bundle_again_changes_nothing(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "r")
    write_bundle(tmp_path / "b")
    first = repository.publish(tmp_path / "b")
    assert repository.publish(tmp_path / "b") == first
    assert Repository(tmp_path / "r").channel("heart") == first


def test_a_version_is_never_published_with_other_contents(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "r")
    write_bundle(tmp_path / "b")
    repository.publish(tmp_path / "b")
    write_bundle(tmp_path / "other", factor=2)
    with pytest.raises(ConfigError, match="never used twice"):
        repository.publish(tmp_path / "other")


def test_a_damaged_bundle_is_not_signed(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "r")
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(b"other")
    with pytest.raises(Untrusted):
        repository.publish(tmp_path / "b")
    assert repository.channel("heart") is None


def test_rollback_goes_one_further_back_each_time_and_says_when_it_cannot(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "r")
    with pytest.raises(ConfigError, match="nothing of 'heart'"):
        repository.rollback("heart")
    for version in (1, 2, 3):
        write_bundle(tmp_path / f"{version}", version=version)
        repository.publish(tmp_path / f"{version}")
    found = [repository.rollback("heart") for _ in range(2)]
    assert [(c.rev, c.version) for c in found] == [(4, 2), (5, 1)]
    with pytest.raises(ConfigError, match="before 1"):
        repository.rollback("heart")
    assert repository.rollback("heart", 3).version == 3
    with pytest.raises(ConfigError, match="release 9"):
        repository.rollback("heart", 9)


@pytest.mark.parametrize(
    "name",
    [
        "../keys/root.pem",
        "/etc/passwd",
        "channels/../../keys/x.json",
        "keys",
        "",
        "1.root.json/../../keys",
        "0.root.json",
        "timestamp.json\n",
        "99.snapshot.json",
        "channels/" + "a" * 64 + ".heart.json",
    ],
)
def test_only_published_files_are_handed_out(tmp_path: Path, name: str) -> None:
    repository = Repository.create(tmp_path)
    (tmp_path / "keys" / "root.pem").write_bytes(b"secret")
    with pytest.raises(ConfigError, match="no release file"):
        repository.file(name)
    with pytest.raises(ConfigError, match="no release file"):
        repository.blob(name)


def test_power_loss_at_any_write_leaves_a_state_that_sites_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut the power before the 1st, 2nd, ... file of a publication; each time a site goes on."""
    Repository.create(tmp_path / "r")
    write_bundle(tmp_path / "b1")
    office = Office(tmp_path, Repository(tmp_path / "r"))
    office.repository.publish(tmp_path / "b1")
    write_bundle(tmp_path / "b2", version=2, factor=2)
    for writes in range(20):
        with monkeypatch.context() as patch:
            cut_power_after(patch, writes)
            try:
                office.repository.publish(tmp_path / "b2")
                done = True
            except Cut:
                done = False
        office.repository = Repository(tmp_path / "r")
        assert office.site().obtain("heart").name == ("2" if done else "1")
        if done:
            break
    assert writes == 4  # channel, targets, snapshot, timestamp


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_power_loss_during_a_key_rotation_is_mended_on_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    repository = Repository.create(tmp_path / "r")
    office = Office(tmp_path, repository)
    write_bundle(tmp_path / "b1")
    repository.publish(tmp_path / "b1")
    site = office.site(root=repository.root())
    site.refresh()
    for writes in range(5):
        with monkeypatch.context() as patch:
            cut_power_after(patch, writes)
            with pytest.raises(Cut):
                Repository(tmp_path / "r").rotate(role)  # type: ignore[arg-type]
        office.repository = Repository(tmp_path / "r")
        site.refresh()
        assert site.obtain("heart").name == "1"


def test_a_full_disk_leaves_the_open_repository_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository.create(tmp_path / "r")
    write_bundle(tmp_path / "b1")
    with monkeypatch.context() as patch:
        cut_power_after(patch, 2)
        with pytest.raises(Cut):
            repository.publish(tmp_path / "b1")
    assert repository.channel("heart") is None
    assert repository.publish(tmp_path / "b1").rev == 1
    assert Office(tmp_path, repository).site().obtain("heart").name == "1"


def test_a_missing_root_key_is_named_when_it_must_sign(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path)
    safe = {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    for name in safe:
        os.remove(tmp_path / "keys" / name)
    with pytest.raises(ConfigError, match="is not here; bring it back"):
        repository.rotate("root")
    for name, data in safe.items():
        (tmp_path / "keys" / name).write_bytes(data)
    repository.rotate("root")


def test_blobs_are_the_bundles_files(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "r")
    manifest = write_bundle(tmp_path / "b")
    repository.publish(tmp_path / "b")
    data = repository.blob(manifest.digest).read_bytes()
    assert data == (tmp_path / "b" / MANIFEST).read_bytes()
