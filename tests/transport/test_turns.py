"""Few transfers move at a time; all get their turn, and slow peers stand in nobody's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedml.transport import turns
from fedml.transport.turns import Turn, Turns


async def wait_for(turn: Turn) -> None:
    async for _ in turn.waits():
        pass


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_than_so_many_move_and_the_others_follow_in_their_order() -> None:
    some, moving, order = Turns(2), 0, list[int]()
    most, doors = 0, [asyncio.Event() for _ in range(6)]

    async def transfer(number: int) -> None:
        nonlocal moving, most
        with some.turn() as turn:
            await wait_for(turn)
            moving, most = moving + 1, max(most, moving + 1)
            order.append(number)
            await doors[number].wait()
            moving -= 1

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(transfer(number))
        for number in range(6):
            await settle()
            assert order == list(range(min(6, number + 2)))
            doors[number].set()
    assert most == 2


async def test_who_waits_is_told_so_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BEAT", 0.001)
    one, order = Turns(1), list[str]()
    told = {"first": asyncio.Event(), "second": asyncio.Event()}

    async def transfer(name: str) -> None:
        with one.turn() as turn:
            async for _ in turn.waits():
                told[name].set()
            order.append(name)

    with one.turn() as holder:
        await wait_for(holder)
        first = asyncio.create_task(transfer("first"))
        await told["first"].wait()
        second = asyncio.create_task(transfer("second"))
        told["first"].clear()
        await told["second"].wait()
        await told["first"].wait()  # told again, after the second one came
    async with asyncio.timeout(60):
        await asyncio.gather(first, second)
    assert order == ["first", "second"]


async def test_a_slow_peer_gives_its_turn_up_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "SLOW", 0.001)
    one, more = Turns(1), asyncio.Event()

    async def slow_items() -> AsyncIterator[int]:
        yield 1
        await more.wait()
        yield 2

    got: list[int] = []
    with one.turn() as slow:
        await wait_for(slow)
        items = slow.over(slow_items())
        got.append(await anext(items))
        rest = asyncio.ensure_future(anext(items))
        with one.turn() as quick:
            async with asyncio.timeout(60):
                await wait_for(quick)
            more.set()
            await settle()
            assert not rest.done()  # it may not move: the turn is another's
        async with asyncio.timeout(60):
            got.append(await rest)
        assert slow.mine
        await items.aclose()
    assert got == [1, 2]
    with one.turn() as after:
        assert [_ async for _ in after.waits()] == []


async def test_one_who_gives_up_waiting_takes_no_turn_along() -> None:
    one = Turns(1)
    with one.turn() as holder:
        await wait_for(holder)

        async def wait() -> None:
            with one.turn() as turn:
                await wait_for(turn)

        waiting = asyncio.create_task(wait())
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
    with one.turn() as after:
        async with asyncio.timeout(60):
            await wait_for(after)
        assert after.mine
