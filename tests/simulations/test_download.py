"""A data file is the right one, or one line says what to do."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest

from fedml.errors import ConfigError
from simulations.download import Source, find

CONTENT = b"1,2,3\n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("FEDML_DATA", str(folder))
    return folder


def source(tmp_path: Path, *, name: str = "a/rows.csv", there: bool = True) -> Source:
    """Return a source whose official address is a file of this machine."""
    origin = tmp_path / "official.csv"
    if there:
        origin.write_bytes(gzip.compress(CONTENT) if name.endswith(".gz") else CONTENT)
    return Source(name, origin.as_uri(), (DIGEST,))


def test_a_folder_of_one_s_own_comes_first(tmp_path: Path, folder: Path) -> None:
    own = folder / "a" / "rows.csv"
    own.parent.mkdir()
    own.write_bytes(CONTENT)
    assert find(source(tmp_path, there=False)) == own


@pytest.mark.parametrize("name", ["a/rows.csv", "a/rows.gz"])
def test_else_it_is_downloaded_once(tmp_path: Path, folder: Path, name: str) -> None:
    wanted = source(tmp_path, name=name)
    path = find(wanted)
    assert path == tmp_path / "cache" / "fedml" / name
    (tmp_path / "official.csv").unlink()
    assert find(wanted) == path


def test_a_wrong_file_is_refused_wherever_it_lies(tmp_path: Path, folder: Path) -> None:
    wanted = source(tmp_path)
    (tmp_path / "official.csv").write_bytes(CONTENT + b"4,5,6\n")
    with pytest.raises(ConfigError, match=r"official.csv: SHA-256 is [0-9a-f]{12}, not ") as caught:
        find(wanted)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    own = folder / "a" / "rows.csv"
    own.parent.mkdir()
    own.write_bytes(CONTENT + b"\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(own))}: SHA-256 is .*; replace it"):
        find(wanted)


def test_what_cannot_be_had_is_one_line_with_the_way_out(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find(source(tmp_path, there=False))
    assert re.fullmatch(
        r"a/rows.csv is not in .*data nor in .*fedml, and file://.* cannot be fetched \(.*\); "
        r"set FEDML_DATA to a folder that has it",
        str(caught.value),
    )


def test_what_is_packed_wrongly_is_told(tmp_path: Path, folder: Path) -> None:
    broken = folder / "rows.gz"
    broken.write_bytes(b"not packed")
    with pytest.raises(ConfigError, match=r"rows.gz is no gzip file"):
        find(Source("rows.gz", "file:///nowhere", (DIGEST,)))
