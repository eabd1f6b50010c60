"""Slots, turns and pulses of the coordinator's transfers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedpruner_common.chunks import make_chunk
from fedpruner_common.errors import Busy, Unavailable
from fedpruner_server import transfers
from fedpruner_server.transfers import Downloads, Pace, UploadSlots, watched


async def soon(predicate) -> None:
    """Until it is true; the test's own time limit is the bound."""
    while not predicate():
        await asyncio.sleep(0.001)


def test_only_so_many_upload_at_a_time_and_the_others_in_the_order_they_came() -> None:
    async def run() -> list[str]:
        slots, order = UploadSlots(2), []
        done = {name: asyncio.Event() for name in "abcd"}

        async def upload(name: str) -> None:
            assert await slots.acquire(name, wait_s=60)
            async with slots.use(name):
                order.append(name)
                await done[name].wait()

        tasks = []
        for name in "abcd":
            tasks.append(asyncio.create_task(upload(name)))
            await asyncio.sleep(0)
        await soon(lambda: slots.num_waiting == 2 and len(order) == 2)
        done["b"].set()
        await soon(lambda: len(order) == 3)
        assert slots.num_waiting == 1
        for event in done.values():
            event.set()
        await asyncio.gather(*tasks)
        assert slots.num_waiting == 0
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "d"]


def test_who_waits_too_long_is_told_and_takes_nobodys_place() -> None:
    async def run() -> None:
        slots = UploadSlots(1)
        assert await slots.acquire("a", wait_s=0)
        assert not await slots.acquire("b", wait_s=0.01)
        assert slots.num_waiting == 0
        async with slots.use("a"):
            pass
        assert await slots.acquire("c", wait_s=0)

    asyncio.run(run())


def test_a_slot_that_is_not_used_soon_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_BEGIN_S", 0.01)

    async def run() -> None:
        slots = UploadSlots(1)
        assert await slots.acquire("gone", wait_s=0)
        assert await slots.acquire("next", wait_s=60)
        with pytest.raises(Busy, match="ask for an upload slot first"):
            async with slots.use("gone"):
                pass

    asyncio.run(run())


def test_asking_again_keeps_the_slot() -> None:
    async def run() -> None:
        slots = UploadSlots(1)
        assert await slots.acquire("a", wait_s=0)
        assert await slots.acquire("a", wait_s=0)
        async with slots.use("a"):
            assert await slots.acquire("a", wait_s=0)

    asyncio.run(run())


def test_a_newer_upload_of_a_client_ends_the_older_one_before_it_begins() -> None:
    async def run() -> list[str]:
        slots, log = UploadSlots(1), []

        async def upload(name: str, until: asyncio.Event) -> None:
            async with slots.use("a"):
                log.append(f"{name} begins")
                try:
                    await until.wait()
                finally:
                    await asyncio.sleep(0)
                    log.append(f"{name} ends")

        assert await slots.acquire("a", wait_s=0)
        never, now = asyncio.Event(), asyncio.Event()
        older = asyncio.create_task(upload("older", never))
        await soon(lambda: log == ["older begins"])
        assert await slots.acquire("a", wait_s=0)  # its connection broke; it asks again
        newer = asyncio.create_task(upload("newer", now))
        await soon(lambda: len(log) == 3)
        now.set()
        await newer
        with pytest.raises(asyncio.CancelledError):
            await older
        assert await slots.acquire("b", wait_s=0)  # the slot is free again
        return log

    assert asyncio.run(run()) == ["older begins", "older ends", "newer begins", "newer ends"]


def test_a_transfer_whose_pulse_stops_is_ended_and_one_that_beats_is_not() -> None:
    async def transfer(beats: int) -> str:
        with watched(0.1) as pulse:
            for _ in range(beats):
                await asyncio.sleep(0.03)
                pulse.beat()
            if beats < 10:
                await asyncio.Event().wait()
            return "done"

    assert asyncio.run(transfer(10)) == "done"  # three times as long as a pulse may be silent
    with pytest.raises(Unavailable, match=r"nothing has moved for 0\.1 s"):
        asyncio.run(transfer(1))


def test_a_cancelled_transfer_stays_cancelled() -> None:
    async def run() -> None:
        async def transfer() -> None:
            with watched(60):
                await asyncio.Event().wait()

        task = asyncio.create_task(transfer())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_transfer_goes_no_faster_than_its_pace() -> None:
    async def seconds(rate: float) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        pace = Pace(rate)
        for _ in range(5):
            await pace.moved(1000)
        return loop.time() - began

    assert asyncio.run(seconds(50_000)) >= 0.1  # 5,000 bytes
    assert asyncio.run(seconds(0)) < 0.1


async def numbered(count: int) -> AsyncIterator:
    for index in range(count):
        yield make_chunk(b"x", blob=index, offset=0)


def test_downloads_beyond_the_limit_wait_and_are_told_that_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "_STILL_WAITING_S", 0.01)

    async def run() -> None:
        downloads = Downloads(1, bytes_per_s=0, idle_s=60)
        first = downloads.in_turn(numbered(2))
        assert (await anext(first)).data == b"x"
        second = downloads.in_turn(numbered(1))
        assert (await anext(second)).data == b""  # not yet
        assert (await anext(second)).data == b""
        assert [c.blob async for c in first] == [1]
        assert [c.data async for c in second if c.data] == [b"x"]
        third = downloads.in_turn(numbered(3))  # one that is given up frees its turn
        await anext(third)
        await third.aclose()
        assert [c.blob async for c in downloads.in_turn(numbered(2))] == [0, 1]

    asyncio.run(run())


def test_a_download_that_is_given_up_while_it_waits_takes_nobodys_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "_STILL_WAITING_S", 0.01)

    async def run() -> None:
        downloads = Downloads(1, bytes_per_s=0, idle_s=60)
        first = downloads.in_turn(numbered(2))
        await anext(first)
        waiting = downloads.in_turn(numbered(1))
        await anext(waiting)
        await waiting.aclose()
        await first.aclose()
        assert [c.blob async for c in downloads.in_turn(numbered(1))] == [0]

    asyncio.run(run())
