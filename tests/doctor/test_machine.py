"""A machine that is too small, too full, too busy or wrongly equipped is found out."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedml.doctor import machine
from fedml.errors import ConfigError

GB = 10**9


def test_room_is_held_against_what_a_round_takes() -> None:
    states = [machine.judge_room(free * GB, 100 * GB, 4 * GB).state for free in (3.9, 6, 10)]
    assert states == ["fail", "warn", "ok"]
    assert machine.judge_room(50e6, 100 * GB, 0).state == "fail"


def test_the_largest_model_counts(tmp_path: Path) -> None:
    for name, size in (("tasks/t/model.safetensors", 5), ("shelf/m/1/weights.safetensors", 7)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert machine.largest([tmp_path / "tasks", tmp_path / "shelf", tmp_path / "none"]) == 7


def test_a_full_disk(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    say = (
        "from pathlib import Path; from fedml.doctor.machine import disk; "
        f"print(disk(Path({str(tmp_path)!r}), 0))"
    )
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} -c "{say}"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount], capture_output=True, text=True, timeout=60
    )
    if "mount" in done.stderr:
        pytest.skip(f"may not mount: {done.stderr}")
    assert "state='fail'" in done.stdout, done.stderr
    assert "1 MB free of 1 MB" in done.stdout
    assert "free space" in done.stdout


def test_a_port_is_free_taken_open_or_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        taken = machine.port("REST", "127.0.0.1", number, "")
        open_ = machine.port("REST", "0.0.0.0", number, "a site daemon (process 1)")
    free = machine.port("REST", "127.0.0.1", number, "")
    closed = machine.port("REST", "127.0.0.1", number, "a site daemon (process 1)")
    states = [f.state for f in (taken, open_, free, closed)]
    assert states == ["fail", "ok", "ok", "fail"]
    assert "another program has it" in taken.found
    assert f"sport = :{number}" in taken.advice
    assert machine.port("REST", "192.0.2.1", 8400, "").state == "fail"
    assert machine.port("REST", "127.0.0.1", 0, "").state == "ok"


def test_the_limit_of_the_running_program_counts() -> None:
    wait = ["sh", "-c", "ulimit -n 99; echo; exec sleep 60"]
    with subprocess.Popen(wait, stdout=subprocess.PIPE) as few:
        try:
            assert few.stdout is not None
            few.stdout.readline()
            finding = machine.files(256, f"a site daemon (process {few.pid})")
            assert machine.files(90, f"a site daemon (process {few.pid})").state == "ok"
        finally:
            few.kill()
    assert finding.state == "warn"
    assert finding.found == f"only 99 may be open in process {few.pid}"
    assert "LimitNOFILE=" in finding.advice
    assert machine.files(10**7, "").found.endswith("in this shell")


@pytest.mark.parametrize(
    ("needs", "state", "word"),
    [
        ("packaging>=20; extra == 'site'", "ok", "Python 3"),
        ("packaging>=99; extra == 'site'", "fail", "packaging is "),
        ("nowhere-to-be-had; extra == 'site'", "fail", "nowhere-to-be-had is missing"),
        ("nowhere-to-be-had; extra == 'flower'", "ok", "Python 3"),
        ("packaging>=99; extra == 'flower'", "warn", "packaging is "),
    ],
)
def test_what_an_extra_needs_is_there_in_a_version_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: str, state: str, word: str
) -> None:
    info = tmp_path / "fedml_consortium-0.1.0.dist-info"
    info.mkdir()
    text = (
        f"Metadata-Version: 2.1\nName: fedml-consortium\nVersion: 0.1.0\nRequires-Dist: {needs}\n"
    )
    (info / "METADATA").write_text(f"{text}Requires-Python: >=3.11\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine.packages("site")
    assert finding.state == state
    assert word in finding.found
    (info / "METADATA").write_text(f"{text}Requires-Python: >=4\n")
    assert "Python is " in machine.packages("site").found


def test_models_that_may_not_be_looked_at_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop.safetensors: Too many levels"):
        (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
        machine.largest([tmp_path])
