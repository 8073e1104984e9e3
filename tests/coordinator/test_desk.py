"""The desk keeps what a site owes until the round takes it back, whatever the streams do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest

from fedml import telemetry
from fedml.coordinator.desk import Answer, Desk
from fedml.protocol.messages import (
    Accepted,
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    DatasetCard,
    Declined,
    Failed,
    Forget,
    Hello,
    Privacy,
    RecipeId,
    ReleaseNotice,
    RunId,
    Scored,
    SecaggTold,
    Serving,
    SiteEvent,
    SiteId,
    TaskId,
    Trained,
    Training,
    Welcome,
)
from fedml.protocol.secagg import Masking, Part, Secagg
from tests.clockwork import play

C = TypeVar("C")
BERN, KYOTO = SiteId("bern"), SiteId("kyoto")
MODEL = Blob("ab" * 32, 1000)
ORDER = Assignment(
    task=TaskId("run-1.1.1.bern"),
    run=RunId("run-1"),
    round=1,
    kind="train",
    recipe=RecipeId("cancer", "cd" * 32),
    dataset="records",
    model=MODEL,
    training=Training(lr=1.0, steps=1),
    privacy=Privacy(),
)
TRAINED = Trained(ORDER.task, Blob("ef" * 32, 900), 10.0)


@dataclass
class Stream:
    """One site's stream: what the site says, and what it was sent."""

    says: asyncio.Queue[SiteEvent | None] = field(default_factory=asyncio.Queue)
    sent: list[Command] = field(default_factory=list)
    serving: asyncio.Task[None] | None = None

    async def events(self) -> AsyncIterator[SiteEvent]:
        while (event := await self.says.get()) is not None:
            yield event

    async def hang_up(self) -> None:
        self.says.put_nowait(None)
        await self.over()

    async def over(self) -> None:
        assert self.serving is not None
        await self.serving

    def those(self, kind: type[C]) -> list[C]:
        return [command for command in self.sent if isinstance(command, kind)]


@dataclass
class Office:
    """A desk, and all that its owner was told."""

    heartbeat: float = 60.0
    grace: float = 60.0
    counted: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    answers: list[tuple[SiteId, TaskId, Answer]] = field(default_factory=list)
    losses: asyncio.Queue[tuple[SiteId, str]] = field(default_factory=asyncio.Queue)
    changes: int = 0
    roster: str = ""

    def __post_init__(self) -> None:
        self.desk = Desk(
            heartbeat=self.heartbeat,
            grace=self.grace,
            answered=lambda site, order, answer: self.answers.append((site, order.task, answer)),
            lost=lambda site, reason: self.losses.put_nowait((site, reason)),
            changed=self.change,
            was_counted=lambda task: task in self.counted,
            models=lambda: ["cancer"],
            is_over=lambda run: run in self.ended,
            roster=self.roster,
        )

    def change(self) -> None:
        self.changes += 1

    async def attend(self, site: SiteId = BERN, hello: Hello | None = None) -> Stream:
        """Open a stream, and return when the desk has spoken first."""
        stream = Stream()
        said = hello or Hello("1", "cpu")
        stream.serving = asyncio.create_task(
            self.desk.attend(site, said, stream.events(), stream.sent.append)
        )
        await turns()
        return stream


async def turns() -> None:
    """Let everything that is ready have its turn."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_welcome_comes_first_then_what_the_site_has_to_know() -> None:
    office = Office(counted=frozenset({"old.1.1.bern"}))
    office.desk.assign(BERN, ORDER)
    kept = (TaskId("old.1.1.bern"), TaskId("old.2.1.bern"), ORDER.task)
    stream = await office.attend(hello=Hello("1", "cpu", kept=kept))
    welcome, *others = stream.sent
    assert isinstance(welcome, Welcome)
    assert welcome.heartbeat == 60.0
    assert others == [
        Forget(kept[0], counted=True),
        Forget(kept[1], counted=False),
        ORDER,  # kept, and still wanted: no word of forgetting it
        ReleaseNotice("cancer"),
    ]


async def test_a_site_is_told_which_of_its_runs_are_over() -> None:
    office = Office(ended=frozenset({"run-1"}))
    runs = (RunId("run-1"), RunId("run-2"))
    stream = await office.attend(hello=Hello("1", "cpu", runs=runs))
    assert [told.run for told in stream.those(Forget)] == ["run-1"]
    office.desk.conclude(runs[1])
    assert [told.run for told in stream.those(Forget)] == ["run-1", "run-2"]


async def test_what_is_outstanding_is_sent_again_on_every_stream() -> None:
    office = Office()
    first = await office.attend()
    office.desk.assign(BERN, ORDER)
    await first.hang_up()
    second = await office.attend()
    second.says.put_nowait(TRAINED)  # an answer is no end: only its round's is
    await turns()
    await second.hang_up()
    third = await office.attend()
    assert [stream.those(Assignment) for stream in (first, second, third)] == [[ORDER]] * 3
    office.desk.forget(BERN, ORDER.task, counted=True)
    await third.hang_up()
    assert (await office.attend()).those(Assignment) == []


async def test_a_task_that_was_taken_back_is_cancelled_once() -> None:
    office = Office()
    stream = await office.attend()
    office.desk.assign(BERN, ORDER)
    office.desk.cancel(BERN, ORDER.task, "too late")
    office.desk.cancel(BERN, ORDER.task, "too late")
    assert stream.those(Cancel) == [Cancel(ORDER.task, "too late")]
    stream.says.put_nowait(TRAINED)
    await turns()
    assert office.answers == []


async def test_a_run_that_broke_off_is_cleared_away() -> None:
    office = Office()
    stream = await office.attend()
    other = replace(ORDER, task=TaskId("run-2.1.1.bern"), run=RunId("run-2"))
    office.desk.assign(BERN, ORDER)
    office.desk.assign(BERN, other)
    office.desk.abandon(ORDER.run, "the disk is full")
    assert stream.sent[-2:] == [
        Cancel(ORDER.task, "the disk is full"),
        Forget(ORDER.task, counted=False),
    ]
    await stream.hang_up()
    assert (await office.attend()).those(Assignment) == [other]


@pytest.mark.parametrize(
    "answer",
    [
        TRAINED,
        Scored(ORDER.task, {"accuracy": 3.0}, 4.0),
        Declined(ORDER.task, "no"),
        Failed(ORDER.task, "crashed"),
    ],
)
async def test_every_kind_of_answer_is_told_to_the_owner(answer: Answer) -> None:
    office = Office()
    stream = await office.attend()
    office.desk.assign(BERN, ORDER)
    for event in (Beat(), Accepted(ORDER.task), answer):
        stream.says.put_nowait(event)
    await turns()
    assert office.answers == [(BERN, ORDER.task, answer)]


async def test_answers_to_tasks_of_others_or_to_old_ones_are_ignored() -> None:
    office = Office()
    bern, kyoto = await office.attend(), await office.attend(KYOTO)
    office.desk.assign(BERN, ORDER)
    kyoto.says.put_nowait(TRAINED)
    kyoto.says.put_nowait(Declined(ORDER.task, "in the name of bern"))
    bern.says.put_nowait(replace(TRAINED, task=TaskId("run-1.0.1.bern")))
    await turns()
    assert office.answers == []
    bern.says.put_nowait(TRAINED)  # and the stream has taken no harm
    await turns()
    assert office.answers == [(BERN, ORDER.task, TRAINED)]


def test_a_site_that_is_back_within_the_grace_was_never_lost() -> None:
    async def story() -> None:
        office = Office(grace=0.2)
        for _ in range(3):
            await (await office.attend()).hang_up()
        stream = await office.attend()
        await asyncio.sleep(0.25)  # past every grace that began
        assert office.losses.empty()
        await stream.hang_up()
        async with asyncio.timeout(5):
            assert await office.losses.get() == (BERN, "away for more than 0.2 s")

    play(story())


def test_three_heartbeats_of_silence_end_a_stream() -> None:
    async def story() -> None:
        office = Office(heartbeat=0.02, grace=0.01)
        stream = await office.attend()
        async with asyncio.timeout(5):
            await stream.over()
            assert await office.losses.get() == (BERN, "away for more than 0.01 s")
        assert len(stream.those(Beat)) >= 2  # it was spoken to meanwhile
        assert not office.desk.statuses()[0].connected

    play(story())


def test_a_beat_in_time_keeps_a_stream_open() -> None:
    async def story() -> None:
        office = Office(heartbeat=0.15)
        stream = await office.attend()
        for _ in range(6):
            await asyncio.sleep(0.1)
            stream.says.put_nowait(Beat())
        assert office.desk.statuses()[0].connected
        await stream.hang_up()

    play(story())


def test_a_newer_stream_has_the_seat_and_the_older_cannot_lose_it() -> None:
    async def story() -> None:
        office = Office(grace=0.01)
        older = await office.attend()
        newer = await office.attend()
        office.desk.assign(BERN, ORDER)
        assert (older.those(Assignment), newer.those(Assignment)) == ([], [ORDER])
        await older.hang_up()
        assert office.desk.statuses()[0].connected
        await asyncio.sleep(0.03)
        assert office.losses.empty()

    play(story())


async def test_statuses_and_site_list_tell_what_a_site_said_of_itself() -> None:
    office = Office()
    hello = Hello(
        "1.2", "cuda", (ORDER.recipe,), (DatasetCard("records", 7, "ab" * 32),),
        (Serving("cancer", 1, "ab" * 32, "live"),),
    )  # fmt: skip
    stream = await office.attend(hello=hello)
    [status] = office.desk.statuses()
    assert (status.site, status.connected) == (BERN, True)
    assert (status.recipes, status.datasets) == (hello.recipes, hello.datasets)
    stream.says.put_nowait(Serving("cancer", 2, "cd" * 32, "live"))
    stream.says.put_nowait(Serving("stroke", 1, "ef" * 32, "refused", "tampered"))
    await turns()
    [info] = office.desk.sites()
    assert [(s.model, s.version) for s in info.serving] == [("cancer", 2), ("stroke", 1)]
    assert (info.device, info.version, info.connected) == ("cuda", "1.2", True)
    await stream.hang_up()
    assert not office.desk.sites()[0].connected
    assert office.changes == 4  # came, served twice, went


async def test_a_release_is_announced_to_those_who_are_here() -> None:
    office = Office()
    bern, kyoto = await office.attend(), await office.attend(KYOTO)
    await kyoto.hang_up()
    office.desk.announce("stroke")
    assert ReleaseNotice("stroke") in bern.sent
    assert ReleaseNotice("stroke") not in kyoto.sent


@pytest.mark.parametrize(
    ("offer", "objection"),
    [
        (lambda: Blob("11" * 32, 2 * 1000 + 2**20), ""),
        (lambda: Blob("11" * 32, 2 * 1000 + 2**20 + 1), "at most 1050576 bytes are expected"),
    ],
)
def test_an_update_may_be_twice_the_model_and_a_little(
    offer: Callable[[], Blob], objection: str
) -> None:
    desk = Office().desk
    assert desk.objection(BERN, ORDER.task, offer()) == "no update is expected"
    desk.assign(BERN, replace(ORDER, kind="evaluate"))
    assert desk.objection(BERN, ORDER.task, offer()) == "no update is expected"
    desk.assign(BERN, ORDER)
    assert desk.objection(BERN, ORDER.task, offer()) == objection
    assert desk.objection(KYOTO, ORDER.task, offer()) == "no update is expected"
    assert desk.objection(BERN, TaskId("other.1.1.bern"), offer()) == "no update is expected"


MASKING = Masking(1, (BERN, KYOTO, SiteId("oslo")), 3, (Part("w", 100, 1.0),), Secagg("sa1"))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_masked_answer_is_as_long_as_its_parts_and_the_weight(kind: str) -> None:
    desk = Office().desk
    desk.assign(BERN, replace(ORDER, kind=kind, masking=MASKING.to_json()))  # type: ignore[arg-type]
    assert desk.objection(BERN, ORDER.task, Blob("11" * 32, 4 * 102)) == ""
    longer = desk.objection(BERN, ORDER.task, Blob("11" * 32, 4 * 102 + 1))
    assert longer == "at most 408 bytes are expected"


async def test_the_last_word_on_a_task_s_masking_is_said_again_on_every_stream() -> None:
    office = Office()
    first, last = (SecaggTold(ORDER.task, word, b"x") for word in ("adverts", "boxes"))
    office.desk.tell(BERN, first)  # of no task of its
    office.desk.assign(BERN, ORDER)
    office.desk.tell(BERN, first)
    stream = await office.attend()
    assert stream.those(SecaggTold) == [first]
    office.desk.tell(BERN, last)
    await stream.hang_up()
    assert (await office.attend()).those(SecaggTold) == [last]
    office.desk.forget(BERN, ORDER.task, counted=True)
    assert (await office.attend()).those(SecaggTold) == []


def test_a_site_can_mask_if_it_has_accepted_our_roster() -> None:
    async def here(ours: str, theirs: str) -> bool:
        office = Office(roster=ours)
        await office.attend(hello=Hello("1", "cpu", roster=theirs))
        [status] = office.desk.statuses()
        return status.can_mask

    asked = [("ab", "ab"), ("ab", "cd"), ("ab", ""), ("", "")]
    assert [asyncio.run(here(*each)) for each in asked] == [True, False, False, False]


def test_offers_are_counted_for_each_task_alone_so_no_run_bars_a_site_from_another() -> None:
    """One run's task is always under way while the other's come and go."""
    desk = Office().desk
    desk.assign(BERN, ORDER)
    for number in range(100):
        task = TaskId(f"other.{number}.1.bern")
        desk.assign(BERN, replace(ORDER, task=task, run=RunId("other")))
        blobs = [Blob(f"{number:062x}{turn:02x}", 5) for turn in range(4)]
        said = [desk.objection(BERN, task, blob) for blob in blobs]
        assert said == ["", "", "", "it has offered 3 others for this task"]
        assert desk.objection(BERN, task, blobs[0]) == ""
        desk.forget(BERN, task, counted=True)
        assert desk.leftovers(BERN, task) == {blob.digest for blob in blobs[:3]}
        assert desk.leftovers(BERN, task) == set()
    assert desk.objection(BERN, ORDER.task, Blob("11" * 32, 5)) == ""


def test_a_run_that_failed_leaves_no_offers() -> None:
    desk = Office().desk
    desk.assign(BERN, ORDER)
    desk.objection(BERN, ORDER.task, Blob("11" * 32, 5))
    assert desk.abandon(ORDER.run, "the disk is full") == [(BERN, "11" * 32)]
    assert desk.leftovers(BERN, ORDER.task) == set()


async def test_an_answer_that_was_taken_in_is_kept_and_not_asked_for_again() -> None:
    office = Office()
    await office.attend()
    office.desk.assign(BERN, ORDER)
    office.desk.settle(BERN, ORDER.task)
    assert office.desk.is_settled(BERN, ORDER.task)
    office.desk.assign(BERN, ORDER)  # asked for anew
    assert not office.desk.is_settled(BERN, ORDER.task)
    office.desk.settle(BERN, ORDER.task)
    again = await office.attend(hello=Hello("1", "cpu", kept=(ORDER.task,)))
    assert not again.those(Assignment)
    assert not again.those(Forget)
    office.desk.forget(BERN, ORDER.task, counted=True)
    assert again.those(Forget) == [Forget(ORDER.task, True)]
    assert not office.desk.is_settled(BERN, ORDER.task)


def gauge() -> float:
    """Return what the metrics say of how many sites are here."""
    (metric,) = telemetry.SITES.collect()
    return metric.samples[0].value


async def test_the_gauge_counts_sites_and_not_streams() -> None:
    office = Office()
    older = await office.attend()
    newer = await office.attend()
    kyoto = await office.attend(KYOTO)
    assert gauge() == 2
    await older.hang_up()
    assert gauge() == 2
    await newer.hang_up()
    await kyoto.hang_up()
    assert gauge() == 0


def test_every_site_is_spoken_to_also_those_that_came_back() -> None:
    async def story() -> None:
        office = Office(heartbeat=0.1, grace=0.01)
        for _ in range(2):  # the second time all had left
            streams = [await office.attend(SiteId(f"site-{number}")) for number in range(250)]
            async with asyncio.timeout(10):
                while not all(stream.those(Beat) for stream in streams):
                    for stream in streams:
                        stream.says.put_nowait(Beat())
                    await asyncio.sleep(0.02)
            await asyncio.gather(*(stream.hang_up() for stream in streams))

    play(story())
