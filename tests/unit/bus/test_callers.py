"""Who calls: found out once, and refused when it cannot be."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import pytest

from hostimage_dbus.transport import BusClosed, BusError, MethodCall
from hostimaged.bus.callers import CALLS_PER_UID, Callers
from hostimaged.errors import AccessDenied, LimitsExceeded


class FakeBus:
    def __init__(self, uids: dict[str, int]) -> None:
        self.uids = uids
        self.asked: list[str] = []
        self.error: BusError | None = None

    async def unix_user(self, name: str, timeout: float) -> int:  # noqa: ASYNC109
        assert 0 < timeout <= 25
        self.asked.append(name)
        if self.error:
            raise self.error
        return self.uids[name]


def call(sender: str) -> MethodCall:
    return MethodCall("/", None, "Pull", "", [], sender, 1, no_reply=False, interactive=False, oversize=False)


STRANGER = 65534 if os.geteuid() != 65534 else 65533


@pytest.mark.parametrize("uid", [0, os.geteuid()])
async def test_root_and_the_daemons_own_user_may(uid: int) -> None:
    bus = FakeBus({":1.1": uid})
    callers = Callers(bus)  # type: ignore[arg-type]
    for _ in range(3):
        async with callers.privileged(call(":1.1")) as found:
            assert found == uid
    assert bus.asked == [":1.1"]


async def test_others_may_not() -> None:
    callers = Callers(FakeBus({":1.1": STRANGER}))  # type: ignore[arg-type]
    with pytest.raises(AccessDenied, match="Pull is for root only"):
        async with callers.privileged(call(":1.1")):
            pytest.fail("let in")


@pytest.mark.parametrize("name", ["NameHasNoOwner", "Timeout"])
async def test_what_cannot_be_found_out_is_a_refusal(name: str) -> None:
    bus = FakeBus({":1.1": 0})
    bus.error = BusError(f"org.freedesktop.DBus.Error.{name}", "gone")
    callers = Callers(bus)  # type: ignore[arg-type]
    with pytest.raises(AccessDenied):
        async with callers.privileged(call(":1.1")):
            pytest.fail("let in")
    bus.error = BusClosed("gone")
    with pytest.raises(BusClosed):
        async with callers.privileged(call(":1.1")):
            pytest.fail("let in")


async def test_calls_under_way_are_limited_per_user() -> None:
    callers = Callers(FakeBus({f":1.{n}": 0 for n in range(1000)}))  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        for number in range(CALLS_PER_UID):
            await stack.enter_async_context(callers.privileged(call(f":1.{number}")))
        with pytest.raises(LimitsExceeded):
            await stack.enter_async_context(callers.privileged(call(":1.999")))
    async with callers.privileged(call(":1.1")):
        assert callers._in_flight.total() == 1
    assert not callers._in_flight


async def test_memory_of_callers_is_bounded() -> None:
    callers = Callers(FakeBus({f":1.{n}": 0 for n in range(3000)}))  # type: ignore[arg-type]
    for number in range(3000):
        async with callers.privileged(call(f":1.{number}")):
            pass
    assert len(callers._uids) == 1024
