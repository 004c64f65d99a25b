"""What is done for a caller is what was authorised: nothing is waited for in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostimage_dbus.transport import MethodCall
from hostimage_testing.host import scratch_host
from hostimaged.bus.authorization import Member
from hostimaged.bus.callers import Callers
from hostimaged.bus.findings import ImageRow
from hostimaged.bus.gate import Gate
from hostimaged.bus.guarded import GuardedMethods
from hostimaged.bus.polkit import Caller
from hostimaged.bus.requests import Request
from hostimaged.config import Settings
from hostimaged.errors import AccessDenied, Busy
from hostimaged.jobs.job import Initiator
from hostimaged.jobs.operations import Operation, Stage

USER, NAME = 1000, ":1.7"
TRACKED = "docker://registry.example/os:latest"
OLD, NEW = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def pulled(digest: str, time: int) -> ImageRow:
    return ImageRow(manifest_digest=digest, reference=TRACKED, pulled=time)


class World:
    """The model, the bus, polkit and the queue in one."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.tracked_image = TRACKED
        self.images = [pulled(OLD, 1)]
        self.deployed: dict[str, str] = {}
        self.is_known = True
        self.meanwhile: Callable[[], None] = lambda: None
        self.pids_asked = 0
        self.actions: list[str] = []
        self.refuses: set[str] = set()
        self.jobs: list[tuple[Operation, Initiator]] = []

    def deployment_at(self, path: str) -> str:
        raise AssertionError(path)

    def unifies(self, request: Request) -> bool:
        return False

    def check_unified(self, request: Request) -> None:
        assert request.member is not Member.SET_UNIFIED

    def check_background(self, request: Request) -> None:
        assert not request.options.get("background", False)

    async def known(self, patience: float) -> bool:
        assert patience > 0
        return self.is_known

    async def reload(self) -> None:
        raise AssertionError

    async def unix_user(self, name: str, timeout: float) -> int:  # noqa: ASYNC109
        assert (name, timeout > 0) == (NAME, True)
        return USER

    async def process_id(self, name: str, timeout: float) -> int:  # noqa: ASYNC109
        assert (name, timeout > 0) == (NAME, True)
        self.pids_asked += 1
        self.meanwhile()
        return 1

    def trusts(self, uid: int) -> bool:
        return uid == 0

    async def authorize(self, caller: Caller, action: Any, *_: Any, interactive: bool) -> None:
        assert (caller.uid, interactive) == (USER, False)
        self.actions.append(str(action).rpartition(".")[2])
        if self.actions[-1] in self.refuses:
            raise AccessDenied("no")

    async def submit(self, operation: Operation, initiator: Initiator, *_: Any, **__: Any) -> Any:
        self.jobs.append((operation, initiator))
        return SimpleNamespace(path="/job")


async def stage(world: World, paths: Any, times: int = 1) -> None:
    """Ask for the image that was the newest, over one connection."""
    flags = {"no_reply": False, "interactive": False, "oversize": False}
    call = MethodCall("/", None, "Stage", "sa{sv}", [OLD, {}], NAME, 1, **flags)
    stand_in: Any = world
    async with asyncio.TaskGroup() as tasks:
        callers = Callers(stand_in, tasks)
        gate = Gate(callers, stand_in, stand_in, paths)
        methods = GuardedMethods(
            gate,
            callers,
            stand_in,
            stand_in,
            stand_in,
            reload=world.reload,
            set_policy=stand_in,
            known=world.known,
        )
        try:
            for _ in range(times):
                assert await methods.answer(Member.STAGE, call) == ["/job"]
        finally:
            # Units and the trust in sources are looked up in threads.
            await asyncio.get_running_loop().shutdown_default_executor()


async def test_the_newest_image_of_the_tracked_is_an_update(tmp_path: Path) -> None:
    world = World()
    await stage(world, scratch_host(tmp_path))
    assert world.actions == ["update"]


async def test_an_image_that_stops_being_the_newest_is_authorised_anew(tmp_path: Path) -> None:
    world = World()
    world.meanwhile = lambda: world.images.append(pulled(NEW, 2))
    await stage(world, scratch_host(tmp_path))
    assert world.actions[-1] == "switch-image"
    ((operation, _),) = world.jobs
    assert isinstance(operation, Stage)
    assert operation.manifest_digest == OLD


async def test_nothing_is_done_to_a_host_that_is_not_known_yet(tmp_path: Path) -> None:
    """What it follows, for one, would be taken from the settings, though it was switched to another image."""
    world = World()
    world.is_known = False
    with pytest.raises(ExceptionGroup) as refused:
        await stage(world, scratch_host(tmp_path))
    assert refused.group_contains(Busy, match="still being looked for: try again later")
    assert (world.jobs, world.actions) == ([], [])


async def test_nor_is_it_staged_if_that_is_refused(tmp_path: Path) -> None:
    world = World()
    world.refuses = {"switch-image"}
    world.meanwhile = lambda: world.images.append(pulled(NEW, 2))
    with pytest.raises(ExceptionGroup) as refused:
        await stage(world, scratch_host(tmp_path))
    assert refused.group_contains(AccessDenied)
    assert world.jobs == []


async def test_a_connection_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostimaged.bus.callers.unit_of_process", lambda pid, uid: f"{pid}-{uid}.service")
    world = World()
    await stage(world, scratch_host(tmp_path), times=3)
    assert world.pids_asked == 1
    assert [initiator.unit for _, initiator in world.jobs] == [f"1-{USER}.service"] * 3
