"""What every `Link` and every `Operations` promises, over gRPC with mutual TLS and in process."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from fedml import __version__
from fedml.errors import ConfigError, PermissionDenied, Refused, Unreachable, Untrusted
from fedml.identity.certificates import identity_of, new_key_and_csr
from fedml.protocol.messages import (
    Accepted,
    Beat,
    Blob,
    Cancel,
    Failed,
    Hello,
    ReleaseNotice,
    RunId,
    TaskId,
    Welcome,
)
from fedml.protocol.operations import RunInfo
from fedml.telemetry import BYTES
from fedml.transport.chunks import Intake
from fedml.transport.link import Link
from tests.transport.world import HELLO, MIB, TASK, GrpcPlace, MemoryPlace, Place, World

T = TypeVar("T")
DATA = random.Random(1).randbytes(3 * MIB + 17)


@pytest.fixture(params=[GrpcPlace, MemoryPlace], ids=["grpc", "memory"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    place: Place = request.param(World.build(tmp_path))
    await place.start()
    yield place
    await place.stop()


@pytest.fixture
async def link(place: Place) -> AsyncIterator[Link]:
    link = place.link("mercy")
    yield link
    await link.close()


async def soon(wait: Awaitable[T]) -> T:
    async with asyncio.timeout(60):
        return await wait


def carried(way: str) -> float:
    return float(BYTES.labels(way)._value.get())


async def test_commands_and_events_arrive_in_order(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    assert await soon(link.receive()) == Welcome("test", 15.0)
    for number in range(20):
        place.world.desk.sends["mercy"](Cancel(TaskId(f"t{number}"), "why not"))
        await link.send(Accepted(TaskId(f"t{number}")))
    for number in range(20):
        assert await soon(link.receive()) == Cancel(TaskId(f"t{number}"), "why not")
    heard = [await soon(place.world.desk.heard.get()) for _ in range(21)]
    assert heard == [("mercy", HELLO)] + [
        ("mercy", Accepted(TaskId(f"t{number}"))) for number in range(20)
    ]


async def test_many_may_send_at_once(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    events = {Failed(TaskId(f"t{number}"), "x" * 60_000) for number in range(50)}
    await asyncio.gather(*(link.send(event) for event in events))
    heard = [await soon(place.world.desk.heard.get()) for _ in range(51)]
    assert {event for _, event in heard[1:]} == events


async def test_a_refusal_reaches_the_site_and_is_final(place: Place, link: Link) -> None:
    place.world.desk.refusal = Refused("recipe heart is not known here")
    with pytest.raises(Refused, match="recipe heart is not known here"):
        await soon(link.connect(HELLO))


async def test_a_stream_starts_with_hello(place: Place, link: Link) -> None:
    with pytest.raises(Untrusted, match="starts with Hello"):
        await soon(link.connect(Beat()))  # type: ignore[arg-type]


async def test_a_second_hello_ends_the_stream(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    await link.send(HELLO)
    await soon(link.receive())
    with pytest.raises(Untrusted, match="a second Hello"):
        await soon(link.receive())


async def test_nothing_is_received_or_sent_before_connect(place: Place, link: Link) -> None:
    with pytest.raises(Unreachable, match="connect first"):
        await link.receive()
    with pytest.raises(Unreachable, match="connect first"):
        await link.send(Beat())


async def test_a_second_stream_of_a_site_replaces_the_first(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    await soon(link.receive())
    other = place.link("mercy")
    await soon(other.connect(Hello("2", "cpu")))
    with pytest.raises(Refused, match="another connection of site mercy took over"):
        await soon(link.receive())
    heard = [await soon(place.world.desk.heard.get()) for _ in range(3)]
    assert heard == [("mercy", HELLO), ("mercy", "gone"), ("mercy", Hello("2", "cpu"))]
    await other.send(Beat())
    assert [await soon(other.receive()) for _ in range(2)] == [Welcome("test", 15.0), Beat()]
    await other.close()


async def test_streams_of_two_sites_do_not_meet(place: Place, link: Link) -> None:
    other = place.link("charite")
    await link.connect(HELLO)
    await other.connect(HELLO)
    place.world.desk.sends["charite"](ReleaseNotice("m"))
    await link.send(Beat())
    assert [await soon(link.receive()) for _ in range(2)] == [Welcome("test", 15.0), Beat()]
    assert [await soon(other.receive()) for _ in range(2)][1] == ReleaseNotice("m")
    await other.close()


async def test_the_coordinator_learns_that_a_site_hung_up(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    assert await soon(place.world.desk.heard.get()) == ("mercy", HELLO)
    await link.close()
    assert await soon(place.world.desk.heard.get()) == ("mercy", "gone")
    place.world.desk.sends["mercy"](Beat())  # a send to nobody does nothing


async def test_hanging_up_wakes_who_waits_for_a_command(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    await soon(link.receive())
    waiting = asyncio.ensure_future(link.receive())
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(Unreachable):
        await soon(waiting)


@pytest.mark.parametrize("turns", range(4))
async def test_hanging_up_wakes_who_waits_for_the_welcome(
    place: Place, link: Link, turns: int
) -> None:
    """However far the stream has come; gRPC forgets a call that is about to begin, we do not."""
    connecting = asyncio.create_task(link.connect(HELLO))
    for _ in range(turns):
        await asyncio.sleep(0)
    await link.close()
    try:
        await soon(connecting)
    except Unreachable:
        return
    await link.close()


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("way", ["up", "down"])
async def test_hanging_up_ends_a_transfer_that_is_about_to_begin(
    place: Place, link: Link, way: str, turns: int
) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    blob = (mine if way == "up" else desk.store).put_bytes(DATA)
    desk.asked_for.add(blob)
    desk.may_get.add(blob.digest)
    await link.connect(HELLO)
    work = link.upload(blob, mine, TASK) if way == "up" else link.download(blob, mine)
    sending = asyncio.create_task(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    await link.close()
    with suppress(Unreachable):
        await soon(sending)
    assert sending.done()


async def test_a_site_that_does_not_read_is_cut_off(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    for _ in range(1200):  # the host never waits, whatever the site does
        place.world.desk.sends["mercy"](Cancel(TaskId("t"), "x"))
    with pytest.raises(Unreachable, match="reads too slowly"):
        while True:
            await soon(link.receive())


async def test_a_link_reconnects_after_the_coordinator_was_away(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    await soon(link.receive())
    await place.stop()
    with pytest.raises(Unreachable):
        await soon(link.receive())
    with pytest.raises(Unreachable):
        await soon(link.connect(HELLO))
    with pytest.raises(Unreachable):
        await soon(link.fetch("x", 10))
    await place.start()
    await soon(link.connect(HELLO))
    assert await soon(link.receive()) == Welcome("test", 15.0)


async def test_a_revoked_site_is_off_at_its_next_word(place: Place, link: Link) -> None:
    await link.connect(HELLO)
    await soon(link.receive())
    await place.world.desk.revoke(place.world.identity("eve", "operator"), "mercy")
    await link.send(Beat())
    with pytest.raises(PermissionDenied, match="the certificate of site mercy was revoked"):
        await soon(link.receive())
    with pytest.raises(PermissionDenied, match="was revoked"):
        await soon(link.connect(HELLO))


async def test_a_blob_comes_and_goes_whole(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    for data in (DATA, b"", b"x", DATA[:MIB]):
        there = desk.store.put_bytes(data)
        desk.may_get.add(there.digest)
        await soon(link.download(there, mine))
        assert mine.path(there.digest).read_bytes() == data
        here = mine.put_bytes(data, b"from the site")
        desk.asked_for.add(here)
        await soon(link.upload(here, mine, TASK))
        assert desk.store.path(here.digest).read_bytes() == data + b"from the site"


@pytest.mark.parametrize("there", range(4))
async def test_a_transfer_goes_on_from_what_has_come(place: Place, link: Link, there: int) -> None:
    desk, mine, start = place.world.desk, place.world.site_store(), there * MIB
    blob = desk.store.put_bytes(DATA)
    desk.may_get.add(blob.digest)
    _begin(mine.receive(blob), start)
    before = carried("in")
    await soon(link.download(blob, mine))
    assert carried("in") - before == len(DATA) - start
    assert mine.path(blob.digest).read_bytes() == DATA
    desk.store.delete(blob.digest)
    desk.asked_for.add(blob)
    _begin(desk.store.receive(blob, "mercy"), start)
    before = carried("in")
    await soon(link.upload(blob, mine, TASK))
    assert carried("in") - before == len(DATA) - start
    assert desk.store.path(blob.digest).read_bytes() == DATA


def _begin(intake: Intake, size: int) -> None:
    for offset in range(0, size, MIB):
        intake.write(DATA[offset : offset + MIB])
    intake.close()


async def test_what_is_there_already_is_not_sent_again(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    blob = desk.store.put_bytes(DATA)
    mine.put_bytes(DATA)
    desk.may_get.add(blob.digest)
    desk.asked_for.add(blob)
    before = carried("in")
    await soon(link.download(blob, mine))
    await soon(link.upload(blob, mine, TASK))
    assert carried("in") == before


async def test_a_blob_with_another_content_than_its_name_is_dropped(
    place: Place, link: Link
) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    liar = Blob(hashlib.sha256(b"something else").hexdigest(), len(DATA))
    for store in (desk.store, mine):
        (store.folder / liar.digest).write_bytes(DATA)
    desk.may_get.add(liar.digest)
    with pytest.raises(Untrusted, match="the digest is wrong; dropped"):
        await soon(link.download(liar, place.world.site_store("empty")))
    assert not any((place.world.folder / "empty").iterdir())
    desk.store.delete(liar.digest)
    desk.asked_for.add(liar)
    with pytest.raises(Untrusted, match="the digest is wrong; dropped"):
        await soon(link.upload(liar, mine, TASK))
    assert not any(desk.store.folder.iterdir())


async def test_a_blob_longer_than_announced_is_dropped(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    liar = Blob(hashlib.sha256(DATA).hexdigest(), 2 * MIB)
    for store in (desk.store, mine):
        (store.folder / liar.digest).write_bytes(DATA)
    desk.may_get.add(liar.digest)
    with pytest.raises(Untrusted, match="more than 2097152 bytes"):
        await soon(link.download(liar, place.world.site_store("empty")))
    desk.store.delete(liar.digest)
    desk.asked_for.add(liar)
    with pytest.raises(Untrusted, match="more than 2097152 bytes"):
        await soon(link.upload(liar, mine, TASK))
    assert not any(desk.store.folder.iterdir())


async def test_a_blob_over_the_stores_limit_is_refused_before_it_travels(
    place: Place, link: Link
) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    here = mine.put_bytes(DATA)
    desk.asked_for.add(here)
    desk.store.limit_bytes = MIB
    before = carried("out")
    with pytest.raises(Refused, match="limit 1048576"):
        await soon(link.upload(here, mine, TASK))
    assert carried("out") == before
    assert not any(desk.store.folder.iterdir())


async def test_a_blob_that_is_not_there_is_said(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    absent = Blob("0" * 64, 5)
    desk.may_get.add(absent.digest)
    desk.asked_for.add(absent)
    for transfer in (link.download(absent, mine), link.upload(absent, mine, TASK)):
        with pytest.raises(Refused, match="blob 000000000000 is not here"):
            await soon(transfer)


async def test_blobs_need_leave_either_way(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    secret = desk.store.put_bytes(b"for another site")
    with pytest.raises(Refused, match="is not for site mercy"):
        await soon(link.download(secret, mine))
    unasked = mine.put_bytes(b"spam")
    with pytest.raises(Refused, match="nobody asked site mercy for blob"):
        await soon(link.upload(unasked, mine, TASK))
    assert not desk.store.has(unasked.digest)


async def test_an_older_transfer_gives_way_to_a_newer_one(place: Place, link: Link) -> None:
    desk, mine = place.world.desk, place.world.site_store()
    blob = mine.put_bytes(DATA)
    desk.asked_for.add(blob)
    older = desk.store.receive(blob, "mercy")
    older.write(DATA[:MIB])
    await soon(link.upload(blob, mine, TASK))
    with pytest.raises(Unreachable, match="a newer transfer took over"):
        older.write(DATA[MIB : 2 * MIB])
    assert desk.store.path(blob.digest).read_bytes() == DATA


async def test_a_named_file_is_fetched_within_a_limit(place: Place, link: Link) -> None:
    place.world.desk.files |= {"root.json": DATA, "empty": b""}
    assert await soon(link.fetch("root.json", len(DATA))) == DATA
    assert await soon(link.fetch("empty", 0)) == b""
    with pytest.raises(Untrusted, match="longer than 100 bytes"):
        await soon(link.fetch("root.json", 100))
    with pytest.raises(ConfigError, match=r"no file '2\.root\.json'"):
        await soon(link.fetch("2.root.json", 100))


async def test_renewal_gives_a_certificate_for_the_same_site(place: Place, link: Link) -> None:
    _, csr = new_key_and_csr("root")
    admission = await soon(link.renew(csr))
    who = place.world.identity()
    renewed = identity_of(admission.certificate, who.issued + 1)
    assert (renewed.name, renewed.role) == ("mercy", "site")
    with pytest.raises(Untrusted):
        await soon(link.renew(b"garbage"))


async def test_the_coordinator_tells_its_clock_and_version(place: Place, link: Link) -> None:
    before = time.time()
    pong = await soon(link.ping())
    assert before <= pong.time <= time.time()
    assert pong.version == __version__


async def test_a_site_that_left_is_refused_until_it_joins_again(place: Place, link: Link) -> None:
    await soon(link.leave())
    with pytest.raises(PermissionDenied, match="was revoked; join with a new token"):
        await soon(link.ping())


async def test_an_operator_reaches_every_part_of_the_desk(place: Place) -> None:
    desk, eve = place.world.desk, place.operations("eve", "operator")
    mercy = place.world.identity()
    assert (await soon(eve.submit("{}", 12.5))).state == "queued"
    assert desk.calls[0][2:] == ("{}", "12.5")
    assert [info.round for info in await soon(eve.list_runs())] == [0, 1, 2]
    assert (await soon(eve.stop_run(RunId("r1")))).state == "stopped"
    assert (await soon(eve.resume_run(RunId("r1")))).state == "queued"
    assert [v.version for v in await soon(eve.list_models())] == [1, 2]
    assert (await soon(eve.show_model("m", 7))).version == 7
    assert (await soon(eve.release("m", 7))).version == 7
    assert (await soon(eve.rollback("m"))).version == 1
    assert [site.site for site in await soon(eve.list_sites())] == ["mercy"]
    assert (await soon(eve.invite("new", "viewer", 60.0))).role == "viewer"
    await soon(eve.revoke("mercy"))
    with pytest.raises(PermissionDenied, match="revoked"):
        place.world.access.check(mercy, "Federation/Connect", mercy.issued)
    assert [call[:2] for call in desk.calls] == [
        (name, "operator eve")
        for name in ("submit", "stop_run", "resume_run", "release", "rollback")
    ]
    await eve.close()


async def test_a_long_run_is_shown_whole(place: Place) -> None:
    place.world.desk.receipts = 1001
    eve = place.operations("eve", "viewer")
    detail = await soon(eve.show_run(RunId("r1")))
    assert [receipt.round for receipt in detail.receipts] == list(range(1001))
    assert detail.plan == '{"plan":1}'
    assert [int(seal.link, 16) for seal in detail.seals] == list(range(1001))
    assert detail.sealer == "PEM"
    await eve.close()


async def test_a_watched_run_is_pushed_at_each_change(place: Place) -> None:
    eve = place.operations("eve", "viewer")
    watch = eve.watch_run(RunId("r1"))
    assert (await soon(anext(watch))).state == "running"
    place.world.desk.changed.set()
    last: list[RunInfo] = [info async for info in watch]
    assert [info.state for info in last] == ["done"]
    await eve.close()


async def test_a_desks_refusal_keeps_its_class_and_line(place: Place) -> None:
    eve = place.operations("eve", "operator")
    with pytest.raises(ConfigError, match="the plan is empty"):
        await soon(eve.submit(""))
    with pytest.raises(ConfigError, match="versions start at 1"):
        await soon(eve.release("m", 0))
    await eve.close()


async def test_a_role_does_only_its_own(place: Place) -> None:
    site, viewer = place.operations("mercy", "site"), place.operations("vic", "viewer")
    with pytest.raises(PermissionDenied, match="role 'site' may not call Operations/Submit"):
        await soon(site.submit("{}"))
    with pytest.raises(PermissionDenied, match="role 'viewer' may not call Operations/Release"):
        await soon(viewer.release("m", 1))
    assert place.world.desk.calls == []
    await site.close()
    await viewer.close()
