"""A coordinator becomes a region once, by a region's token, if it has no runs of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.coordinator.folder import create
from fedml.coordinator.regional import Regional, join_parent
from fedml.coordinator.service import Service
from fedml.coordinator.settings import PARENT, RELEASES, Settings, is_region
from fedml.errors import ConfigError
from fedml.identity.certificates import Credentials
from fedml.transport.rpc import OperationsClient, join

pytestmark = pytest.mark.slow


def made(folder: Path) -> Path:
    port, enrolment = free_ports(2)
    create(folder, Settings(port=port, enrolment_port=enrolment))
    return folder


@asynccontextmanager
async def running(program: Service | Regional, folder: Path) -> AsyncIterator[OperationsClient]:
    work = asyncio.create_task(program.run())
    client = OperationsClient(Credentials.load(folder / "operator"))
    try:
        await client.reach(60.0)
        yield client
    finally:
        await client.close()
        work.cancel()
        await asyncio.wait([work])


async def test_a_coordinator_joins_a_parent(tmp_path: Path) -> None:
    hub, north = made(tmp_path / "hub"), made(tmp_path / "north")
    async with running(Service(hub), hub) as operator:
        wrong = (await operator.invite("north", "site", 60.0)).token
        with pytest.raises(ConfigError) as refusal:
            await join_parent(north, wrong)
        assert str(refusal.value) == (
            "the token is for a site, and is spent now; it takes one for a region: "
            "'fedml coordinator invite north --role region'"
        )
        assert not is_region(north)
        token = (await operator.invite("north", "region", 60.0)).token
        assert (await join_parent(north, token)).name == "north"
        assert is_region(north)
        roots = [at / "metadata" / "1.root.json" for at in (hub / "releases", north / RELEASES)]
        assert roots[0].read_bytes() == roots[1].read_bytes()
        assert (
            Credentials.load(north / PARENT).address == Credentials.load(hub / "operator").address
        )
        with pytest.raises(ConfigError, match=r"is a region of localhost:\d+ already"):
            await join_parent(north, token)
        async with running(Regional(north), north) as leaves:
            with pytest.raises(ConfigError, match="north is a region of localhost"):
                await leaves.list_runs()

            async def here() -> bool:
                return any(i.site == "north" and i.connected for i in await operator.list_sites())

            async with asyncio.timeout(60):
                while not await here():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        other = (await operator.invite("south", "region", 60.0)).token
        with pytest.raises(ConfigError, match="it takes one for a site: 'fedml coordinator invite"):
            await join(other, tmp_path / "site", "site")
        assert not list((tmp_path / "site").iterdir())


async def test_a_coordinator_with_runs_of_its_own_joins_no_parent(tmp_path: Path) -> None:
    north = made(tmp_path / "north")
    (north / "journal.jsonl").write_text("something\n")
    with pytest.raises(ConfigError, match="has runs of its own"):
        await join_parent(north, "fedml1.whatever")
    with pytest.raises(ConfigError, match="is no coordinator folder yet"):
        await join_parent(tmp_path / "nowhere", "fedml1.whatever")
