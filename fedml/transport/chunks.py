"""Blobs on disk, named by their digest: written whole or in resumable pieces, never half.

A name stands for verified bytes, or for nothing. What lasts is fsynced and named by SHA-256, as
what is signed; what is in transit only is named by BLAKE3, which is four times as quick, and not
fsynced. What has arrived of an unfinished blob lies beside it as a `.part` and survives a restart.
All calls block; callers on an event loop use a thread.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol
from weakref import WeakValueDictionary

from blake3 import blake3

from fedml import failpoints
from fedml.durable import failure, hasten, sync_folder
from fedml.errors import Refused, Unreachable, Untrusted
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.messages import Blob, check_digest, check_name

Piece = bytes | memoryview
_MUCH = 2**23  # bytes that are worth asking the disk to begin with


class _Hash(Protocol):
    def update(self, data: Piece, /) -> object: ...

    def hexdigest(self) -> str: ...


def transit_blob(path: Path) -> Blob:
    """Return a file's name in a store that is in transit; raises `OSError` as `open` does."""
    total, size = blake3(), 0
    with path.open("rb") as file:
        while piece := file.read(MAX_CHUNK):
            total.update(piece)
            size += len(piece)
    return Blob(total.hexdigest(), size)


class BlobStore:
    """A folder of blobs, each of at most `limit_bytes`."""

    _lasting = True  # survives power loss, so all is fsynced
    _begin: Callable[[], _Hash] = staticmethod(hashlib.sha256)

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._intakes: WeakValueDictionary[Path, Intake] = WeakValueDictionary()
        self._parts: dict[str, set[Path]] = {}  # what may be here of a blob, by its digest
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.part"):
                self._parts.setdefault(path.name.partition(".")[0], set()).add(path)

    @classmethod
    def in_transit(cls, folder: Path, limit_bytes: int) -> BlobStore:
        """Return an empty store in `folder` for blobs that its owner can ask for again.

        What an earlier owner left there is deleted, so nothing need be fsynced: after power loss
        no name can stand for half a blob.
        """
        store = cls(folder, limit_bytes)
        store._lasting, store._begin = False, blake3
        store.sweep(())
        return store

    def has(self, digest: str) -> bool:
        """True if the blob is here, whole and verified."""
        return self._place(digest).is_file()

    def missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        """Return those of `blobs` that are not here, in their order."""
        return [blob for blob in blobs if not self.has(blob.digest)]

    def path(self, digest: str) -> Path:
        """Return the blob's file, not to be written to; raises `Refused` if it is not here."""
        place = self._place(digest)
        if not place.is_file():
            raise Refused(f"blob {digest[:12]} is not here; it was deleted or never arrived")
        return place

    def size(self, digest: str) -> int:
        """Return the blob's length in bytes; raises `Refused` if it is not here."""
        return self.path(digest).stat().st_size

    def open(self, digest: str) -> BinaryIO:
        """Open the blob for reading; raises `Refused` if it is not here."""
        return self.path(digest).open("rb")

    def put_bytes(self, *pieces: bytes | memoryview) -> Blob:
        """Store `pieces` as one blob."""
        return self.put_pieces(pieces)

    def put_pieces(
        self, pieces: Iterable[Piece], digest: str = "", *, to_last: bool = False
    ) -> Blob:
        """Store as one blob what comes one after the other, for instance `params.pieces`.

        `digest` is theirs, if the caller has found it already. What is `to_last` will have a
        second name that does, so the disk may begin with it.
        """
        draft = self.folder / f".{secrets.token_hex(8)}.draft"
        total, size, begun = self._begin(), 0, 0
        try:
            with _disk(draft), draft.open("xb") as file:
                for piece in pieces:
                    size += len(piece)
                    if size > self.limit_bytes:
                        raise Refused(f"a blob of {size} bytes and more, limit {self.limit_bytes}")
                    if not digest:
                        total.update(piece)
                    file.write(piece)
                    if to_last and size - begun >= _MUCH:
                        hasten(file.fileno(), begun, size)
                        begun = size
                digest = digest or total.hexdigest()
                _settle(file, draft, self._place(digest), lasting=self._lasting)
        finally:
            draft.unlink(missing_ok=True)
        return Blob(digest, size)

    def put_file(self, path: Path) -> Blob:
        """Store a copy of the file at `path`."""
        with _disk(path), path.open("rb") as file:
            return self.put_pieces(iter(lambda: file.read(MAX_CHUNK), b""))

    def put_link(self, path: Path, blob: Blob) -> None:
        """Store the file at `path` under a second name; its bytes must not change any more.

        Raises `Untrusted` unless it is `blob`.
        """
        assert not self._lasting, "a name that lasts wants its bytes on the disk first"
        with _disk(path):
            if transit_blob(path) != blob:
                raise Untrusted(f"{path} changed after it was charged; refusing to send it")
            if not self.has(blob.digest):
                self._place(blob.digest).hardlink_to(path)

    def drop(self, digest: str) -> None:
        """Forget the blob; what arrives of an equal one may go on arriving."""
        with _disk(self.folder):
            self._place(digest).unlink(missing_ok=True)
            if self._lasting:
                sync_folder(self.folder)

    def abandon(self, digest: str, owner: str) -> None:
        """Forget what has arrived of an unfinished blob from `owner`, and take no more of it."""
        part = self._part(digest, owner)
        if older := self._intakes.pop(part, None):
            older.close()
        with _disk(part):
            part.unlink(missing_ok=True)

    def delete(self, digest: str) -> None:
        """Forget the blob and what has arrived of it; it need not be here."""
        with _disk(self.folder):
            self._place(digest).unlink(missing_ok=True)
            for path in self._parts.pop(digest, ()):  # a look at the folder is one at every blob
                path.unlink(missing_ok=True)
            if self._lasting:
                sync_folder(self.folder)

    def sweep(self, keep: Collection[str]) -> int:
        """Delete all but the digests in `keep` and their parts; return the bytes set free.

        Call it at start, while nothing else uses the store.
        """
        freed = 0
        with _disk(self.folder):
            for path in self.folder.iterdir():
                if path.name.startswith(".") or path.name.partition(".")[0] not in keep:
                    freed += path.stat().st_size
                    path.unlink()
            sync_folder(self.folder)
        return freed

    def held(self, blob: Blob, owner: str = "") -> int:
        """Return how many bytes of `blob` are here, so how far `owner` has come with it.

        An intake still open is ended, so that the answer stays true until the next one.
        Raises as `receive` does.
        """
        self._check(blob)
        if self.has(blob.digest):
            return blob.size
        part = self._part(blob.digest, owner)
        if older := self._intakes.pop(part, None):
            older.close()
        size = part.stat().st_size if part.is_file() else 0
        return size if size <= blob.size else 0

    def receive(self, blob: Blob, owner: str = "") -> Intake:
        """Begin or resume taking `blob` in; each `owner`'s pieces are kept apart.

        A newer intake of the same blob and owner ends the older one. Raises `Refused` if the
        blob is over the limit, `Untrusted` if it is here with another size.
        """
        self._check(blob)
        part = self._part(blob.digest, owner)
        if older := self._intakes.pop(part, None):
            older.close()
        self._parts.setdefault(blob.digest, set()).add(part)
        place = self._place(blob.digest)
        intake = Intake(blob, part, place, self._begin, lasting=self._lasting)
        self._intakes[part] = intake
        return intake

    def _check(self, blob: Blob) -> None:
        if blob.size > self.limit_bytes:
            raise Refused(
                f"blob {blob.digest[:12]} has {blob.size} bytes, limit {self.limit_bytes}"
            )
        if self.has(blob.digest) and self.size(blob.digest) != blob.size:
            raise Untrusted(
                f"blob {blob.digest[:12]} has {self.size(blob.digest)} bytes, not {blob.size}"
            )

    def _place(self, digest: str) -> Path:
        return self.folder / check_digest("blob", digest)

    def _part(self, digest: str, owner: str) -> Path:
        name = check_name("owner", owner) if owner else ""
        return self.folder / f"{check_digest('blob', digest)}.{name}.part"


class Intake:
    """A blob on its way in. `offset` is where the next byte goes; `close` keeps what has come."""

    def __init__(
        self, blob: Blob, part: Path, place: Path, begin: Callable[[], _Hash], *, lasting: bool
    ) -> None:
        self.blob, self._part, self._place, self._lasting = blob, part, place, lasting
        self._lock, self._begin = threading.Lock(), begin
        self._hash: _Hash | None = None
        self._file: BinaryIO | None = None
        self.offset = blob.size
        if place.is_file():
            return
        with _disk(part):
            self._file = part.open("a+b")
            if part.stat().st_size > blob.size:
                self._file.truncate(0)
            self.offset = part.stat().st_size

    def _total(self, file: BinaryIO) -> _Hash:
        """The running digest; the first time over what an earlier intake has left."""
        if self._hash is None:
            self._hash = self._begin()
            file.seek(0)
            while piece := file.read(MAX_CHUNK):
                self._hash.update(piece)
        return self._hash

    def write(self, *pieces: Piece) -> None:
        """Add the next bytes; raises `Untrusted` if they are more than were announced."""
        with self._lock:
            self._write(pieces)

    def _write(self, pieces: Iterable[Piece]) -> None:
        for data in pieces:
            if self.offset + len(data) > self.blob.size:
                self._drop()
                raise Untrusted(f"blob {self.blob.digest[:12]}: more than {self.blob.size} bytes")
            with _disk(self._part):
                file = self._open()
                total = self._total(file)
                file.write(data)
                file.flush()  # so that what came survives us, and `held` sees it
                failpoints.reach("chunk.taken")
            total.update(data)
            self.offset += len(data)

    def finish(self, *pieces: Piece) -> None:
        """Add the last bytes, verify and keep the blob.

        Raises `Untrusted`, and drops all, if the digest is wrong, `Unreachable` if bytes are
        missing still; what has come is kept.
        """
        with self._lock:
            self._write(pieces)
            if self._place.is_file():
                self._drop()
                return
            file = self._open()
            if self.offset < self.blob.size:
                raise Unreachable(
                    f"blob {self.blob.digest[:12]}: {self.offset} of {self.blob.size} bytes came"
                )
            with _disk(self._part):
                digest = self._total(file).hexdigest()
            if digest != self.blob.digest:
                self._drop()
                raise Untrusted(f"blob {self.blob.digest[:12]}: the digest is wrong; dropped")
            with _disk(self._part):
                _settle(file, self._part, self._place, lasting=self._lasting)
                file.close()
                failpoints.reach("blob.kept")
            self._file = None

    def close(self) -> None:
        """Stop here; a later intake goes on from what has come."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                with _disk(self._part):
                    file.close()

    def _open(self) -> BinaryIO:
        if self._file is None:
            raise Unreachable(f"blob {self.blob.digest[:12]}: a newer transfer took over")
        return self._file

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._part.unlink(missing_ok=True)


def _settle(file: BinaryIO, draft: Path, place: Path, *, lasting: bool) -> None:
    file.flush()
    if lasting:
        os.fsync(file.fileno())
    draft.replace(place)
    if lasting:
        sync_folder(place.parent)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failure(str(path), error) from error
