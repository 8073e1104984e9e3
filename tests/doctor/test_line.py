"""What stands between a site and its coordinator is named, whichever step it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fedml.doctor.finding import Finding
from fedml.doctor.line import judge, line
from fedml.identity.certificates import Authority
from fedml.protocol.requests import Pong
from fedml.transport.server import ServerTls, serve
from tests.transport.world import GrpcPlace, World

HOUR = 3600.0


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[GrpcPlace]:
    place = GrpcPlace(World.build(tmp_path))
    await place.start()
    yield place
    await place.stop()


@asynccontextmanager
async def showing(
    world: World, authority: Authority, hosts: list[str], *, start: float = 0.0, days: float = 365.0
) -> AsyncIterator[int]:
    """A coordinator with a certificate of our choice; yields its port."""
    certificate, key = authority.issue_server(hosts, time.time() + start, days=days)
    tls = ServerTls(certificate, key, world.authority.certificate)
    here = {"address": "127.0.0.1:0", "enrolment_address": "127.0.0.1:0"}
    async with serve(world.desks, world.access, tls, **here) as server:
        yield server.port


async def seen(world: World, port: int, ahead: float = 0.0) -> dict[str, Finding]:
    papers = replace(world.credentials(), address=f"127.0.0.1:{port}")
    return {f.what: f for f in await line(papers, lambda: time.time() + ahead)}


async def test_a_good_line_is_good_all_along(place: GrpcPlace) -> None:
    findings = await seen(place.world, place.world.port)
    assert {f.what: f.state for f in findings.values()} == dict.fromkeys(
        ("coordinator", "access", "clock", "version"), "ok"
    )


@pytest.mark.parametrize(("ahead", "way"), [(HOUR, "ahead of"), (-HOUR, "behind")])
async def test_a_clock_an_hour_off_fails(place: GrpcPlace, ahead: float, way: str) -> None:
    clock = (await seen(place.world, place.world.port, ahead))["clock"]
    assert clock.state == "fail"
    assert clock.found.startswith(("3600", "3599"))
    assert f"s {way} the coordinator's" in clock.found
    assert "set this machine's clock" in clock.advice


async def test_a_clock_a_minute_off_is_worth_a_word(place: GrpcPlace) -> None:
    assert (await seen(place.world, place.world.port, 60.0))["clock"].state == "warn"


async def test_a_certificate_that_begins_later_is_a_matter_of_clocks(place: GrpcPlace) -> None:
    world = place.world
    async with showing(world, world.authority, ["127.0.0.1"], start=HOUR) as port:
        findings = await seen(world, port)
    assert findings["clock"].state == "fail"
    assert "the coordinator's certificate begins " in findings["clock"].found
    assert "access" not in findings


async def test_a_coordinator_with_an_expired_certificate_is_to_be_restarted(
    place: GrpcPlace,
) -> None:
    world = place.world
    old = showing(world, world.authority, ["127.0.0.1"], start=-9 * HOUR, days=1 / 24)
    async with old as port:
        clock = (await seen(world, port))["clock"]
    assert clock.state == "fail"
    assert "certificate ended " in clock.found
    assert "restart it" in clock.advice


async def test_a_coordinator_under_another_name(place: GrpcPlace) -> None:
    world = place.world
    async with showing(world, world.authority, ["hub.example.org"]) as port:
        finding = (await seen(world, port))["coordinator"]
    assert finding.state == "fail"
    assert "a certificate for another name" in finding.found


async def test_a_stranger_in_the_middle(place: GrpcPlace, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "stranger", time.time())
    async with showing(place.world, stranger, ["127.0.0.1"]) as port:
        finding = (await seen(place.world, port))["coordinator"]
    assert finding.state == "fail"
    assert "no certificate of our authority" in finding.found


async def test_something_that_speaks_no_tls(place: GrpcPlace) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        finding = (await seen(place.world, port))["coordinator"]
    assert finding.state == "fail"
    assert "speaks no TLS" in finding.found


async def test_a_coordinator_that_is_away(place: GrpcPlace) -> None:
    await place.stop()
    findings = await seen(place.world, place.world.port)
    assert findings["coordinator"].state == "fail"
    assert "does not answer: Connection refused" in findings["coordinator"].found
    assert findings["clock"].state == "warn"
    assert "not compared" in findings["clock"].found


async def test_a_name_that_does_not_resolve(place: GrpcPlace) -> None:
    papers = replace(place.world.credentials(), address="hub.invalid:8443")
    [finding, _] = await line(papers, time.time)
    assert finding.state == "fail"
    assert "hub.invalid does not resolve" in finding.found


async def test_a_revoked_certificate(place: GrpcPlace) -> None:
    world = place.world
    papers = world.credentials()
    world.revocations.revoke("mercy", time.time())
    findings = {f.what: f for f in await line(papers, time.time)}
    assert findings["access"].state == "fail"
    assert "was revoked" in findings["access"].found
    assert "join with a new token" in findings["access"].advice


async def test_a_coordinator_from_before_this_command(place: GrpcPlace) -> None:
    world = place.world
    certificate, key = world.authority.issue_server(["127.0.0.1"], time.time())
    server = grpc.aio.server()
    terms = grpc.ssl_server_credentials([(key, certificate)], world.authority.certificate, True)
    port = server.add_secure_port("127.0.0.1:0", terms)
    await server.start()
    try:
        finding = (await seen(world, port))["version"]
    finally:
        await server.stop(0)
    assert finding.state == "warn"
    assert "older than this command" in finding.found


def test_another_minor_version_is_worth_a_word() -> None:
    states = {v: judge(Pong(10.0, v), 10.0, 10.0)[1].state for v in ("0.1.7", "0.2.0", "1.1.0")}
    assert states == {"0.1.7": "ok", "0.2.0": "warn", "1.1.0": "warn"}
