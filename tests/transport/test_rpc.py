"""gRPC with mutual TLS: who gets in, what a cut costs, and what garbage does."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fedml.errors import (
    ConfigError,
    Contradiction,
    FedmlError,
    MalformedUpdate,
    PermissionDenied,
    QuorumLost,
    Refused,
    TaskFailed,
    Unreachable,
    Untrusted,
)
from fedml.identity.certificates import DAY, Authority, Credentials
from fedml.protocol.messages import Cancel, Welcome
from fedml.transport.rpc import GrpcLink, join, renew
from fedml.transport.terms import status_of
from tests.transport.world import HELLO, MIB, TASK, Cable, GrpcPlace, World, reach

HOUR = 3600.0
DATA = random.Random(2).randbytes(4 * MIB + MIB // 2)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[GrpcPlace]:
    place = GrpcPlace(World.build(tmp_path))
    await place.start()
    yield place
    await place.stop()


@pytest.fixture
async def cable(place: GrpcPlace) -> AsyncIterator[Cable]:
    cable = Cable(place.world.port)
    place.world.port = await cable.lay()
    yield cable
    await cable.remove()


async def test_a_newcomer_joins_connects_and_renews(place: GrpcPlace, tmp_path: Path) -> None:
    invitation = place.world.desk.registrar.invite("mercy", "site", 60, time.time())
    who = await join(invitation.token, tmp_path / "site")
    assert (who.name, who.role) == ("mercy", "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["identity.json"]
    old = Credentials.load(tmp_path / "site")
    link = GrpcLink(old)
    await link.connect(HELLO)
    again = await renew(link, tmp_path / "site")
    assert (again.name, again.serial == who.serial) == ("mercy", False)
    await link.close()
    new = Credentials.load(tmp_path / "site")
    assert new.key != old.key
    await reach(new)


async def test_joining_goes_on_after_the_answer_was_lost(place: GrpcPlace, tmp_path: Path) -> None:
    invitation = place.world.desk.registrar.invite("mercy", "site", 60, time.time())
    await join(invitation.token, tmp_path / "site")
    key = Credentials.load(tmp_path / "site").key
    (tmp_path / "site" / "identity.json").unlink()  # as if we had died before it was written
    (tmp_path / "site" / "joining.key").write_bytes(key)
    assert (await join(invitation.token, tmp_path / "site")).name == "mercy"


async def test_a_taken_port_is_named(place: GrpcPlace) -> None:
    second = GrpcPlace(place.world)
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{place.world.port}: is the"):
        await second.start()


@pytest.mark.parametrize("chunk", range(5))
async def test_a_download_cut_at_any_chunk_sends_only_the_rest(
    place: GrpcPlace, cable: Cable, chunk: int
) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    blob = desk.store.put_bytes(DATA)
    desk.may_get.add(blob.digest)
    link = GrpcLink(place.world.credentials())
    cable.limit_down = chunk * MIB + 90_000
    with pytest.raises(Unreachable):
        await link.download(blob, mine)
    held = mine.held(blob)
    assert held <= cable.limit_down
    await link.close()
    cable.mend()
    await link.download(blob, mine)
    assert mine.path(blob.digest).read_bytes() == DATA
    assert cable.down < len(DATA) - held + 100_000
    await link.close()


@pytest.mark.parametrize("chunk", range(5))
async def test_an_upload_cut_at_any_chunk_sends_only_the_rest(
    place: GrpcPlace, cable: Cable, chunk: int
) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    blob = mine.put_bytes(DATA)
    desk.asked_for.add(blob)
    link = GrpcLink(place.world.credentials())
    limit = cable.limit_up = chunk * MIB + 90_000
    with pytest.raises(Unreachable):
        await link.upload(blob, mine, TASK)
    await link.close()
    cable.mend()
    held = desk.store.held(blob, "mercy")
    assert held <= limit
    await link.upload(blob, mine, TASK)
    assert desk.store.path(blob.digest).read_bytes() == DATA
    assert cable.up < len(DATA) - held + 100_000
    await link.close()


@pytest.mark.parametrize("seed", range(12))
async def test_a_transfer_reset_again_and_again_at_any_byte_arrives_and_sends_nothing_twice(
    place: GrpcPlace, cable: Cable, seed: int
) -> None:
    """Resets fall into handshakes, headers and data alike; what was kept is never sent again."""
    dice, desk, mine = random.Random(seed), place.world.desk, place.world.site_store()
    up = seed % 2 == 0
    source, target = (mine, desk.store) if up else (desk.store, mine)
    blob = source.put_bytes(DATA)
    desk.asked_for.add(blob)
    desk.may_get.add(blob.digest)
    resets, kept = 0, 0
    while not target.has(blob.digest):
        link = GrpcLink(place.world.credentials())
        cable.mend()
        if resets < 8:  # then the cable is left alone
            limit = dice.choice([dice.randrange(8_000), dice.randrange(len(DATA) // 2)])
            cable.limit_up, cable.limit_down = (limit, 2**60) if up else (2**60, limit)
        try:
            await (link.upload(blob, mine, TASK) if up else link.download(blob, mine))
            assert (cable.up if up else cable.down) < len(DATA) - kept + 300_000
        except Unreachable:
            resets += 1
        finally:
            await link.close()
        came = target.held(blob, "mercy" if up else "")
        assert came >= kept
        kept = came
    assert target.path(blob.digest).read_bytes() == DATA
    assert resets >= 2


async def test_a_cut_cable_is_noticed_and_the_link_comes_back(
    place: GrpcPlace, cable: Cable
) -> None:
    link = GrpcLink(place.world.credentials())
    await link.connect(HELLO)
    await link.receive()
    cable.cut()
    with pytest.raises(Unreachable):
        async with asyncio.timeout(60):
            await link.receive()
    await link.connect(HELLO)
    assert await link.receive() == Welcome("test", 15.0)
    await link.close()


async def test_a_transfer_that_dialled_first_goes_on_when_the_stream_comes(
    place: GrpcPlace, cable: Cable
) -> None:
    """After a cut both dial again, in any order."""
    desk, mine = place.world.desk, place.world.site_store()
    blob = desk.store.put_bytes(DATA)
    desk.may_get.add(blob.digest)
    cable.delay = 0.02  # each piece
    link = GrpcLink(place.world.credentials())
    async with asyncio.timeout(60):
        coming = asyncio.create_task(link.download(blob, mine))
        while cable.down < MIB:  # noqa: ASYNC110 - a count, and no event
            await asyncio.sleep(0.01)
        await link.connect(HELLO)
        assert await link.receive() == Welcome("test", 15.0)
        await coming
    assert cable.dialled == 1
    place.world.desk.sends["mercy"](Cancel(TASK, "over"))
    assert await link.receive() == Cancel(TASK, "over")
    link.use(place.world.credentials())  # as after a renewal
    await link.connect(HELLO)
    assert cable.dialled == 2
    await link.close()


async def test_a_far_site_gets_in_with_its_first_handshake(place: GrpcPlace, cable: Cable) -> None:
    cable.delay = 0.3  # each way; given up and begun anew, hundreds that dial at once choke us
    await reach(place.world.credentials())
    assert cable.dialled == 1


async def test_nobody_there_is_unreachable_at_once(tmp_path: Path) -> None:
    world = World.build(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        world.port = unused.getsockname()[1]
        with pytest.raises(Unreachable, match=f"coordinator at 127.0.0.1:{world.port}"):
            await reach(world.credentials())


@pytest.mark.parametrize(
    ("ahead", "line"),
    [
        (
            5 * HOUR,
            "this machine's clock is at least 5 h 0 min slow: it says .* of the coordinator",
        ),
        (-400 * DAY, "the certificate of the coordinator expired 35 days ago, if this machine's"),
    ],
)
async def test_a_clock_that_denies_the_coordinator_s_certificate_is_named(
    tmp_path: Path, ahead: float, line: str
) -> None:
    place = GrpcPlace(World.build(tmp_path), ahead)
    await place.start()
    try:
        with pytest.raises(Untrusted, match=line):
            await reach(place.world.credentials())
        stranger = Authority.create(tmp_path / "stranger", time.time())
        with pytest.raises(Untrusted) as caught:  # whose word on our clock counts for nothing
            await reach(replace(place.world.credentials(), ca=stranger.certificate))
        assert "clock" not in str(caught.value)
    finally:
        await place.stop()


async def test_a_callers_cancellation_stays_a_cancellation(place: GrpcPlace) -> None:
    link = GrpcLink(place.world.credentials())
    await link.connect(HELLO)
    await link.receive()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await link.receive()
    await link.close()


@pytest.mark.parametrize(
    ("error", "arrives"),
    [
        (PermissionDenied("x"), PermissionDenied),
        (Refused("x"), Refused),
        (Contradiction(["x", "y"]), ConfigError),
        (Unreachable("x"), Unreachable),
        (MalformedUpdate("x"), Untrusted),
        (QuorumLost("x"), Refused),
        (TaskFailed("x"), Refused),
    ],
)
async def test_an_error_arrives_as_what_the_caller_can_do(
    place: GrpcPlace, error: FedmlError, arrives: type[FedmlError]
) -> None:
    place.world.desk.refusal = error
    with pytest.raises(FedmlError, match=str(error)) as caught:
        await reach(place.world.credentials())
    assert type(caught.value) is arrives


def test_every_error_of_ours_has_a_status() -> None:
    kinds = [FedmlError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        text = FedmlError.__new__(kind)
        assert status_of(text)[0] is not grpc.StatusCode.UNKNOWN


def test_the_transport_needs_no_torch() -> None:
    code = (
        "import sys, fedml.transport.rpc, fedml.transport.server, fedml.transport.memory\n"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
