"""The registry takes seconds to open: its own is opened when it is asked for, another's at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.coordinator.folder import create
from fedml.coordinator.service import Service
from fedml.coordinator.settings import Settings
from fedml.errors import FedmlError
from tests.coordinator.test_regional import made, running

pytestmark = pytest.mark.slow


async def test_a_coordinator_is_here_before_its_registry_is_open(tmp_path: Path) -> None:
    hub = made(tmp_path / "hub")
    async with running(Service(hub), hub) as operator:
        assert await operator.list_runs() == []
        assert not (hub / "registry" / "mlflow.db").exists()
        assert await operator.list_models() == []
        assert (hub / "registry" / "mlflow.db").exists()


async def test_a_registry_elsewhere_that_cannot_be_reached_ends_the_start(tmp_path: Path) -> None:
    port, enrolment = free_ports(2)
    away = "postgresql://nobody@127.0.0.1:1/models"  # where nobody listens
    create(tmp_path / "hub", Settings(port=port, enrolment_port=enrolment, registry=away))
    with pytest.raises(FedmlError, match="registry postgresql"):
        await asyncio.wait_for(Service(tmp_path / "hub").run(), 60)
