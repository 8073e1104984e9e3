"""The real data files, where this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("FEDML_DATA", "../shared/data"))


def real(monkeypatch: pytest.MonkeyPatch, place: str) -> Path:
    """Return the real file at `place`, with `FEDML_DATA` set to its folder; skip without it."""
    path = FOLDER / place
    if not path.exists():
        pytest.skip(f"{path} is not there; set FEDML_DATA")
    monkeypatch.setenv("FEDML_DATA", str(FOLDER.resolve()))
    return path
