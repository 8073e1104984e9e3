"""Where the real data files are, for tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("FEDML_DATA", "../shared/data")).absolute()


def needs(place: str) -> pytest.MarkDecorator:
    """Skip a test unless the data file `place` is there."""
    return pytest.mark.skipif(
        not (FOLDER / place).is_file(), reason=f"{FOLDER / place} is not there; set FEDML_DATA"
    )
