"""Every test here reads data files from one folder, and downloads nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulations.data import FOLDER


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDML_DATA", str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("simulations.download._PATIENCE", 5.0)
