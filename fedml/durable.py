"""Files that survive `kill -9` and power loss: atomic replacement, append-only logs, folder locks.

A write has happened when the call returns: file and folder are fsynced. What a crash leaves
behind is always the old state, the new state, or the old state plus a torn last record, which
the next `Log` cuts off and reports.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedml import failpoints
from fedml.errors import ConfigError, Corrupt, FedmlError, NoRoom

_BEGIN = 2  # SYNC_FILE_RANGE_WRITE
Record = Mapping[str, Any]  # one JSON object; whoever writes it gives it meaning
_GLANCES, _GLANCE = 20, 0.01  # tries for a lock, and seconds between them; see `holder`


def replace(path: Path, *pieces: bytes | memoryview, mode: int = 0o644) -> None:
    """Make `path` hold exactly `pieces`, or leave it as it was; parent folders are created."""
    fill(path, pieces, mode=mode)


def fill(path: Path, pieces: Iterable[bytes | memoryview], *, mode: int = 0o644) -> None:
    """As `replace`, of pieces that come one after the other, never all in memory."""
    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        failpoints.reach("durable.replace")
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise failure(f"cannot write {path}", error) from error


def failure(what: str, error: OSError) -> FedmlError:
    """Return what a failed write means: `NoRoom` if waiting helps, `ConfigError` if not."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"{what}: {error.strerror}; free space, and it goes on")
    return ConfigError(f"{what}: {error.strerror}; free space, or mend the rights")


def copy(source: Path, path: Path) -> None:
    """Make `path` a copy of the file `source`, or leave it as it was; never all in memory."""
    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with source.open("rb") as origin, draft.open("wb") as file:
            shutil.copyfileobj(origin, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise failure(f"cannot copy {source} to {path}", error) from error


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, whose bytes are on the disk from then on.

    Where there are no second names it becomes a copy. The file must not be written to any more.
    """
    make_folder(path.parent)
    try:
        path.unlink(missing_ok=True)
        try:
            path.hardlink_to(source)
        except OSError:
            return copy(source, path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        raise failure(f"cannot write {path}", error) from error


def hasten(descriptor: int, start: int, end: int) -> None:
    """Let the disk begin with a file's bytes from `start` to `end`, and wait for nothing.

    An fsync later has that much less to wait for. Where the kernel cannot, nothing is done.
    """
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        offset, size = ctypes.c_int64(start), ctypes.c_int64(end - start)
        begin(descriptor, offset, size, _BEGIN)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents unless they are there; raises `ConfigError` if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}; is the path right?") from error


def sync_folder(folder: Path) -> None:
    """Make renames, creations and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON is what it is; callers check it
    """Return a JSON file's value; raises `ConfigError` if absent, `Corrupt` if unreadable."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; is the folder right?") from error
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path} is damaged ({error}); restore it from a backup") from error


def dump_json(value: object) -> bytes:
    """Return canonical JSON: sorted keys, no spaces, so equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Hold `folder` for this process; raises `ConfigError` if another process has it.

    The kernel lets go when the process ends, however it ends, so no lock is ever stale.
    """
    make_folder(folder)
    descriptor = _open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        if not _take(descriptor):
            raise ConfigError(f"{folder} is in use by {_named(descriptor)}; stop that one first")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner} (process {os.getpid()})".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(folder: Path) -> str:
    """Return who holds `folder` by `lock`, "" if nobody does; changes nothing.

    It looks by sharing the lock for an instant, which `lock` waits out. Raises `ConfigError` if
    we may not look.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(
            f"{folder / '.lock'}: {error.strerror}; ask as the user that runs the program"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(descriptor)
    else:
        return ""
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    for _ in range(_GLANCES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_GLANCE)
        else:
            return True
    return False


def _named(descriptor: int) -> str:
    name = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return name or "another process"


class Log:
    """An append-only file of JSON records, one a line, each with a checksum and fsynced.

    Opening replays it. A torn last line, which is what a crash in the middle of `append` leaves,
    is cut off and kept in `torn`; damage anywhere else raises `Corrupt`.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path, self.torn = path, b""
        data = path.read_bytes() if path.exists() else b""
        self.records, whole = _replay(path, data)
        self._descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if whole < len(data):
            self.torn = data[whole:]
            os.ftruncate(self._descriptor, whole)
            os.fsync(self._descriptor)
        if not data:
            sync_folder(path.parent)

    def append(self, *records: Record) -> None:
        """Add `records`; when this returns they are on the disk. Raises as `failure` says.

        A failed append (disk full) leaves the log as it was. A crash may leave the first few.
        """
        bodies = [dump_json(record) for record in records]
        line = b"".join(b"%08x %s\n" % (zlib.crc32(body), body) for body in bodies)
        end = os.fstat(self._descriptor).st_size
        try:
            failpoints.reach("durable.append")
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise failure(f"cannot write {self.path}", error) from error
        self.records += map(json.loads, bodies)

    def select(self, test: Callable[[Record], bool]) -> list[Record]:
        """Return the records, oldest first, for which `test` holds."""
        return [record for record in self.records if test(record)]

    def close(self) -> None:
        """Let go of the file; the log is not to be used again."""
        os.close(self._descriptor)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; mend the rights") from error


def read_log(path: Path) -> list[Record]:
    """Return the whole records of a log that another process may be writing; changes nothing.

    Raises `ConfigError` if there is no such file, `Corrupt` on damage before the last line.
    """
    return look(path)[0]


def look(path: Path) -> tuple[list[Record], int]:
    """Return what `read_log` does, and how many bytes of a torn record follow."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is the folder right?") from error
    records, whole = _replay(path, data)
    return records, len(data) - whole


def _replay(path: Path, data: bytes) -> tuple[list[Record], int]:
    records: list[Record] = []
    end, total = 0, len(data)
    while end < total:
        stop = data.find(b"\n", end)
        record = None if stop < 0 else _parse(data[end:stop])
        if record is None:
            if 0 <= stop < total - 1:
                raise Corrupt(f"{path}: damaged at byte {end}; restore it from a backup")
            break
        records.append(record)
        end = stop + 1
    return records, end


def _parse(line: bytes) -> Record | None:
    checksum, _, body = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(body):
            return None
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
