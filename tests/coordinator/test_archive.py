"""The registry takes seconds to open: its own is opened when it is asked for, another's at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.coordinator.archive import Archive
from fedml.coordinator.folder import Folder, create
from fedml.coordinator.service import Service, _keep_fresh
from fedml.coordinator.settings import Settings
from fedml.errors import FedmlError
from fedml.releases.registry import MemoryRegistry, Registry

AWAY = "postgresql://nobody@127.0.0.1:1/models"  # where nobody listens


def made(folder: Path, registry: str = "") -> Path:
    port, enrolment = free_ports(2)
    create(folder, Settings(port=port, enrolment_port=enrolment, registry=registry))
    return folder


async def test_a_registry_in_the_folder_is_opened_when_it_is_asked_for(tmp_path: Path) -> None:
    opened = []

    def open_registry() -> Registry:
        opened.append("registry")
        return MemoryRegistry(tmp_path / "registry")

    archive = Archive(open_registry)
    upkeep = asyncio.create_task(_keep_fresh(Folder.open(made(tmp_path / "hub")), archive))
    await asyncio.sleep(0)  # it is ahead of us
    await archive.sign(lambda: None)
    assert opened == []
    assert await archive.do(lambda registry: registry.list()) == ()
    assert await archive.do(lambda registry: registry.list()) == ()
    assert opened == ["registry"]
    assert not upkeep.done()
    upkeep.cancel()


async def test_a_registry_elsewhere_that_cannot_be_reached_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(FedmlError, match="registry postgresql"):
        await asyncio.wait_for(Service(made(tmp_path / "hub", AWAY)).run(), 60)
