"""The service inside the test's own loop: nothing blocks it, and no callback takes long."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import hostimage_testing
from hostimage_dbus.introspection import Interface, load_shipped
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import Connection
from hostimage_testing.bus import Bus, Client, Daemon
from hostimage_testing.debian import Debian
from hostimage_testing.host import scratch_host
from hostimaged.bus.holds import Holds
from hostimaged.bus.policy import Policy
from hostimaged.bus.service import Service
from hostimaged.bus.sizes import Sizes
from hostimaged.bus.updates import Updates
from hostimaged.bus.verified import Verified
from hostimaged.config import Settings
from hostimaged.jobs.history import History
from hostimaged.jobs.process import COMMAND, WorkerSettings
from hostimaged.system import syscalls, units
from hostimaged.system.notify import Notifier
from hostimaged.system.paths import HostPaths

#: Seconds of a processor that one callback may take. Waiting is not in it: whatever of ours waits in the loop
#: is found by name in every test; how long a callback lasts in all says more of what else the machine does.
LONGEST_CALLBACK = 0.1
#: Seconds in which 99 of 100 reads of properties are answered: 20 ms on a quiet machine.
LONGEST_READ = 0.02 * 5
WORKER = Path(hostimage_testing.__file__).with_name("scripted_worker.py")


@dataclass(frozen=True, order=True)
class Callback:
    """What a callback of the loop took: seconds of the processor, and in all."""

    busy: float
    whole: float


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callback]]:
    """All callbacks of the loop from now on."""
    seen: list[Callback] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        started, busy = time.perf_counter(), time.thread_time()
        run(handle)
        seen.append(Callback(time.thread_time() - busy, time.perf_counter() - started))

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    # The objects of the tests are no garbage of the service.
    gc.freeze()
    yield seen
    gc.unfreeze()


@pytest.fixture(scope="module")
def interfaces() -> dict[str, Interface]:
    return load_shipped()


@pytest_asyncio.fixture
async def service(bus: Bus, tmp_path: Path, interfaces: dict[str, Interface]) -> AsyncIterator[Daemon]:
    """The service on the private bus, in this process, with scripted workers."""
    async with serving(bus, tmp_path / "root", interfaces, sys.executable, "-P", str(WORKER)) as daemon:
        yield daemon


@pytest_asyncio.fixture
async def real_service(bus: Bus, tmp_path: Path, interfaces: dict[str, Interface]) -> AsyncIterator[Daemon]:
    """The same with the workers that are shipped."""
    scratch_host(tmp_path / "root")
    async with serving(bus, tmp_path / "root", interfaces, *COMMAND) as daemon:
        yield daemon


@asynccontextmanager
async def serving(
    bus: Bus, root: Path, interfaces: dict[str, Interface], *worker: str
) -> AsyncIterator[Daemon]:
    """The service, given as the double that makes scripts."""
    (root / "run/hostimaged").mkdir(parents=True)
    connection = await Connection.connect(bus.address)
    await connection.request_name(BUS_NAME)
    async with asyncio.TaskGroup() as tasks:
        made = Service(
            connection,
            tasks,
            tasks,
            interfaces=interfaces,
            paths=HostPaths.scratch(root),
            settings=Settings(verity="opportunistic"),
            settings_problems=[],
            load_settings=lambda: (Settings(), []),
            holds=Holds(root / "run/hostimaged/hold.json", "boot"),
            updates=Updates(root / "run/hostimaged/check.json", "boot"),
            policy=Policy(HostPaths.scratch(root)),
            boot_failure=None,
            sizes=Sizes(root / "run/hostimaged/sizes.json", "boot"),
            verified=Verified(root / "run/hostimaged/verified.json", "boot"),
            notifier=Notifier({}),
            history=History(root / "run/hostimaged/jobs.json", "boot"),
            boot_id="boot",
            workers=WorkerSettings(root=root, command=worker, cooperative=1),
            linger=0.2,
        )
        made.start()
        yield Daemon(bus, root)
        await made.stop()
    await connection.close()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_nothing_blocks_the_loop(service: Daemon, client: Client, callbacks: list[Callback]) -> None:
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
    assert max(callbacks).busy < LONGEST_CALLBACK, sorted(callbacks)[-5:]


async def test_a_job_tells_the_unit_of_its_initiator(
    service: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = units._read
    monkeypatch.setattr(
        units,
        "_read",
        lambda path, limit: "0::/x.slice/it.service" if path.endswith("cgroup") else real(path, limit),
    )
    path = await client.pull(service.script("job", {"result": {}}), client_id="me")
    await client.removed(path)
    expected = {"uid": os.getuid(), "unit": "it.service", "client-id": "me"}
    assert (await client.job(path))["Initiator"] == expected


async def test_what_cannot_be_watched_is_a_problem(
    bus: Bus,
    tmp_path: Path,
    interfaces: dict[str, Interface],
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(syscalls, "inotify_init", none_left)
    async with serving(bus, tmp_path / "root", interfaces, sys.executable, "-P", str(WORKER)):
        problems = (await client.status())["problems"]
        found = [(row["severity"], row["text"]) for row in problems if row["id"] == "watch"]
        told = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Problems"]
    assert found == [("warning", "what other programs change is noticed late: Too many open files")]
    assert ["watch", *found[0]] in told


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.root
async def test_a_real_pull_does_not_block_the_loop(
    real_service: Daemon,
    client: Client,
    debian: Debian,
    callbacks: list[Callback],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Debian image; all the while somebody else reads, and waits for each answer before the next call."""
    path = await client.pull(f"oci:{debian.layout}:eight-gzip")
    times: list[float] = []
    while not any(s.body[1] == path for s in client.named("JobRemoved")):
        started = time.perf_counter()
        await client.properties(ROOT_PATH, MANAGER_INTERFACE)
        times.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)
    assert (await client.removed(path))[3] == "done"
    assert len(times) > 100
    usual = sorted(times)[len(times) * 99 // 100]
    with capsys.disabled():
        print(f"\n{len(times)} reads: 99 % in {usual * 1000:.1f} ms; ", end="")
        longest = max(callback.whole for callback in callbacks)
        print(f"longest callback {max(callbacks).busy * 1000:.1f} ms busy, {longest * 1000:.1f} ms in all")
    assert max(callbacks).busy < LONGEST_CALLBACK, sorted(callbacks)[-5:]
    assert usual < LONGEST_READ, sorted(times)[-5:]


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
