"""What all tests share."""

import pytest

from fedml import installed


@pytest.fixture(autouse=True)
def nothing_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that one test lends to this process is not there for the next."""
    monkeypatch.setattr(installed, "_lent", {})
    monkeypatch.setattr(installed, "_folders", {})
