"""A registry in trouble, as a client on the bus sees it; and what the processes of a pull may do then."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JOB_INTERFACE
from hostimage_testing import tars
from hostimage_testing.bus import Client, Daemon
from hostimage_testing.confinement import check_confined
from hostimage_testing.faulty_registry import Fault, FaultyRegistry, Then
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.processes import Process, descendants
from hostimaged.jobs.privileges import CAPABILITIES, Profile

pytestmark = pytest.mark.interop


@pytest.fixture
def registry(tmp_path: Path, skopeo: str) -> Iterator[FaultyRegistry]:
    layout = Layout(tmp_path / "layout")
    tar = tars.directory(b"usr") + tars.file(b"usr/big", os.urandom(3_000_000)) + tars.END
    layout.image("v1", [layout.layer(tar, "none")])
    with FaultyRegistry(layout) as running:
        yield running


@pytest.fixture
def image(registry: FaultyRegistry, real_daemon: Daemon) -> str:
    scratch_host(real_daemon.root, registries=registry.registries_conf)
    return f"docker://{registry.host}/test/os:v1"


def told(client: Client, path: str) -> list[str]:
    return [text for text in client.changes(path, JOB_INTERFACE, "Message") if "trying again" in text]


async def test_retries_are_told_and_the_job_is_done(
    real_daemon: Daemon, client: Client, registry: FaultyRegistry, image: str
) -> None:
    registry.plan("/manifests/", Fault.refusing(503), times=1)
    registry.plan("/blobs/", Fault(after=1_000_000, then=Then.CLOSE), times=1, skip=1)
    await real_daemon.start()
    path = await client.pull(image)
    assert (await client.removed(path))[3:] == ["done", "", ""]
    busy, broken = told(client, path)
    assert "503 Service Unavailable; trying again in" in busy
    assert "unexpected EOF; trying again in" in broken
    job = await client.job(path)
    assert job["BytesDone"] == job["BytesTotal"], "what came twice counts once"


async def test_a_registry_that_is_not_there(
    real_daemon: Daemon, client: Client, registry: FaultyRegistry, image: str
) -> None:
    """The pause before the next try ends at once when the job is cancelled, without any force."""
    registry.stop()
    await real_daemon.start()
    path = await client.pull(image)
    await client.until(lambda: len(told(client, path)) == 2)
    begin = time.monotonic()
    await client.cancel(path)
    assert (await client.removed(path))[3:5] == ["cancelled", ErrorName.CANCELLED]
    assert time.monotonic() - begin < 3
    assert "worker.terminate" not in real_daemon.log.read_text()
    registry.start()
    again = await client.pull(image)
    assert (await client.removed(again))[3] == "done"


async def test_final_errors_are_told_at_once(
    real_daemon: Daemon, client: Client, registry: FaultyRegistry, image: str
) -> None:
    registry.plan("/manifests/", Fault.refusing(404, "MANIFEST_UNKNOWN"))
    await real_daemon.start()
    path = await client.pull(image)
    assert (await client.removed(path))[3:5] == ["failed", ErrorName.IMAGE_NOT_FOUND]
    assert told(client, path) == []


async def test_processes_of_a_pull_are_confined(
    real_daemon: Daemon, client: Client, registry: FaultyRegistry, image: str
) -> None:
    """Worker and skopeo, in the middle of a transfer, hold what the operation declares and no more."""
    registry.plan("/blobs/", Fault(after=1_000_000, then=Then.STALL), skip=1)
    await real_daemon.start()
    path = await client.pull(image)
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, registry.await_fault)
    assert real_daemon.process is not None
    processes = descendants(real_daemon.process.pid)
    try:
        names = sorted(process.name for process in processes)
        assert len(names) == 2, names
        assert "skopeo" in names
        for process in processes:
            check_confined(process, CAPABILITIES[Profile.PULL])
        own = Process(real_daemon.process.pid)
        assert all(process.session != own.session for process in processes)
        assert len({process.session for process in processes}) == 1
    finally:
        await client.cancel(path)
    await client.removed(path)
    assert descendants(real_daemon.process.pid) == []
