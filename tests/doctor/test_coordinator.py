"""A coordinator's folder, idle and at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fedml import durable
from fedml.cli.demo.federation import free_ports
from fedml.coordinator.folder import create
from fedml.coordinator.service import Service
from fedml.coordinator.settings import PARENT, RELEASES, Settings
from fedml.identity.audit import AuditLog
from fedml.identity.certificates import DAY, Authority, Credentials, new_key_and_csr
from fedml.transport.rpc import OperationsClient
from tests.doctor.ward import bad, found, print_of


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    port, enrolment = free_ports(2)
    create(tmp_path / "hub", Settings(port=port, enrolment_port=enrolment))
    return tmp_path / "hub"


@asynccontextmanager
async def running(hub: Path) -> AsyncIterator[None]:
    program = asyncio.create_task(Service(hub).run())
    client = OperationsClient(Credentials.load(hub / "operator"))
    ready = asyncio.create_task(client.reach(60.0))
    try:
        await asyncio.wait([program, ready], return_when=asyncio.FIRST_COMPLETED)
        assert not program.done(), program
        await ready
        yield
    finally:
        await client.close()
        ready.cancel()
        program.cancel()
        await asyncio.wait([program, ready])


async def test_a_coordinator_that_rests_is_well_and_untouched(hub: Path) -> None:
    before = print_of(hub)
    findings = await found(hub)
    assert bad(findings) == {}
    assert findings["program"].state == "warn"
    assert print_of(hub) == before


async def test_a_coordinator_at_work_is_well_and_answers_its_own_operator(hub: Path) -> None:
    async with running(hub):
        findings = await found(hub)
    assert bad(findings) == {}
    assert findings["program"].found.startswith("a coordinator (process ")
    assert findings["access"].state == findings["clock"].state == "ok"


async def test_an_operator_s_profile_is_looked_at_alone(hub: Path) -> None:
    async with running(hub):
        findings = await found(hub / "operator")
    assert bad(findings) == {}
    assert "operator admin" in findings["certificate"].found
    assert "program" not in findings
    assert bad(await found(hub / "operator")).keys() == {"coordinator"}


async def test_a_journal_with_a_torn_end(hub: Path) -> None:
    (hub / "journal.jsonl").write_bytes(b"0000")
    finding = (await found(hub))["journal.jsonl"]
    assert finding.state == "warn"
    assert "4 bytes of a torn one" in finding.found
    assert "the next start cuts it off" in finding.advice


async def test_a_damaged_journal_is_named(hub: Path) -> None:
    (hub / "journal.jsonl").write_bytes(b"00000000 {}\n" * 2)
    assert "damaged at byte 0" in bad(await found(hub))["journal.jsonl"]


async def test_a_run_whose_model_is_gone(hub: Path) -> None:
    log = durable.Log(hub / "journal.jsonl")
    opened = {"asked": ["a", "b", "c"]}
    log.append({"kind": "RoundOpened", "entry": {"run": "m-1", "opened": opened}})
    entry = {"run": "m-1", "state": "m-1.1.safetensors"}
    log.append({"kind": "RoundCommitted", "entry": entry})
    log.close()
    assert "m-1.1.safetensors of the journal are gone" in bad(await found(hub))["states"]
    durable.replace(hub / "states" / "m-1.1.safetensors", bytes(10**6))
    findings = await found(hub)
    assert findings["states"].state == "ok"
    assert "a round here takes 5 MB" in findings["disk"].found


async def test_a_clock_before_the_last_note_of_the_audit_log(hub: Path) -> None:
    AuditLog(hub / "audit.jsonl").note("eve", "submit", time.time() + 3600)
    assert "ahead of this machine's clock" in bad(await found(hub))["clock"]


async def test_an_address_that_only_this_machine_reaches(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    create(hub, Settings(host="hub.example.org", port=0, enrolment_port=0))
    assert (await found(hub))["bind"].state == "warn"


async def test_a_region_s_certificate_is_looked_at_too(tmp_path: Path) -> None:
    hub, now = tmp_path / "north", time.time()
    create(hub, Settings(port=0, enrolment_port=0))
    assert "certificate" not in await found(hub)
    authority = Authority.create(tmp_path / "ca", now)
    key, csr = new_key_and_csr("north")
    certificate = authority.issue(csr, "north", "region", now - 25 * DAY)
    papers = Credentials("localhost:1", authority.certificate, certificate, key)
    papers.save(hub / PARENT)
    finding = (await found(hub))["certificate"]
    assert finding.state == "warn"
    assert finding.found.startswith("region north, ")
    assert "the region renews it by itself" in finding.advice
    assert (await found(hub))["releases"].state == "ok", "no release of the parent's is no fault"
    (hub / RELEASES / "metadata").mkdir(parents=True)
    (hub / RELEASES / "metadata" / "timestamp.json").write_text("{}")
    assert str(hub / RELEASES / "metadata") in (await found(hub))["releases"].found
    (hub / PARENT / "identity.json").chmod(0o644)
    assert "identity.json" in str(bad(await found(hub)))
