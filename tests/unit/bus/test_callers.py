"""Who calls: found out once, and refused when it cannot be."""

from __future__ import annotations

import asyncio

import pytest

from hostimage_dbus.transport import BusClosed, BusError
from hostimaged.bus.callers import WAITING_PER_NAME, Callers
from hostimaged.bus.polkit import Caller
from hostimaged.errors import AccessDenied, LimitsExceeded


class FakeBus:
    def __init__(self, uids: dict[str, int]) -> None:
        self.uids = uids
        self.asked: list[str] = []
        self.error: BusError | None = None

    async def unix_user(self, name: str, timeout: float) -> int:  # noqa: ASYNC109
        assert 0 < timeout <= 25
        self.asked.append(name)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return self.uids[name]


async def test_a_caller_is_asked_for_once() -> None:
    bus = FakeBus({":1.1": 7})
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(bus, tasks)  # type: ignore[arg-type]
        together = await asyncio.gather(*(callers.identify(":1.1") for _ in range(WAITING_PER_NAME)))
        assert set(together) == {Caller(":1.1", 7)}
        assert await callers.identify(":1.1") == Caller(":1.1", 7)
    assert bus.asked == [":1.1"]


@pytest.mark.parametrize(
    "error", [BusError("org.freedesktop.DBus.Error.NameHasNoOwner", "gone"), BusClosed("gone")]
)
async def test_what_cannot_be_found_out_is_a_refusal(error: BusError) -> None:
    bus = FakeBus({":1.1": 0})
    bus.error = error
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(bus, tasks)  # type: ignore[arg-type]
        with pytest.raises(AccessDenied):
            await callers.identify(":1.1")
        bus.error = None
        assert (await callers.identify(":1.1")).uid == 0


async def test_one_call_that_is_given_up_does_not_hurt_the_others() -> None:
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(FakeBus({":1.1": 7}), tasks)  # type: ignore[arg-type]
        first = asyncio.create_task(callers.identify(":1.1"))
        second = asyncio.create_task(callers.identify(":1.1"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).uid == 7
        assert first.cancelled()


async def test_a_burst_on_a_new_connection_is_cut() -> None:
    bus = FakeBus({":1.1": 7, ":1.2": 8})
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(bus, tasks)  # type: ignore[arg-type]
        burst = [callers.identify(":1.1") for _ in range(WAITING_PER_NAME + 3)]
        found = await asyncio.gather(callers.identify(":1.2"), *burst, return_exceptions=True)
        assert sum(isinstance(one, LimitsExceeded) for one in found) == 3
        assert found[0] == Caller(":1.2", 8)
        assert await asyncio.gather(*(callers.identify(":1.1") for _ in range(100)))
    assert not callers._waiting


async def test_memory_of_callers_is_bounded() -> None:
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(FakeBus({f":1.{n}": 0 for n in range(3000)}), tasks)  # type: ignore[arg-type]
        for number in range(3000):
            await callers.identify(f":1.{number}")
    assert len(callers._known) == 1024
    assert not callers._asking
