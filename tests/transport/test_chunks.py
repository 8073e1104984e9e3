"""A blob in the store is whole, verified and on the disk, or it is not there."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError, Refused, Unreachable, Untrusted
from fedml.protocol.messages import Blob
from fedml.protocol.requests import Chunk
from fedml.transport import flow
from fedml.transport.chunks import BlobStore, Intake

DATA = bytes(range(256)) * 100
BLOB = Blob(hashlib.sha256(DATA).hexdigest(), len(DATA))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", 10**6)


def test_bytes_and_files_are_stored_under_their_digest(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    assert store.put_bytes(DATA) == store.put_file(tmp_path / "file") == BLOB
    assert store.put_bytes(DATA[:7], memoryview(DATA)[7:]) == BLOB
    assert store.path(BLOB.digest).read_bytes() == DATA
    with store.open(BLOB.digest) as file:
        assert file.read() == DATA
    assert store.size(BLOB.digest) == len(DATA)
    assert [path.name for path in store.folder.iterdir()] == [BLOB.digest]


def test_what_is_missing_is_told(store: BlobStore) -> None:
    other = Blob("0" * 64, 5)
    assert store.missing([other, BLOB]) == [other, BLOB]
    store.put_bytes(DATA)
    assert store.missing([other, BLOB]) == [other]
    store.delete(BLOB.digest)
    store.delete(BLOB.digest)
    assert not store.has(BLOB.digest)
    with pytest.raises(Refused, match="is not here"):
        store.open(BLOB.digest)


def test_a_digest_cannot_leave_the_folder(store: BlobStore) -> None:
    for digest in ("../secret", "", "A" * 64, "0" * 63 + "/"):
        with pytest.raises(ConfigError, match="no SHA-256"):
            store.path(digest)
    with pytest.raises(ConfigError, match="owner"):
        store.receive(BLOB, "../other")


def test_a_blob_over_the_limit_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(10**6 + 1))
    with pytest.raises(Refused, match="limit 1000000"):
        store.put_bytes(bytes(10**6), b"x")
    with pytest.raises(Refused, match="limit 1000000"):
        store.put_file(tmp_path / "big")
    with pytest.raises(Refused, match="has 1000001 bytes, limit 1000000"):
        store.receive(Blob("0" * 64, 10**6 + 1))
    assert not any(store.folder.iterdir())


def test_a_missing_file_or_a_folder_that_cannot_be_is_a_setting_to_mend(
    store: BlobStore, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        store.put_file(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file"):
        BlobStore(tmp_path / "file", 10)


@settings(max_examples=50)
@given(st.lists(st.integers(0, len(DATA)), max_size=6))
def test_pieces_of_any_size_with_restarts_anywhere_make_the_blob(
    tmp_path_factory: pytest.TempPathFactory, marks: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    ends = [*sorted(marks), len(DATA)]
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
        store = BlobStore(folder, 10**6)
        assert store.held(BLOB, "mercy") == start
        intake = store.receive(BLOB, "mercy")
        assert intake.offset == start
        intake.write(DATA[start:end])
        if number < len(ends):
            intake.close()
    intake.finish()
    assert BlobStore(folder, 10**6).path(BLOB.digest).read_bytes() == DATA
    assert len(list(folder.iterdir())) == 1


def test_a_blob_is_not_there_before_it_is_finished(store: BlobStore) -> None:
    intake = store.receive(BLOB)
    intake.write(DATA)
    assert not store.has(BLOB.digest)
    intake.finish()
    assert store.has(BLOB.digest)


def test_finishing_early_keeps_what_came(store: BlobStore) -> None:
    intake = store.receive(BLOB)
    intake.write(DATA[:10])
    with pytest.raises(Unreachable, match="10 of 25600 bytes came"):
        intake.finish()
    intake.close()
    assert store.held(BLOB) == 10


def test_a_wrong_byte_drops_the_part(store: BlobStore) -> None:
    intake = store.receive(BLOB)
    intake.write(b"x" + DATA[1:])
    with pytest.raises(Untrusted, match="the digest is wrong; dropped"):
        intake.finish()
    assert not any(store.folder.iterdir())
    assert store.held(BLOB) == 0


def test_a_byte_too_many_drops_the_part(store: BlobStore) -> None:
    intake = store.receive(BLOB)
    intake.write(DATA)
    with pytest.raises(Untrusted, match="more than 25600 bytes"):
        intake.write(b"x")
    assert not any(store.folder.iterdir())


def test_a_part_longer_than_the_blob_is_begun_anew(store: BlobStore) -> None:
    (store.folder / f"{BLOB.digest}.mercy.part").write_bytes(bytes(len(DATA) + 1))
    assert store.held(BLOB, "mercy") == 0
    intake = store.receive(BLOB, "mercy")
    assert intake.offset == 0
    intake.close()


def test_a_stored_blob_of_another_size_is_untrusted(store: BlobStore) -> None:
    store.put_bytes(DATA)
    with pytest.raises(Untrusted, match="has 25600 bytes, not 5"):
        store.receive(Blob(BLOB.digest, 5))


def test_one_owners_garbage_does_not_touch_anothers_part(store: BlobStore) -> None:
    honest, liar = store.receive(BLOB, "mercy"), store.receive(BLOB, "mallory")
    honest.write(DATA[:100])
    liar.write(bytes(len(DATA)))
    with pytest.raises(Untrusted):
        liar.finish()
    honest.write(DATA[100:])
    honest.finish()
    assert store.has(BLOB.digest)


def test_the_same_blob_from_two_owners_is_kept_once(store: BlobStore) -> None:
    first, second = store.receive(BLOB, "mercy"), store.receive(BLOB, "charite")
    for intake in (first, second):
        intake.write(DATA)
    for intake in (first, second):
        intake.finish()
        intake.finish()
    assert [path.name for path in store.folder.iterdir()] == [BLOB.digest]


def test_a_sweep_keeps_what_is_named_and_its_parts(store: BlobStore) -> None:
    kept, gone = store.put_bytes(b"kept"), store.put_bytes(b"gone")
    for blob, data in ((BLOB, DATA[:9]), (Blob("0" * 64, 50), b"part")):
        intake = store.receive(blob, "mercy")
        intake.write(data)
        intake.close()
    (store.folder / ".abc.draft").write_bytes(b"left by a crash")
    assert store.sweep({kept.digest, BLOB.digest}) == 4 + 4 + 15
    assert store.has(kept.digest)
    assert not store.has(gone.digest)
    assert store.held(BLOB, "mercy") == 9


def test_what_came_survives_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fedml.transport.chunks import BlobStore; from fedml.protocol.messages import Blob\n"
        f"intake = BlobStore(Path(sys.argv[1]), 10**6).receive(Blob({BLOB.digest!r}, 25600), 'a')\n"
        "intake.write((bytes(range(256)) * 100)[:1000])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    store = BlobStore(tmp_path, 10**6)
    assert store.held(BLOB, "a") == 1000
    intake = store.receive(BLOB, "a")
    intake.write(DATA[1000:])
    intake.finish()
    assert store.has(BLOB.digest)


def test_a_disk_that_takes_no_more_is_said_and_what_came_is_kept(store: BlobStore) -> None:
    intake = store.receive(BLOB)
    intake.write(DATA[:1000])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(ConfigError, match="File too large; free space"):
            intake.write(DATA[1000:])
        intake.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    again = store.receive(BLOB)
    assert again.offset == 2000
    again.write(DATA[2000:])
    again.finish()
    assert store.has(BLOB.digest)


async def test_what_a_cut_transfer_still_wrote_is_heeded(tmp_path: Path) -> None:
    """A newer transfer took over while the old one was writing: its error is nobody's bug."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    going, gate = threading.Event(), threading.Event()

    class Slow:
        blob, offset = Blob("0" * 64, 10), 0

        def write(self, *pieces: bytes) -> None:
            going.set()
            gate.wait(20)
            raise Unreachable("a newer transfer took over")

        def close(self) -> None:
            pass

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(b"12345")
        await asyncio.sleep(60)

    taking = asyncio.create_task(flow.catch(chunks(), cast(Intake, Slow())))
    await asyncio.to_thread(going.wait, 20)
    taking.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await taking
    del taking
    gc.collect()
    await asyncio.sleep(0)
    assert not complaints
