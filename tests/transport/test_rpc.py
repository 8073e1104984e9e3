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
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr
from fedml.identity.enrolment import Token
from fedml.protocol._generated import fedml_pb2
from fedml.protocol.codec import MAX_MESSAGE, encode_event
from fedml.protocol.messages import Beat, Welcome
from fedml.transport.rpc import GrpcLink, OperationsClient, join, renew
from fedml.transport.terms import status_of
from tests.transport.world import HELLO, MIB, Cable, GrpcPlace, World

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


async def reach(credentials: Credentials) -> None:
    """Connect and hang up; raises whatever stands in the way."""
    link = GrpcLink(credentials)
    try:
        async with asyncio.timeout(10):
            await link.connect(HELLO)
    finally:
        await link.close()


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


async def test_a_used_token_is_refused(place: GrpcPlace, tmp_path: Path) -> None:
    invitation = place.world.desk.registrar.invite("mercy", "site", 60, time.time())
    await join(invitation.token, tmp_path / "site")
    with pytest.raises(PermissionDenied, match="the join token was used already"):
        await join(invitation.token, tmp_path / "thief")
    assert not (tmp_path / "thief" / "identity.json").exists()


async def test_joining_goes_on_after_the_answer_was_lost(place: GrpcPlace, tmp_path: Path) -> None:
    invitation = place.world.desk.registrar.invite("mercy", "site", 60, time.time())
    await join(invitation.token, tmp_path / "site")
    key = Credentials.load(tmp_path / "site").key
    (tmp_path / "site" / "identity.json").unlink()  # as if we had died before it was written
    (tmp_path / "site" / "joining.key").write_bytes(key)
    assert (await join(invitation.token, tmp_path / "site")).name == "mercy"


async def test_an_expired_token_is_refused(place: GrpcPlace, tmp_path: Path) -> None:
    invitation = place.world.desk.registrar.invite("mercy", "site", 60, time.time() - 61)
    with pytest.raises(PermissionDenied, match="the join token expired; ask for a new one"):
        await join(invitation.token, tmp_path / "site")


async def test_a_token_for_another_authority_is_refused(place: GrpcPlace, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", time.time())
    address = f"127.0.0.1:{place.world.enrolment_port}"
    token = Token("id", "secret", address, other.certificate)
    with pytest.raises(Untrusted, match="the token is for another coordinator"):
        await join(token.text(), tmp_path / "site")


async def test_a_certificate_of_another_authority_is_refused(
    place: GrpcPlace, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", time.time())
    key, csr = new_key_and_csr("mercy")
    forged = other.issue(csr, "mercy", "site", time.time())
    with pytest.raises(Unreachable):  # TLS hangs up without a word
        await reach(replace(place.world.credentials(), certificate=forged, key=key))
    assert place.world.desk.heard.empty()


async def test_a_coordinator_of_another_authority_is_not_trusted(
    place: GrpcPlace, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", time.time())
    with pytest.raises(Untrusted, match="our authority did not give to that name"):
        await reach(replace(place.world.credentials(), ca=other.certificate))


async def test_a_coordinator_under_another_name_is_not_trusted(place: GrpcPlace) -> None:
    address = f"localhost:{place.world.port}"  # its certificate is for 127.0.0.1
    with pytest.raises(Untrusted, match="check the address"):
        await reach(replace(place.world.credentials(), address=address))


async def test_an_expired_certificate_is_refused_at_both_ends(place: GrpcPlace) -> None:
    expired = place.world.credentials(age=86_500, days=1)
    with pytest.raises(PermissionDenied, match="expired; join with a new token"):
        await reach(expired)
    code = await raw(place, "Federation/Offset", b"", expired)
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_does_not_outlive_its_certificate(place: GrpcPlace) -> None:
    link = GrpcLink(place.world.credentials(age=86_400 - 1.5, days=1))
    await link.connect(HELLO)
    assert await link.receive() == Welcome("test", 15.0)
    with pytest.raises(PermissionDenied, match="the certificate expired; renew it"):
        async with asyncio.timeout(10):
            await link.receive()
    await link.close()


async def test_no_certificate_no_entry(place: GrpcPlace) -> None:
    for method in ("Federation/Fetch", "Operations/ListRuns"):
        assert await raw(place, method, b"", None) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_certificate_is_no_entry(place: GrpcPlace) -> None:
    certificate, key = place.world.authority.issue_server(["127.0.0.1"], time.time())
    server = replace(place.world.credentials(), certificate=certificate, key=key)
    assert await raw(place, "Operations/ListRuns", b"", server) is not grpc.StatusCode.OK


async def test_roles_are_held_over_the_wire(place: GrpcPlace) -> None:
    with pytest.raises(PermissionDenied, match="role 'operator' may not call Federation/Connect"):
        await reach(place.world.credentials("eve", "operator"))
    site = OperationsClient(place.world.credentials("mercy", "site"))
    with pytest.raises(PermissionDenied, match="role 'site' may not call Operations/Submit"):
        await site.submit("{}")
    await site.close()
    assert place.world.desk.calls == []


async def test_newcomers_port_offers_nothing_but_joining(place: GrpcPlace) -> None:
    for method in ("Operations/ListRuns", "Federation/Fetch"):
        code = await raw(place, method, b"", None, port=place.world.enrolment_port)
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_named(place: GrpcPlace) -> None:
    second = GrpcPlace(place.world)
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{place.world.port}: is the"):
        await second.start()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\xff", b"\x08" * 1001])
async def test_garbage_is_data_loss_on_every_call(place: GrpcPlace, garbage: bytes) -> None:
    for service in fedml_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            name = f"{service.name}/{method.name}"
            papers = place.world.credentials(
                "x", "operator" if service.name == "Operations" else "site"
            )
            port = place.world.enrolment_port if service.name == "Enrolment" else None
            code = await raw(place, name, garbage, papers, port=port)
            assert code is grpc.StatusCode.DATA_LOSS, name
    await reach(place.world.credentials())


async def test_a_message_over_the_limit_is_refused(place: GrpcPlace) -> None:
    huge = bytes(MAX_MESSAGE + 1)
    code = await raw(place, "Operations/Submit", huge, place.world.credentials("e", "operator"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_garbage_in_an_open_stream_ends_it_and_only_it(place: GrpcPlace) -> None:
    good = GrpcLink(place.world.credentials("charite"))
    await good.connect(HELLO)
    await good.receive()
    code = await raw(
        place, "Federation/Connect", encode_event(HELLO), place.world.credentials(), then=b"\xff"
    )
    assert code is grpc.StatusCode.DATA_LOSS
    await good.send(Beat())
    assert await good.receive() == Beat()
    await good.close()


async def raw(
    place: GrpcPlace,
    method: str,
    request: bytes,
    papers: Credentials | None,
    *,
    port: int | None = None,
    then: bytes | None = None,
) -> grpc.StatusCode:
    """Send bytes past all our own client code; return the status."""
    if papers is None or port is not None:
        terms = grpc.ssl_channel_credentials(place.world.authority.certificate)
    else:
        terms = grpc.ssl_channel_credentials(papers.ca, papers.key, papers.certificate)
    messages = iter([request] if then is None else [request, then])
    async with grpc.aio.secure_channel(f"127.0.0.1:{port or place.world.port}", terms) as channel:
        call = channel.stream_stream(f"/fedml.v1.{method}", bytes, bytes)(messages)
        async with asyncio.timeout(10):
            try:
                async for _ in call:
                    pass
            except grpc.RpcError:
                pass
            return await call.code()


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
    assert held <= chunk * MIB
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
    cable.limit_up = chunk * MIB + 90_000
    with pytest.raises(Unreachable):
        await link.upload(blob, mine)
    await link.close()
    cable.mend()
    held = desk.store.held(blob, "mercy")
    assert held <= chunk * MIB
    await link.upload(blob, mine)
    assert desk.store.path(blob.digest).read_bytes() == DATA
    assert cable.up < len(DATA) - held + 100_000
    await link.close()


async def test_a_cut_cable_is_noticed_and_the_link_comes_back(
    place: GrpcPlace, cable: Cable
) -> None:
    link = GrpcLink(place.world.credentials())
    await link.connect(HELLO)
    await link.receive()
    cable.cut()
    with pytest.raises(Unreachable):
        async with asyncio.timeout(10):
            await link.receive()
    await link.connect(HELLO)
    assert await link.receive() == Welcome("test", 15.0)
    await link.close()


async def test_nobody_there_is_unreachable_at_once(tmp_path: Path) -> None:
    world = World.build(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        world.port = unused.getsockname()[1]
        with pytest.raises(Unreachable, match=f"coordinator at 127.0.0.1:{world.port}"):
            await reach(world.credentials())


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
