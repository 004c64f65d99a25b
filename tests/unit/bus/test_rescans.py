"""When there is a scan: after changes, once it is quiet; seldom in a storm; not while a job of ours runs."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio

from hostimaged.bus import rescans
from hostimaged.bus.rescans import Rescans
from hostimaged.host import watches
from hostimaged.system import syscalls
from hostimaged.system.paths import HostPaths

PATIENCE = 20.0
#: Seconds between two scans in these tests.
INTERVAL = 0.3


class Scans:
    """In the place of the status cache: counts scans, and what was there when each began."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self.seen: list[list[str]] = []
        self.times: list[float] = []
        self.takes = 0.0
        self.is_measured = True
        self._news = asyncio.Event()

    async def refresh(self) -> None:
        self.times.append(time.monotonic())
        self.seen.append(await asyncio.to_thread(os.listdir, self._paths.deployments))
        self._news.set()
        await asyncio.sleep(self.takes)

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.seen) < count:
                self._news.clear()
                await self._news.wait()

    async def see(self, name: str) -> None:
        """Wait for a scan that finds something."""
        async with asyncio.timeout(PATIENCE):
            while name not in self.seen[-1]:
                self._news.clear()
                await self._news.wait()


class Bench:
    """Rescans under test."""

    def __init__(self, root: Path) -> None:
        self.paths = HostPaths.scratch(root)
        self.paths.deployments.mkdir(parents=True)
        self.scans = Scans(self.paths)
        self.changing = False
        self.told: list[str] = []
        self.rescans = Rescans(
            self.paths,
            self.scans,  # type: ignore[arg-type]
            lambda: self.changing,
            self.told.append,
        )

    def change(self, name: str) -> None:
        (self.paths.deployments / name).mkdir()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescans, "INTERVAL", INTERVAL)
    monkeypatch.setattr(rescans, "QUIET", 0.05)


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "root")
    yield made
    await asyncio.get_running_loop().shutdown_default_executor()


async def running(bench: Bench, during: Callable[[], Awaitable[None]]) -> None:
    """Run the task while ``during`` does."""

    async def test() -> None:
        await bench.scans.reach(1)
        await during()

    tasks = [asyncio.create_task(bench.rescans.run()), asyncio.create_task(test())]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    await asyncio.wait(tasks)
    for task in done:
        task.result()
    assert tasks[0].cancelled()


async def test_a_change_is_scanned_for(bench: Bench) -> None:
    async def during() -> None:
        for name in ("one", "two", "three"):
            bench.change(name)
            await bench.scans.see(name)

    await running(bench, during)
    assert bench.told == []


async def test_what_changes_while_a_scan_runs_is_scanned_for(bench: Bench) -> None:
    bench.scans.takes = 0.1

    async def during() -> None:
        # The first scan has looked already, and is not back yet.
        bench.change("late")
        assert len(bench.scans.seen) == 1
        await bench.scans.see("late")

    await running(bench, during)


async def test_a_storm_causes_few_scans(bench: Bench) -> None:
    file = bench.paths.deployments / "file"
    began = time.monotonic()

    async def during() -> None:
        while time.monotonic() - began < 4 * INTERVAL:
            for _ in range(100):
                file.write_text("x")
                file.unlink()
            await asyncio.sleep(0)
        bench.change("last")
        await bench.scans.see("last")

    await running(bench, during)
    times = bench.scans.times
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= INTERVAL * 0.99
    assert len(times) <= (times[-1] - began) / INTERVAL + 2


async def test_a_storm_that_does_not_end_is_scanned_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never quiet."""
    monkeypatch.setattr(rescans, "_MOMENTS", 3)
    monkeypatch.setattr(Rescans, "_changed", lambda _self: asyncio.sleep(0, result=True))

    async def during() -> None:
        bench.change("first")
        await bench.scans.see("first")

    await running(bench, during)


async def test_a_long_scan_is_not_followed_by_the_next(bench: Bench) -> None:
    bench.scans.takes = 0.2

    async def during() -> None:
        bench.change("one")
        await bench.scans.see("one")

    await running(bench, during)
    assert bench.scans.times[1] - bench.scans.times[0] >= 0.2 * rescans._SHARE * 0.99 > INTERVAL


async def test_nothing_is_scanned_while_a_job_changes_something(bench: Bench) -> None:
    async def during() -> None:
        bench.changing = True
        bench.change("by-somebody")
        # Time for several scans, if there were any.
        await asyncio.sleep(3 * INTERVAL)
        bench.rescans.job_ended()
        await asyncio.sleep(0.1)
        assert len(bench.scans.seen) == 1
        bench.changing = False
        bench.rescans.job_ended()
        await bench.scans.see("by-somebody")

    await running(bench, during)


async def test_sizes_that_do_not_hold_are_measured_after_a_job(bench: Bench) -> None:
    async def during() -> None:
        bench.rescans.job_ended()
        await asyncio.sleep(3 * INTERVAL)
        assert len(bench.scans.seen) == 1
        bench.scans.is_measured = False
        bench.rescans.job_ended()
        bench.scans.is_measured = True
        await bench.scans.reach(2)

    await running(bench, during)


async def test_it_scans_now_and_then_whatever_happens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescans, "EVERY", 0.1)
    bench.changing = True
    await running(bench, lambda: bench.scans.reach(3))


async def test_without_inotify_it_says_so_and_scans_now_and_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(syscalls, "inotify_init", none_left)
    monkeypatch.setattr(rescans, "EVERY", 0.1)
    await running(bench, lambda: bench.scans.reach(3))
    assert bench.told == ["Too many open files"]


async def test_what_cannot_be_watched_is_told_as_long_as_it_is_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def during() -> None:
        assert len(bench.told) == 1
        monkeypatch.setattr(watches, "MAX_WATCHES", 512)
        bench.change("one")
        await bench.scans.see("one")

    monkeypatch.setattr(watches, "MAX_WATCHES", 3)
    monkeypatch.setattr(rescans, "EVERY", 0.1)
    await running(bench, during)
    assert bench.told == ["there are more than 3 directories to watch", ""]


async def test_what_does_not_matter_wakes_seldom(bench: Bench) -> None:
    """However much of it there is."""
    wakes = 0
    real = bench.rescans._listen

    def counted(*, listen: bool) -> None:
        nonlocal wakes
        wakes += listen
        real(listen=listen)

    bench.rescans._listen = counted  # type: ignore[method-assign]
    noise = bench.paths.physical_root / "noise"
    began = time.monotonic()

    async def during() -> None:
        while time.monotonic() - began < 1:
            noise.write_text("x")
            await asyncio.sleep(0.001)

    await running(bench, during)
    assert len(bench.scans.seen) == 1
    assert 2 <= wakes <= (time.monotonic() - began) / 0.05 + 1
