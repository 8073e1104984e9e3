"""A transfer that comes in keeps a peer alive whose words wait behind it; a trickle does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.transport.flow import GROWTH, PATIENCE, SLOW, next_size
from fedml.transport.pulse import TRICKLE, Pulse, leave
from tests.clockwork import play

KIB = 2**10


@pytest.mark.parametrize(
    ("size", "seconds", "allowed"),
    [
        (64 * KIB, 0.5, 2 * 4 * 0.5),  # the next may be four times as large, at half the pace
        (512 * KIB, 4.0, 2 * 2 * 4.0),  # and none is larger than the largest
        (MAX_CHUNK, 8.0, 2 * 8.0),
        (MAX_CHUNK, 50.0, PATIENCE),
        (60 * KIB, 59.0, PATIENCE),
        (60 * KIB, 61.0, 0.0),  # a trickle
        (1, 0.5, 0.0),
        (0, 0.0, 0.0),  # "it is not your turn": beats come meanwhile
    ],
)
def test_the_next_piece_may_take_as_long_as_it_needs_at_this_pace(
    size: int, seconds: float, allowed: float
) -> None:
    assert leave(size, seconds) == allowed


@pytest.mark.parametrize("pace", [10e3, 125e3, 1e6, 10e6, 1e9])
def test_no_piece_takes_longer_than_the_one_before_allows(pace: float) -> None:
    """At any steady pace, however large the pieces that the sender takes its buffers for."""
    for swallowed in range(0, 4 * MAX_CHUNK, MAX_CHUNK):  # bytes that leave at once, and wait below
        size, sent, allowed = 64 * KIB, 0, PATIENCE
        for _ in range(50):
            assert size / pace <= allowed or allowed == PATIENCE
            allowed, sent = leave(size, size / pace), sent + size
            size = next_size(size, 0.0 if sent < swallowed else size / pace)


def test_pieces_grow_while_the_line_is_quick_and_shrink_while_it_is_slow() -> None:
    sizes = [64 * KIB]
    for seconds in (0.0, 0.0, 0.0, SLOW, 5 * SLOW, 5 * SLOW, 5 * SLOW, 0.0):
        sizes.append(next_size(sizes[-1], seconds))
    assert [size // KIB for size in sizes] == [64, 256, 1024, 1024, 1024, 256, 64, 64, 256]
    assert sizes[1] == GROWTH * sizes[0]


class Line:
    """What comes of a transfer, and the words behind it, when the test says so."""

    def __init__(self) -> None:
        self.pulse, self.words = Pulse(), asyncio.Queue[str]()
        self._chunks = asyncio.Queue[Chunk]()
        self._taking = asyncio.create_task(self._take())

    async def _take(self) -> None:
        async for _ in self.pulse.of(self._come()):
            pass

    async def _come(self) -> AsyncIterator[Chunk]:
        while True:
            yield await self._chunks.get()

    async def send(self, *sizes: int, each: float) -> None:
        for size in sizes:
            await asyncio.sleep(each)
            self._chunks.put_nowait(Chunk(bytes(size)))

    def word(self, silence: float = 15.0) -> asyncio.Task[str]:
        return asyncio.create_task(self.pulse.next(self.words.get(), silence))


def test_a_peer_whose_transfer_moves_is_not_silent_and_is_once_it_stops() -> None:
    async def story() -> None:
        line = Line()
        waiting = line.word()
        await line.send(*[MAX_CHUNK] * 100, each=14.0)
        assert not waiting.done()  # 1400 s without a word
        with pytest.raises(TimeoutError):
            await waiting
        assert line.pulse.silence == 28.0

    assert play(story()) == 1400.0 + 28.0


def test_a_word_does_not_take_back_the_time_that_a_transfer_was_given() -> None:
    async def story() -> None:
        line = Line()
        await line.send(MAX_CHUNK, each=20.0)
        line.words.put_nowait("a beat")
        assert await line.word() == "a beat"
        with pytest.raises(TimeoutError):
            await line.word()

    assert play(story()) == 20.0 + 40.0


def test_a_quick_piece_does_not_take_back_the_time_that_a_slow_one_was_given() -> None:
    async def story() -> None:
        line = Line()
        await line.send(MAX_CHUNK, each=20.0)
        await line.send(MAX_CHUNK, each=1.0)
        with pytest.raises(TimeoutError):
            await line.word()

    assert play(story()) == 20.0 + 40.0


def test_a_piece_that_took_long_counts_as_long_as_words_may() -> None:
    async def story() -> None:
        line = Line()
        waiting = line.word()
        await line.send(MAX_CHUNK, each=1.0)
        with pytest.raises(TimeoutError):
            await waiting

    assert play(story()) == 1.0 + 15.0


def test_a_trickle_is_no_sign_of_life() -> None:
    async def story() -> None:
        line = Line()
        waiting = line.word()
        sending = asyncio.create_task(line.send(*[int(TRICKLE) - 1] * 100, each=1.0))
        with pytest.raises(TimeoutError):
            await waiting
        sending.cancel()

    assert play(story()) == 15.0
