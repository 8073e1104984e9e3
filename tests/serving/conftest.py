from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedml.releases.session import rehearse
from fedml.releases.shelf import Shelf
from fedml.serving.engine import Engine
from fedml.serving.faces import Server
from tests.bundles import write_bundle


def put(shelf: Shelf, version: int, *, model: str = "heart", factor: float = 1.0) -> None:
    """Make a version current that multiplies by `factor`."""
    folder = shelf.folder.parent / f"{model}-{version}"
    write_bundle(folder, model, version, factor=factor)
    shelf.add(folder)
    shelf.activate(model, version, rehearse)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(tmp_path / "shelf")
    put(shelf, 1)
    return shelf


@pytest.fixture
async def engine(shelf: Shelf) -> AsyncIterator[Engine]:
    engine = Engine(shelf)
    await engine.refresh()
    yield engine
    await engine.close()


@pytest.fixture
async def server(engine: Engine) -> AsyncIterator[Server]:
    async with Server(engine) as server:
        yield server
