"""`fedml site roster`: a site's key, and the roster that its operator accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedml import settings
from fedml.cli.main import app
from fedml.site.settings import Settings


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    names = ("bern", "kyoto", "oslo")
    for name in names:
        (tmp_path / name).mkdir()
        settings.write(Settings(name, "localhost:1"), tmp_path / name / "site.toml")
    return [tmp_path / name for name in names]


def told(*argv: str) -> list[str]:
    done = CliRunner().invoke(app, ["site", "roster", *argv])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def complaint(*argv: str) -> str:
    command = [sys.executable, "-m", "fedml", "site", "roster", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    return line


def test_operators_put_a_roster_together_and_accept_it(folders: list[Path], tmp_path: Path) -> None:
    keys: dict[str, str] = {}
    for folder in folders:
        [line] = told(str(folder))
        assert [line] == told(str(folder))  # the key is made once
        keys |= json.loads(line)
    path = tmp_path / "roster.json"
    path.write_text(json.dumps(keys))
    digests = {told(str(f), "--accept", str(path))[1] for f in folders}
    [digest] = digests
    assert digest.startswith("accepted here: roster ")
    assert told(str(folders[0]))[2:] == [f"  {name} {keys[name]}" for name in sorted(keys)]


def test_what_cannot_be_accepted_is_one_line(folders: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    missing = complaint(str(folders[0]), "--accept", str(path))
    assert missing == f"error: --accept {path}: no such file"
    path.write_text(json.dumps({"bern": "ab" * 32}))
    wrong = complaint(str(folders[0]), "--accept", str(path))
    assert wrong.startswith(f"error: {path}: bern is not on it with this site's key ")
