"""The gate: nothing is let in that was not authorised as it is then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostimage_dbus.transport import MethodCall
from hostimage_testing.host import scratch_host
from hostimaged.bus.authorization import Member
from hostimaged.bus.gate import CALLS_PER_UID, Gate
from hostimaged.bus.polkit import Caller
from hostimaged.bus.requests import Request
from hostimaged.errors import AccessDenied, InvalidArgs, LimitsExceeded

USER, ROOT = 1000, 0
TRACKED = "docker://registry.example/os:latest"


class FakeCallers:
    def __init__(self) -> None:
        self.asked = 0

    async def identify(self, name: str) -> Caller:
        self.asked += 1
        return Caller(name, ROOT if name == ":root" else USER)


class FakeAuthority:
    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], bool]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.refuses: set[str] = set()

    def trusts(self, uid: int) -> bool:
        return uid == ROOT

    async def authorize(
        self, caller: Caller, action: Any, details: dict[str, str], *, interactive: bool
    ) -> None:
        assert caller.uid == USER
        self.asked.append((str(action).rpartition(".")[2], details, interactive))
        await asyncio.to_thread(self.meanwhile)
        if str(action).rpartition(".")[2] in self.refuses:
            raise AccessDenied("no")


class Bench:
    def __init__(self, root: Path) -> None:
        self.callers, self.authority = FakeCallers(), FakeAuthority()
        self.paths = scratch_host(root)
        self.gate = Gate(self.callers, self.authority, self.paths)  # type: ignore[arg-type]
        self.request = Request(Member.UPGRADE, {}, reference=TRACKED)

    async def enter(
        self, sender: str = ":1.1", prepare: Callable[[], Request] | None = None, **more: Any
    ) -> Request:
        call = MethodCall("/", None, "X", "", [], sender, 1, no_reply=False, interactive=True, oversize=False)
        async with self.gate.passed(call, prepare or (lambda: self.request), **more) as (caller, request):
            assert caller.name == sender
            return request

    @property
    def actions(self) -> list[str]:
        return [action for action, _, _ in self.authority.asked]


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    yield Bench(tmp_path)
    # Whether sources are trusted is looked up in a thread.
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_user_is_authorised_once(bench: Bench) -> None:
    assert await bench.enter() is bench.request
    assert bench.authority.asked == [("update", {"operation": "upgrade", "image": TRACKED}, True)]


async def test_root_is_not_asked_for(bench: Bench) -> None:
    await bench.enter(":root")
    assert bench.actions == []


async def test_two_actions_are_asked_for_in_turn(bench: Bench) -> None:
    bench.request = Request(Member.UPGRADE, {"apply": "reboot"}, reference=TRACKED)
    await bench.enter()
    assert bench.actions == ["update", "reboot-multiple-sessions"]
    bench.authority.refuses = {"reboot-multiple-sessions"}
    with pytest.raises(AccessDenied):
        await bench.enter()


async def test_arguments_are_checked_before_anybody_is_asked(bench: Bench) -> None:
    def wrong() -> Request:
        raise InvalidArgs("wrong")

    with pytest.raises(InvalidArgs):
        await bench.enter(prepare=wrong)
    assert bench.callers.asked == 0


async def test_what_changed_meanwhile_is_asked_for_anew(bench: Bench) -> None:
    other = Request(Member.UPGRADE, {}, reference="docker://registry.example/other:latest")

    def change() -> None:
        bench.request = other

    bench.authority.meanwhile = change
    assert await bench.enter() is other
    assert [details["image"] for _, details, _ in bench.authority.asked] == [TRACKED, other.reference]


async def test_a_source_that_is_trusted_no_more_needs_another_action(bench: Bench) -> None:
    def change() -> None:
        bench.paths.containers.registries.write_text(
            '[[registry]]\nlocation = "registry.example"\ninsecure = true\n'
        )

    bench.authority.meanwhile = change
    await bench.enter()
    assert bench.actions == ["update", "switch-image"]


async def test_what_became_impossible_is_refused(bench: Bench) -> None:
    possible = [True]

    def prepare() -> Request:
        if not possible[0]:
            raise InvalidArgs("gone")
        return bench.request

    bench.authority.meanwhile = lambda: possible.__setitem__(0, False)
    with pytest.raises(InvalidArgs, match="gone"):
        await bench.enter(prepare=prepare)


async def test_a_host_that_never_stands_still(bench: Bench) -> None:
    numbers = iter(range(1000))

    def prepare() -> Request:
        return Request(Member.EXPLAIN, {}, arguments=(next(numbers),))

    with pytest.raises(AccessDenied, match="too fast"):
        await bench.enter(prepare=prepare)


async def test_a_joiner_cancels_without_being_asked(bench: Bench) -> None:
    bench.request = Request(Member.CANCEL)
    await bench.enter(joined=lambda _: True)
    assert bench.actions == []
    await bench.enter(joined=lambda _: False)
    assert bench.actions == ["cancel"]


async def test_calls_under_way_are_limited_per_user(bench: Bench) -> None:
    call = MethodCall("/", None, "X", "", [], ":1.1", 1, no_reply=False, interactive=True, oversize=False)
    bench.request = Request(Member.EXPLAIN)
    async with AsyncExitStack() as stack:
        for _ in range(CALLS_PER_UID):
            await stack.enter_async_context(bench.gate.passed(call, lambda: bench.request))
        with pytest.raises(LimitsExceeded):
            await bench.enter()
        await bench.enter(":root")
    await bench.enter()


async def test_only_root(bench: Bench) -> None:
    call = MethodCall("/", None, "X", "", [], ":root", 1, no_reply=False, interactive=True, oversize=False)
    assert (await bench.gate.only_root(call)).uid == ROOT
    with pytest.raises(AccessDenied):
        await bench.gate.only_root(
            MethodCall("/", None, "X", "", [], ":1.1", 1, no_reply=False, interactive=True, oversize=False)
        )
