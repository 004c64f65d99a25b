"""The service inside the test's own loop: nothing blocks it, and no callback takes long."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import hostimage_testing
from hostimage_dbus.introspection import Interface, load_shipped
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE
from hostimage_dbus.transport import Connection
from hostimage_testing.bus import Bus, Client, Daemon
from hostimaged.bus.holds import Holds
from hostimaged.bus.service import Service
from hostimaged.config import Settings
from hostimaged.jobs.history import History
from hostimaged.jobs.process import WorkerSettings
from hostimaged.system.notify import Notifier
from hostimaged.system.paths import HostPaths

#: The rule is 100 ms on a quiet machine; see the testing notes.
LONGEST_CALLBACK = 0.1 * 5
WORKER = Path(hostimage_testing.__file__).with_name("scripted_worker.py")


@pytest.fixture
def stalls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Durations of all callbacks of the loop, in seconds."""
    durations: list[float] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        started = time.perf_counter()
        run(handle)
        durations.append(time.perf_counter() - started)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    return durations


@pytest.fixture(scope="module")
def interfaces() -> dict[str, Interface]:
    return load_shipped()


@pytest_asyncio.fixture
async def service(bus: Bus, tmp_path: Path, interfaces: dict[str, Interface]) -> AsyncIterator[Daemon]:
    """The service on the private bus, in this process; given as the double that makes scripts."""
    root = tmp_path / "root"
    (root / "run/hostimaged").mkdir(parents=True)
    connection = await Connection.connect(bus.address)
    await connection.request_name(BUS_NAME)
    async with asyncio.TaskGroup() as tasks:
        made = Service(
            connection,
            tasks,
            interfaces=interfaces,
            paths=HostPaths.scratch(root),
            settings=Settings(),
            settings_problems=[],
            load_settings=lambda: (Settings(), []),
            holds=Holds(root / "run/hostimaged/hold.json", "boot"),
            notifier=Notifier({}),
            history=History(root / "run/hostimaged/jobs.json", "boot"),
            boot_id="boot",
            workers=WorkerSettings(root=root, command=(sys.executable, "-P", str(WORKER)), cooperative=1),
            linger=0.2,
        )
        made.start()
        yield Daemon(bus, root)
        await made.stop()
    await connection.close()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_nothing_blocks_the_loop(service: Daemon, client: Client, stalls: list[float]) -> None:
    steps: list[dict[str, Any]] = [{"totals": [2_000_000, 0]}]
    steps += [{"advance": 1000}, {"message": "x" * 900}] * 1000
    image = service.script("large", *steps, {"result": {}})
    path = await client.pull(image)
    cancelled = await client.pull(image, no_join=True)
    while not any(s.body[1] == path for s in client.named("JobRemoved")):
        await client.status()
    await client.cancel(cancelled)
    assert (await client.removed(path))[3] == "done"
    await client.removed(cancelled)
    assert max(stalls) < LONGEST_CALLBACK, sorted(stalls)[-5:]


async def test_a_job_that_ended_goes_away(service: Daemon, client: Client) -> None:
    path = await client.pull(service.script("job", {"result": {}}))
    await client.removed(path)
    assert (await client.job(path))["State"] == "done"
    await client.until(lambda: client.named("InterfacesRemoved"))
    assert client.named("InterfacesRemoved")[0].body == [path, [JOB_INTERFACE]]


async def test_progress_is_limited_on_the_bus(service: Daemon, client: Client, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [{"totals": [100_000, 0]}]
    for number in range(30):
        steps += [{"advance": 3000}, {"wait": str(tmp_path / f"go{number}")}]
    path = await client.pull(service.script("job", *steps, {"result": {}}))
    started = time.monotonic()
    for number in range(30):
        (tmp_path / f"go{number}").touch()
        await asyncio.sleep(0.04)
    await client.removed(path)
    told = client.changes(path, JOB_INTERFACE, "Progress")
    assert told == sorted(told)
    assert told[-1] == 1.0
    # The first and the last come at once, the others five times per second.
    assert len(told) <= (time.monotonic() - started) / 0.2 + 3
