"""A store for blobs on their way skips fsync, which is safe only because it starts empty."""

import os
from pathlib import Path

import pytest

from fedml.transport.chunks import BlobStore

LIMIT = 1000


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each fsync."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


def test_what_an_earlier_owner_left_is_gone_at_the_start(tmp_path: Path) -> None:
    earlier = BlobStore(tmp_path, LIMIT)
    whole = earlier.put_bytes(b"whole")
    half = earlier.put_bytes(b"half")
    earlier.path(half.digest).write_bytes(b"")  # as power loss leaves what was not fsynced
    later = BlobStore.in_transit(tmp_path, LIMIT)
    assert not later.has(whole.digest)
    assert not later.has(half.digest)
    assert list(tmp_path.iterdir()) == []


def test_blobs_in_transit_wait_for_no_disk(tmp_path: Path, synced: list[int]) -> None:
    store = BlobStore.in_transit(tmp_path, LIMIT)
    synced.clear()
    blob = store.put_bytes(b"model")
    store.delete(blob.digest)
    intake = store.receive(blob, "bern")
    intake.write(b"model")
    intake.finish()
    assert store.path(blob.digest).read_bytes() == b"model"
    assert synced == []


def test_blobs_that_shall_last_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, synced: list[int]
) -> None:
    store = BlobStore(tmp_path, LIMIT)
    blob = store.put_bytes(b"model")
    assert len(synced) == 2  # the bytes, then the name
    store.delete(blob.digest)
    synced.clear()
    intake = store.receive(blob)
    intake.write(b"model")
    intake.finish()
    assert len(synced) == 2


def test_deleting_a_blob_takes_its_parts_and_no_others(tmp_path: Path) -> None:
    store = BlobStore.in_transit(tmp_path, LIMIT)
    gone, kept = store.put_bytes(b"gone"), store.put_bytes(b"kept")
    for blob in (gone, kept):
        store.delete(blob.digest)
        store.receive(blob, "bern").close()
    store.put_bytes(b"gone")
    store.delete(gone.digest)
    assert [path.name for path in tmp_path.iterdir()] == [f"{kept.digest}.bern.part"]


def test_a_part_that_an_earlier_store_left_goes_with_its_blob(tmp_path: Path) -> None:
    blob = BlobStore(tmp_path, LIMIT).put_bytes(b"half of it")
    (tmp_path / blob.digest).unlink()
    BlobStore(tmp_path, LIMIT).receive(blob, "bern").close()
    BlobStore(tmp_path, LIMIT).delete(blob.digest)
    assert list(tmp_path.iterdir()) == []


def test_deleting_one_blob_of_many_looks_at_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore.in_transit(tmp_path, LIMIT)
    blobs = [store.put_bytes(bytes([number])) for number in range(20)]

    def listed(path: object = ".") -> list[str]:
        raise AssertionError(f"{path} was listed")

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", listed)
        patched.setattr(os, "scandir", listed)
        for blob in blobs:
            store.delete(blob.digest)
    assert list(tmp_path.iterdir()) == []
