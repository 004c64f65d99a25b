"""Nothing that dies takes more with it than its own job, and everybody who waits is told."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import BinaryIO

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, ROOT_PATH
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, connected, ended, error_of, now, steps_until
from hostimage_testing.polkit_double import Answer, PolkitDouble
from hostimage_testing.users import needs_root, user


async def _running(daemon: Daemon, client: Client, *steps: object) -> tuple[str, int]:
    """Start a pull that tells its pid first; gives its path and the worker's pid."""
    pid = daemon.root.parent / "pid"
    path = await client.pull(daemon.script("job", {"pid": str(pid)}, {"message": "on"}, *steps))
    await client.changed(path, JOB_INTERFACE, "Message", "on")
    return path, int(pid.read_text())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"kill": 9}], "the worker process was killed by SIGKILL"),
        ([{"kill": 11}], "the worker process was killed by SIGSEGV"),
        ([{"exit": 3}], "the worker process ended without a result"),
        ([{"raw": "nonsense\n"}], "internal error"),
        ([{"raw": '{"event": "bytes", "done": -1}\n'}], "internal error"),
        ([{"raw": '{"event": "result", "result": {"x": {"y": 1}}}\n'}], "internal error"),
        ([{"flood": 5 << 20}], "internal error"),
        ([{"crash": "secret detail"}], "internal error"),
    ],
)
async def test_a_dying_worker_costs_its_job(
    daemon: Daemon, client: Client, steps: list[dict[str, object]], message: str
) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("bad", *steps))
    result = await client.removed(path)
    assert result[3:5] == ["failed", ErrorName.INTERNAL]
    assert result[5].startswith(message)
    assert "secret" not in result[5]
    good = await client.pull(daemon.script("good", {"result": {"changed": True}}))
    assert (await client.removed(good))[3] == "done"


async def test_traceback_goes_to_the_log(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    await client.removed(await client.pull(daemon.script("bad", {"crash": "secret detail"})))
    log = daemon.log.read_text()
    assert "Traceback" in log
    assert "secret detail" in log


@pytest.mark.parametrize("ignored", ["", "SIGTERM"])
async def test_cancel_is_enforced(daemon: Daemon, client: Client, ignored: str) -> None:
    await daemon.start()
    path, pid = await _running(daemon, client, {"stubborn": ignored})
    await client.cancel(path)
    assert (await client.removed(path))[3] == "cancelled"
    assert ended(pid)


async def test_worker_dies_with_the_daemon_and_its_job_is_told_as_failed(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    done = await client.pull(daemon.script("done", {"result": {}}))
    await client.removed(done)
    path, pid = await _running(daemon, client, {"stubborn": "SIGTERM"})
    waiting = await client.pull(daemon.script("waiting", {"result": {}}))
    await daemon.kill()
    assert ended(pid)
    await daemon.start()
    for orphan in (path, waiting):
        assert (await client.removed(orphan))[3:5] == ["failed", ErrorName.INTERNAL]
        left = await client.job(orphan)
        assert left["State"] == "failed"
        assert left["Error"][0] == ErrorName.INTERNAL
        assert left["Cancellable"] is False
    results = (await client.status())["results"]
    assert [(r["id"], r["state"]) for r in results] == [(1, "done"), (2, "failed"), (3, "failed")]
    after = await client.pull(daemon.script("after", {"result": {}}))
    assert after.endswith("/_4")
    assert (await client.removed(after))[3] == "done"
    # Told once: another restart has nothing to tell.
    told = len(client.named("JobRemoved"))
    assert await daemon.end() == 0
    await daemon.start()
    await client.status()
    assert len(client.named("JobRemoved")) == told


async def test_ids_start_again_with_a_new_boot(daemon: Daemon, client: Client) -> None:
    boot_id = daemon.root / "proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text("11111111-1111-1111-1111-111111111111\n")
    await daemon.start()
    assert (await client.status())["daemon"]["bootId"] == "11111111-1111-1111-1111-111111111111"
    await client.removed(await client.pull(daemon.script("one", {"result": {}})))
    await daemon.end()
    boot_id.write_text("22222222-2222-2222-2222-222222222222\n")
    await daemon.start()
    assert (await client.status())["results"] == []
    assert (await client.pull(daemon.script("two", {"result": {}}))).endswith("/_1")


async def test_damaged_job_file_is_a_problem_and_no_more(daemon: Daemon, client: Client) -> None:
    run = daemon.root / "run/hostimaged"
    run.mkdir(parents=True)
    (run / "jobs.json").write_text('{"version": 7, "next_id": "x"}')
    await daemon.start()
    assert [p["id"] for p in (await client.status())["problems"]] == ["jobs"]
    assert (await client.pull(daemon.script("one", {"result": {}}))).endswith("/_1")


async def test_stopping_cancels_jobs_and_says_so(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    path, pid = await _running(daemon, client, *steps_until(tmp_path / "never"))
    waiting = await client.pull(daemon.script("waiting", {"result": {}}))
    assert await daemon.end(signal.SIGTERM) == 0
    assert ended(pid)
    for job in (waiting, path):
        assert (await client.removed(job))[3:5] == ["cancelled", ErrorName.CANCELLED]
    assert json.loads((daemon.root / "run/hostimaged/jobs.json").read_text())["active"] == []


@needs_root
async def test_an_open_dialog_does_not_keep_it_from_stopping(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    path, _ = await _running(daemon, client, *steps_until(tmp_path / "never"))
    image = daemon.script("image", {"result": {}})
    async with PolkitDouble.connect(bus.address, Answer.HANG) as polkit, user(bus) as other:
        calls = [
            asyncio.ensure_future(error_of(other.manager("Pull", "sa{sv}", image, {}, interactive=asks)))
            for asks in (True, False)
        ]
        await polkit.until(lambda p: p.hanging == 2)
        started = now()
        assert await daemon.end(signal.SIGTERM) == 0
        assert now() - started < PATIENCE / 2
        for call in calls:
            error = await call
            assert (error.name, error.message) == (ErrorName.CANCELLED, "the service is stopping")
    assert (await client.removed(path))[3:5] == ["cancelled", ErrorName.CANCELLED]
    assert "Traceback" not in daemon.log.read_text()


async def test_loss_of_the_bus_ends_daemon_and_worker(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    _, pid = await _running(daemon, client, {"stubborn": "SIGTERM"})
    daemon.bus.process.kill()
    assert daemon.process is not None
    assert daemon.process.wait(PATIENCE) == 1
    assert ended(pid)
    assert "hostimaged: the connection to the bus is lost" in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


async def test_a_second_daemon_on_the_same_root_gives_up(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    second = Daemon(bus, daemon.root)
    second.log = daemon.root.parent / "second.log"
    assert second.spawn().wait(PATIENCE) == 1
    assert f"is locked by pid {daemon.process.pid}" in second.log.read_text()
    assert "Traceback" not in second.log.read_text()


async def test_a_daemon_whose_name_is_taken_gives_up(daemon: Daemon, bus: Bus, tmp_path: Path) -> None:
    await daemon.start()
    second = Daemon(bus, tmp_path / "other")
    assert second.spawn().wait(PATIENCE) == 1
    assert f"{BUS_NAME} is owned by another process" in second.log.read_text()


async def test_worker_is_confined(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    facts = tmp_path / "facts"
    path = await client.pull(daemon.script("job", {"describe": str(facts)}, {"result": {}}))
    assert (await client.removed(path))[3] == "done"
    seen = json.loads(facts.read_text())
    dac_read_search = 1 << 2
    assert int(seen["CapEff"], 16) & ~dac_read_search == 0
    if os.geteuid() == 0:
        assert int(seen["CapBnd"], 16) & ~dac_read_search == 0
    assert seen["NoNewPrivs"] == "1"
    assert seen["nice"] == min(os.nice(0) + 10, 19)
    assert "DBUS_SYSTEM_BUS_ADDRESS" not in seen["env"]
    # 0, 1, 2, the socket, the job lock and the listing itself.
    assert seen["fds"] == 6


async def test_five_waiting_clients_of_a_killed_daemon_are_all_told(
    daemon: Daemon, bus: Bus, client: Client
) -> None:
    """Ids go on, the old worker is gone before the next job begins, and that one works."""
    await daemon.start()
    path, pid = await _running(daemon, client, {"stubborn": "SIGTERM"})
    image = f"dir:{daemon.root.parent}/job"
    async with AsyncExitStack() as stack:
        joined = [await stack.enter_async_context(connected(bus)) for _ in range(5)]
        for one in joined:
            assert await one.pull(image) == path
        await daemon.kill()
        await daemon.start()
        for one in joined:
            assert (await one.removed(path))[3:5] == ["failed", ErrorName.INTERNAL]
            assert (await one.job(path))["State"] == "failed"
        assert ended(pid, 0)
        after = await joined[0].pull(daemon.script("after", {"result": {}}))
        assert after.endswith("/_2")
        assert (await joined[1].removed(after))[3] == "done"
    assert client.named("JobRemoved")[0].path == ROOT_PATH


async def test_a_worker_that_lives_on_keeps_the_next_one_waiting(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    """Whatever of a killed daemon should still run holds the job lock: there is never a second writer."""
    await daemon.start()
    await _running(daemon, client, {"stubborn": "SIGTERM"})
    await daemon.kill()
    started = tmp_path / "started"
    with (daemon.root / "run/hostimaged/lock").open("rb") as survivor:
        async with asyncio.timeout(PATIENCE):
            while not _taken(survivor):  # noqa: ASYNC110 (the kernel tells nobody)
                await asyncio.sleep(0.01)
        await daemon.start()
        path = await client.pull(daemon.script("after", {"touch": str(started)}, {"result": {}}))
        await client.changed(path, JOB_INTERFACE, "State", "running")
        # On its way a worker needs half a second; one that waits tells nothing.
        await asyncio.sleep(2)
        assert (await client.job(path))["State"] == "running"
        assert not started.exists()
    assert (await client.removed(path))[3] == "done"
    assert started.exists()


def _taken(file: BinaryIO) -> bool:
    """Take the lock as a worker does, if it is free: the one that was killed may need a moment to be gone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
