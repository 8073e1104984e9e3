"""What a coordinator's thief, a hostile mirror or a meddler on the way may try with a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from fedml.errors import ConfigError, Untrusted
from fedml.releases.manifest import MANIFEST, MODEL, Channel, Manifest
from fedml.releases.session import rehearse
from fedml.releases.shelf import Shelf
from fedml.releases.signing import Repository
from tests.bundles import write_bundle
from tests.releases.offices import Office


@pytest.fixture
def office(tmp_path: Path) -> Office:
    office = Office(tmp_path, Repository.create(tmp_path / "repository"))
    publish(office, 1)
    return office


def publish(office: Office, version: int) -> Manifest:
    folder = office.folder / f"b{version}"
    manifest = write_bundle(folder, version=version, factor=version)
    office.repository.publish(folder)
    return manifest


def test_tampered_weights(office: Office) -> None:
    manifest = publish(office, 2)
    blob = manifest.files[MODEL]
    data = bytearray(office.repository.blob(blob.digest).read_bytes())
    data[-1] ^= 1
    office.lies[blob.digest] = bytes(data)
    site = office.site()
    with pytest.raises(Untrusted, match="not the one that was signed"):
        site.obtain("heart")
    office.lies.clear()
    assert site.obtain("heart").name == "2"  # nothing of the attack stays behind


def test_a_file_that_never_ends(office: Office) -> None:
    digest = office.repository.channel("heart").digest  # type: ignore[union-attr]
    data = office.repository.blob(digest).read_bytes()
    office.lies[digest] = data + b" "
    with pytest.raises(Untrusted, match="not the one that was signed"):
        office.site().obtain("heart")


def test_tampered_metadata(office: Office) -> None:
    name = "2.targets.json"
    data = office.repository.file(name).read_bytes()
    for where in (0, len(data) // 2, len(data) - 1):
        office.lies[name] = data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]
        with pytest.raises(Untrusted, match="not the one that was signed"):
            office.site().refresh()


def test_metadata_that_are_no_metadata(office: Office) -> None:
    for junk in (b"", b"{}", b"[]", b"\xff\xfe", b'{"signed": {}}', b"[" * 10_000):
        office.lies["timestamp.json"] = junk
        with pytest.raises(Untrusted):
            office.site().refresh()
    office.lies["timestamp.json"] = None
    with pytest.raises(Untrusted, match="no timestamp"):
        office.site().refresh()


def test_endless_metadata(office: Office) -> None:
    office.lies["timestamp.json"] = b" " * 100_000
    with pytest.raises(Untrusted, match="longer"):
        office.site().refresh()


def test_rolled_back_metadata(office: Office) -> None:
    old = office.state()
    publish(office, 2)
    site = office.site()
    site.refresh()
    office.lies["timestamp.json"] = old("timestamp.json")
    with pytest.raises(Untrusted, match="older than"):
        site.refresh()


def test_frozen_metadata_end_with_their_lifetime(tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    then = datetime.now(UTC) - timedelta(days=7, minutes=1)
    office = Office(tmp_path, Repository.create(tmp_path / "r", clock=lambda: then))
    with pytest.raises(Untrusted, match="expired"):
        office.site().refresh()


def test_metadata_without_a_signature(office: Office) -> None:
    raw = json.loads(office.repository.file("timestamp.json").read_bytes())
    raw["signatures"] = []
    office.lies["timestamp.json"] = json.dumps(raw).encode()
    with pytest.raises(Untrusted, match="key this site does not trust"):
        office.site().refresh()


def test_a_whole_repository_signed_by_someone_else(office: Office) -> None:
    root = office.repository.root()
    stranger = Office(office.folder / "s", Repository.create(office.folder / "stranger"))
    write_bundle(office.folder / "evil", factor=666)
    stranger.repository.publish(office.folder / "evil")
    with pytest.raises(Untrusted, match="key this site does not trust"):
        stranger.site(root=root).refresh()


def test_a_root_that_the_old_root_did_not_sign(office: Office) -> None:
    root = office.repository.root()
    stranger = Repository.create(office.folder / "stranger")
    stranger.rotate("root")
    office.lies["2.root.json"] = stranger.file("2.root.json").read_bytes()
    with pytest.raises(Untrusted, match="key this site does not trust"):
        office.site(root=root).refresh()


def test_metadata_of_two_states_mixed(office: Office) -> None:
    """Fresh timestamp and snapshot, with the targets of before."""
    old = office.state()
    publish(office, 2)
    office.lies["3.targets.json"] = old("2.targets.json")
    with pytest.raises(Untrusted):
        office.site().refresh()


def sign_targets(repository: Repository, change: object) -> None:
    """What someone with the coordinator's online keys can sign."""
    with repository._whole():
        change(repository._targets.signed)  # type: ignore[operator]
        repository._commit()


def test_a_release_mixed_from_two_with_stolen_keys(office: Office) -> None:
    """Properly signed targets whose files are not those of the manifest."""
    publish(office, 2)

    def mix(targets: Targets) -> None:
        files = targets.targets
        files[f"models/heart/2/{MODEL}"].hashes = files[f"models/heart/1/{MODEL}"].hashes
        files[f"models/heart/2/{MODEL}"].length = files[f"models/heart/1/{MODEL}"].length

    sign_targets(office.repository, mix)
    with pytest.raises(Untrusted, match="manifest and signature name different files"):
        office.site().obtain("heart")


def test_a_manifest_swapped_with_stolen_keys(office: Office) -> None:
    publish(office, 2)

    def swap(targets: Targets) -> None:
        files = targets.targets
        files[f"models/heart/2/{MANIFEST}"].hashes = files[f"models/heart/1/{MANIFEST}"].hashes
        files[f"models/heart/2/{MANIFEST}"].length = files[f"models/heart/1/{MANIFEST}"].length

    sign_targets(office.repository, swap)
    with pytest.raises(Untrusted, match="the channel names release"):
        office.site().obtain("heart")


def channel_to(office: Office, channel: Channel) -> None:
    """Sign a channel of the thief's choice."""
    from tuf.api.metadata import TargetFile

    data = channel.encode()
    target = TargetFile.from_data("channels/heart.json", data, ["sha256"])
    path = office.repository.folder / "targets" / target.get_prefixed_paths()[0]
    path.write_bytes(data)
    sign_targets(office.repository, lambda targets: targets.targets.update({target.path: target}))


def test_a_channel_whose_rev_falls_with_stolen_keys(office: Office) -> None:
    publish(office, 2)
    site = office.site()
    now = site.current("heart")
    old = write_bundle(office.folder / "b1")
    assert now
    for rev in (now.rev - 1, now.rev):
        channel_to(office, Channel("heart", rev, 1, old.digest))
        site.refresh()
        with pytest.raises(Untrusted, match="revs only go forward"):
            site.current("heart")


def test_another_models_release_in_this_ones_channel(office: Office) -> None:
    lungs = write_bundle(office.folder / "lungs", "lungs")
    office.repository.publish(office.folder / "lungs")
    channel_to(office, Channel("lungs", 9, 1, lungs.digest))
    with pytest.raises(Untrusted, match="channel of lungs"):
        office.site().current("heart")


def test_a_channel_that_vanishes(office: Office) -> None:
    site = office.site()
    site.current("heart")
    sign_targets(office.repository, lambda targets: targets.targets.pop("channels/heart.json"))
    site.refresh()
    with pytest.raises(Untrusted, match="gone"):
        site.current("heart")


def test_a_signed_release_that_answers_differently_is_not_activated(
    office: Office, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    site = office.site()
    shelf.add(site.obtain("heart"))
    shelf.activate("heart", 1, rehearse)
    write_bundle(tmp_path / "bad", version=2, golden_error=0.01)
    office.repository.publish(tmp_path / "bad")
    site.refresh()
    shelf.add(site.obtain("heart"))
    with pytest.raises(Untrusted, match="golden"):
        shelf.activate("heart", 2, rehearse)
    pointer = shelf.current("heart")
    assert pointer and pointer.current.version == 1


def test_a_golden_file_with_a_pickle_in_it(tmp_path: Path) -> None:
    import io

    import numpy as np

    with io.BytesIO() as file:
        np.savez(file, **{"input:input": np.array([object()], dtype=object)})  # type: ignore[arg-type]
        evil = file.getvalue()
    write_bundle(tmp_path, extra={})
    (tmp_path / "golden.npz").write_bytes(evil)
    from fedml.releases.session import read_golden

    with pytest.raises(Untrusted, match=r"npz"):
        read_golden(tmp_path / "golden.npz")


def test_a_damaged_repository_of_our_own_is_not_repaired_by_guessing(office: Office) -> None:
    folder = office.repository.folder
    metadata = Metadata[Targets].from_file(str(folder / "metadata" / "2.targets.json"))
    assert metadata.signed.version == 2
    (folder / "metadata" / "2.targets.json").write_bytes(b"{}")
    with pytest.raises((Untrusted, ConfigError), match="restore it from a backup"):
        Repository(folder)
