"""A reader of the repository lets others have its lock: now and then by itself, and when it is asked to."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

import hostimage_testing
from hostimage_testing.host import scratch_host
from hostimaged.composefs import fsck
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, LockTimeout
from hostimaged.jobs import host_work
from hostimaged.jobs.channel import PAUSE, RESUME, Channel
from hostimaged.jobs.events import Event, MessageEvent, PausedEvent
from hostimaged.jobs.operations import Check, Diff
from hostimaged.jobs.process import Outcome, Worker, WorkerSettings
from hostimaged.jobs.slices import SLICE

WORKER = Path(hostimage_testing.__file__).with_name("verifying_worker.py")
STREAMS = 60


def made(path: Path) -> Path:
    with Repository.init(path, verity=Verity.OPPORTUNISTIC)[0] as repository:
        for number in range(STREAMS):
            content = repository.store_object(b"%d " % number * 3000)
            with repository.new_stream(ContentType.BLOB) as writer:
                writer.external(content.id, 1)
                repository.write_stream(f"stream-{number:03}", writer)
    return path


def collect(path: Path, name: str) -> None:
    """Remove a stream with its objects, as a collector does."""
    with Repository.open_unlocked(path) as repository, repository.open_stream(name) as stream:
        objects = list(stream.object_refs)
    target = (path / "streams" / name).resolve()
    (path / "streams" / name).unlink()
    target.unlink()
    for id_ in objects:
        (path / "objects" / id_.pathname).unlink()


# --- what others remove during a break is no finding --------------------------------------------------------


class EveryTime:
    """A break wherever there may be one; ``meanwhile`` is done in each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken = 0

    def due(self) -> bool:
        return True

    def take(self) -> None:
        if self.taken < STREAMS // 2:
            collect(self.path, f"stream-{STREAMS - 1 - self.taken:03}")
        self.taken += 1


@pytest.mark.parametrize("worth", [60.0, 0.0], ids=["alone", "with helpers"])
def test_a_collector_between_two_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: float
) -> None:
    monkeypatch.setattr("hostimaged.composefs.fsck_objects._WORTH", worth)
    path = made(tmp_path / "repository")
    breaks = EveryTime(path)
    with Repository.open(path) as repository:
        report = fsck.check(repository, breaks=breaks)
    assert breaks.taken > STREAMS // 2
    assert report.ok, report.text()
    assert report.streams_checked < STREAMS


def test_damage_is_found_all_the_same(tmp_path: Path) -> None:
    path = made(tmp_path / "repository")
    (path / "streams/stream-000").resolve().unlink()
    with Repository.open(path) as repository:
        report = fsck.check(repository, breaks=EveryTime(path))
    assert [finding.kind for finding in report.errors] == [fsck.Kind.BROKEN_SYMLINK]


def test_a_break_may_end_it(tmp_path: Path) -> None:
    path = made(tmp_path / "repository")

    class Ends(EveryTime):
        def take(self) -> None:
            raise Cancelled

    with Repository.open(path) as repository, pytest.raises(Cancelled):
        fsck.check(repository, breaks=Ends(path))


# --- with real processes ------------------------------------------------------------------------------------


class Bench:
    """A worker that verifies; what it told so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repository = scratch_host(root).repository
        self.stop = root / "stop"
        self.events: list[Event] = []
        settings = WorkerSettings(root=root, command=(sys.executable, "-P", str(WORKER)))
        self.worker = Worker(settings, Check(reference=f"dir:{self.stop}"))
        self.news = asyncio.Event()
        self.done: asyncio.Task[Outcome] | None = None

    def take(self, event: Event) -> None:
        self.events.append(event)
        self.news.set()

    async def until(self, *wanted: Event) -> None:
        """Wait for one of the events, from now on."""
        mark = len(self.events)
        async with asyncio.timeout(30):
            while not any(event in wanted for event in self.events[mark:]):
                self.news.clear()
                await self.news.wait()

    async def round(self) -> None:
        mark = sum(isinstance(event, MessageEvent) for event in self.events)
        async with asyncio.timeout(30):
            while sum(isinstance(event, MessageEvent) for event in self.events) == mark:
                self.news.clear()
                await self.news.wait()

    async def result(self) -> Outcome:
        assert self.done is not None
        self.stop.touch()
        async with asyncio.timeout(30):
            return await self.done


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    host = scratch_host(tmp_path)
    host.physical_root.mkdir(exist_ok=True, parents=True)
    await asyncio.to_thread(made, host.repository)
    made_bench = Bench(tmp_path)
    made_bench.done = asyncio.create_task(made_bench.worker.run(made_bench.take))
    await made_bench.round()
    yield made_bench
    if not made_bench.done.done():
        made_bench.worker.cancel()
        await made_bench.done
    await asyncio.get_running_loop().shutdown_default_executor()


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """The exclusive lock of the repository, as others take it; ``BlockingIOError`` if it is held."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


async def test_nobody_waits_long_for_the_lock(bench: Bench) -> None:
    """Another program, which cannot ask our readers to pause, waits for one slice at most."""
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(bench.repository))
    async with asyncio.timeout(SLICE * 10):
        assert await process.wait() == 0
    print(f"waited for {time.monotonic() - started:.2f} s")
    await bench.round()
    outcome = await bench.result()
    assert outcome.result["found"] == []


async def test_a_reader_that_is_asked_to_pause(bench: Bench) -> None:
    bench.worker.pause()
    await bench.until(PausedEvent(paused=True))
    with exclusively(bench.repository):
        before = list(bench.events)
        await asyncio.to_thread(collect, bench.repository, "stream-007")
        await asyncio.sleep(0.3)
        assert bench.events == before, "it does nothing meanwhile"
        bench.worker.resume()
        # The lock is ours still: it waits for it, and may be asked to pause again while it does.
        await bench.until(PausedEvent(paused=False))
        bench.worker.pause()
        await bench.until(PausedEvent(paused=True))
    bench.worker.resume()
    await bench.round()
    outcome = await bench.result()
    assert outcome.failure is None
    assert outcome.result["found"] == []
    assert outcome.result["rounds"] >= 2


async def test_a_reader_that_pauses_can_be_cancelled(bench: Bench) -> None:
    bench.worker.pause()
    await bench.until(PausedEvent(paused=True))
    bench.worker.cancel()
    assert bench.done is not None
    outcome = await bench.done
    assert outcome.failure is not None
    assert outcome.failure.name.endswith(".Cancelled")


# --- the first lock -----------------------------------------------------------------------------------------


def test_a_comparison_that_is_asked_to_pause_waits_for_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a job of ours has the repository alone, the time-out is not for that."""
    document = {"files": {"added": 1, "list": []}, "problems": [], "truncated": False}
    monkeypatch.setattr("hostimaged.host.diff.diff", lambda *_: document)
    monkeypatch.setattr("hostimaged.host.diff.Both.read", lambda *_: None)
    paths = scratch_host(tmp_path)
    paths.physical_root.mkdir(exist_ok=True, parents=True)
    made(paths.repository)
    operation = Diff(deployment="a" * 128, other="b" * 128, lock_timeout=0.5)
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        channel = Channel(theirs)
        with exclusively(paths.repository), ours.makefile("rb") as lines:
            done = pool.submit(host_work.diff, paths, operation, channel)
            channel._take(PAUSE)
            try:
                assert json.loads(lines.readline()) == {"event": "paused", "paused": True}
                with pytest.raises(TimeoutError):
                    done.result(3 * operation.lock_timeout)
            finally:
                channel._take(RESUME)
            assert json.loads(lines.readline()) == {"event": "paused", "paused": False}
            # Others still count.
            with pytest.raises(LockTimeout):
                done.result(20)
        done = pool.submit(host_work.diff, paths, operation, channel)
        assert done.result(20)["files-added"] == 1
        channel._input.close()
