"""What a service that is asked for a condition may answer; dialogues: tests/bus/test_conditions.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hostimage_dbus.transport import BusClosed, Variant
from hostimaged.jobs.conditions import CONDITIONS, Watch

METERED, _ = CONDITIONS


class FakeBus:
    """Answers with ``replies`` by member; then the connection is lost at the second look."""

    def __init__(self, **replies: list[Any]) -> None:
        self.replies = {"GetNameOwner": [":1.7"], **replies}
        self.hear: Callable[[str, str, str, list[Any], str], None] = lambda *_: None
        self.looks = 0

    def on_signal(self, callback: Callable[[str, str, str, list[Any], str], None]) -> Callable[[], None]:
        self.hear = callback
        return lambda: None

    async def add_match(self, rule: str) -> None:
        assert rule

    async def call(
        self, _destination: str, _path: str, _interface: str, member: str, *_: Any, **__: Any
    ) -> Any:
        if member == "Get":
            self.looks += 1
            if self.looks == 2:
                raise BusClosed("the end")
            asyncio.get_running_loop().call_soon(self.hear, METERED.path, "", "PropertiesChanged", [], ":1.7")
        return self.replies[member]


async def watched(bus: FakeBus) -> list[bool]:
    told: list[bool] = []
    watch = Watch(bus, METERED, lambda _, holds: told.append(holds))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await watch.run()
    return told


@pytest.mark.parametrize("reply", [[], [Variant("u", 1), Variant("u", 1)], [1], [Variant("s", "1")], [None]])
async def test_an_answer_of_another_form_holds_nothing(reply: list[Any]) -> None:
    bus = FakeBus(Get=reply)
    assert await watched(bus) == []
    assert bus.looks == 2, "it is looked at again when there is news"


async def test_an_answer_that_holds() -> None:
    assert await watched(FakeBus(Get=[Variant("u", 1)])) == [True]


@pytest.mark.parametrize("reply", [[], [5], [":1.7", ":1.8"]])
async def test_an_owner_that_is_not_told_is_nobody(reply: list[Any]) -> None:
    bus = FakeBus(GetNameOwner=reply, Get=[Variant("u", 1)])
    watch = Watch(bus, METERED, lambda *_: None)  # type: ignore[arg-type]
    task = asyncio.create_task(watch.run())
    await asyncio.wait([task], timeout=0.3)
    assert not task.done()
    assert bus.looks == 0
    task.cancel()
    await asyncio.wait([task])
