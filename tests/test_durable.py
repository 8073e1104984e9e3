"""What is written survives a crash at any point, and damage is told from a torn tail."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml import durable
from fedml.errors import ConfigError, Corrupt


def filled(path: Path, count: int = 3) -> durable.Log:
    log = durable.Log(path)
    for number in range(count):
        log.append({"number": number})
    return log


def test_a_log_replays_what_was_appended(tmp_path: Path) -> None:
    filled(tmp_path / "log").close()
    assert [r["number"] for r in durable.Log(tmp_path / "log").records] == [0, 1, 2]


@given(cut=st.integers(1, 30))
def test_a_torn_tail_is_cut_off_and_reported(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "log"
    filled(path).close()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    torn = whole[: max(last + 1, len(whole) - cut)]
    path.write_bytes(torn)
    log = durable.Log(path)
    assert [r["number"] for r in log.records] == [0, 1]
    assert log.torn == torn[last:]
    log.append({"number": 9})
    log.close()
    assert [r["number"] for r in durable.Log(path).records] == [0, 1, 9]


def test_damage_before_the_tail_is_corruption(tmp_path: Path) -> None:
    path = tmp_path / "log"
    filled(path).close()
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="damaged at byte 0; restore it from a backup"):
        durable.Log(path)


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    code = """
import resource, sys, signal
from pathlib import Path
from fedml import durable
from fedml.errors import NoRoom
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: the write comes back short
log = durable.Log(Path(sys.argv[1]))
log.append({"number": 0})
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    log.append({"number": 1})
except NoRoom as error:
    print(error)
assert log.path.stat().st_size == size
assert [r["number"] for r in log.records] == [0]
"""
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {path}")


def test_replace_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    durable.replace(path, b"one")
    durable.replace(path, b"t", memoryview(b"wo"), mode=0o600)
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600
    blocked = tmp_path / "folder"
    (blocked / "child").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write"):
        durable.replace(blocked, b"no file can replace a folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedml import durable\n"
        "with durable.lock(Path(sys.argv[1]), 'a coordinator'):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ConfigError, match=rf"in use by a coordinator \(process {holder.pid}\)"),
        durable.lock(tmp_path, "another"),
    ):
        pass
    holder.kill()
    holder.communicate()
    with durable.lock(tmp_path, "another"):
        assert (tmp_path / ".lock").read_text() == f"another (process {os.getpid()})"


def test_json_is_canonical_and_never_nan() -> None:
    assert durable.dump_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        durable.dump_json({"a": float("nan")})


def test_a_damaged_json_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(ConfigError, match="does not exist"):
        durable.read_json(path)
    path.write_text("{")
    with pytest.raises(Corrupt, match="restore it from a backup"):
        durable.read_json(path)


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "folder" / "log"
    for make in (
        lambda: durable.replace(inside, b""),
        lambda: durable.Log(inside),
        lambda: durable.lock(inside, "me").__enter__(),
    ):
        with pytest.raises(ConfigError, match=r"cannot make .*; is the path right"):
            make()


def test_records_that_go_together_are_one_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = durable.Log(tmp_path / "log")
    waits: list[int] = []
    sync = os.fsync

    def counted(descriptor: int) -> None:
        waits.append(1)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    log.append({"a": 1}, {"b": 2}, {"c": 3})
    assert len(waits) == 1
    log.close()
    data = (tmp_path / "log").read_bytes()
    for size in range(len(data)):  # a crash leaves the first few, whole
        (tmp_path / "log").write_bytes(data[:size])
        again = durable.Log(tmp_path / "log")
        assert again.records == [{"a": 1}, {"b": 2}, {"c": 3}][: data[:size].count(b"\n")]
        again.close()


def test_a_second_name_is_on_the_disk_and_outlives_the_first(tmp_path: Path) -> None:
    source, path = tmp_path / "blob", tmp_path / "states" / "one"
    for data in (b"first", b"second"):
        durable.replace(source, data)
        durable.link(source, path)
        assert path.samefile(source)
    source.unlink()
    assert path.read_bytes() == b"second"
    with pytest.raises(ConfigError, match="No such file"):
        durable.link(source, path)


def test_what_the_disk_began_with_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with path.open("wb", buffering=0) as file:
        for start in range(0, 3000, 1000):
            file.write(bytes([start // 1000]) * 1000)
            durable.hasten(file.fileno(), start, start + 1000)
    assert path.read_bytes() == b"".join(bytes([number]) * 1000 for number in range(3))
    durable.hasten(-1, 0, 1000)  # what cannot be begun with is left to the fsync


def test_a_holder_is_named_and_looking_disturbs_nobody(tmp_path: Path) -> None:
    assert durable.holder(tmp_path) == ""
    with durable.lock(tmp_path, "a test"):
        before = (tmp_path / ".lock").stat()
        assert durable.holder(tmp_path) == f"a test (process {os.getpid()})"
        assert (tmp_path / ".lock").stat() == before
    assert durable.holder(tmp_path) == ""


def test_a_lock_waits_out_one_who_only_looks(tmp_path: Path) -> None:
    with durable.lock(tmp_path, "first"):
        pass
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    turned = threading.Timer(0.05, os.close, [looking])
    turned.start()
    with durable.lock(tmp_path, "second"):
        turned.join()
