"""Several callers and several jobs at once, on the bus."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    JOB_INTERFACE,
    MANAGER_INTERFACE,
    ROOT_PATH,
    deployment_path,
)
from hostimage_testing.bus import Bus, Client, Daemon, connected, ended, error_of, steps_until
from hostimage_testing.polkit_double import Answer, PolkitDouble
from hostimage_testing.users import SOMEBODY, needs_root, user


async def _running(client: Client, path: str) -> None:
    await client.changed(path, JOB_INTERFACE, "State", "running")


async def test_equal_requests_get_the_same_job(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    image = daemon.script("image", *steps_until(go))
    path = await client.pull(image)
    await _running(client, path)
    async with connected(bus) as other:
        assert await other.pull(image, queue=False) == path
        assert await other.pull(image, no_join=True) != path
        go.touch()
        assert (await other.removed(path))[3] == "done"
    assert len(client.named("JobNew")) == 2


async def test_a_joiner_withdraws_and_the_last_one_stops_the_job(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "never"))
    path = await client.pull(image)
    await _running(client, path)
    async with connected(bus) as other:
        assert await other.pull(image) == path
        await client.cancel(path)
        assert (await client.job(path))["State"] == "running"
        await other.cancel(path)
    assert (await client.removed(path))[3] == "cancelled"


@pytest.mark.parametrize("state", ["queued", "held", "running"])
async def test_cancel_in_every_state(daemon: Daemon, client: Client, tmp_path: Path, state: str) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "never"))
    busy = daemon.script("busy", *steps_until(tmp_path / "go"))
    if state == "queued":
        await _running(client, await client.pull(busy))
    if state == "held":
        await client.manager("HoldUpdates", "tsa{sv}", 1 << 60, "tests", {})
    path = await client.pull(image, background=True)
    if state == "running":
        await _running(client, path)
    job = await client.job(path)
    assert (job["State"], job["Cancellable"]) == (state, True)
    assert job["HoldReasons"] == (["manual"] if state == "held" else [])
    await client.cancel(path)
    assert (await client.removed(path))[3:5] == ["cancelled", ErrorName.CANCELLED]
    after = await client.job(path)
    assert (after["State"], after["Cancellable"], after["HoldReasons"]) == ("cancelled", False, [])
    assert (await error_of(client.cancel(path))).name == ErrorName.JOB_NOT_CANCELLABLE


async def test_a_job_being_cancelled_may_be_cancelled_again(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("image", {"message": "on"}, {"stubborn": "SIGTERM"}))
    await client.changed(path, JOB_INTERFACE, "Message", "on")
    await client.cancel(path)
    job = await client.job(path)
    assert (job["State"], job["Cancellable"]) == ("cancelling", True)
    await client.cancel(path)
    assert (await client.removed(path))[3:5] == ["cancelled", ErrorName.CANCELLED]
    assert client.changes(path, JOB_INTERFACE, "State") == ["running", "cancelling", "cancelled"]


async def test_a_job_is_not_cancelled_at_its_end(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    """While the state of the host is read after it: what was done is done."""
    daemon.findings(deployments=[{"id": "a" * 64}])
    await daemon.start()
    await client.until(lambda: client.named("InterfacesAdded"))
    go = tmp_path / "go"
    daemon.findings(wait=str(go))
    path = await client.pull(daemon.script("image", {"kill": 9}))
    await client.changed(path, JOB_INTERFACE, "State", "finalizing")
    assert (await client.job(path))["Cancellable"] is False
    assert (await error_of(client.cancel(path))).name == ErrorName.JOB_NOT_CANCELLABLE
    assert (await client.job(path))["State"] == "finalizing"
    go.touch()
    assert (await client.removed(path))[3:5] == ["failed", ErrorName.INTERNAL]


async def test_a_background_check_never_delays_a_user(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    pid, go, slow = tmp_path / "pid", tmp_path / "go", tmp_path / "slow"
    steps = [{"pid": str(pid)}, {"message": "on"}, *steps_until(go, result={"version": "2"})]
    watch = await client.check(daemon.script("watch", *steps), background=True)
    await client.changed(watch, JOB_INTERFACE, "Message", "on")
    first = int(pid.read_text())
    users = await client.pull(daemon.script("users", *steps_until(slow)))
    await _running(client, users)
    await client.changed(watch, JOB_INTERFACE, "State", "queued")
    assert ended(first)
    properties = await client.properties(ROOT_PATH, MANAGER_INTERFACE)
    assert (properties["State"], properties["ActiveJob"]) == ("pulling", users)
    assert properties["QueuedJobs"] == [watch]
    go.touch()
    slow.touch()
    assert (await client.removed(watch))[3] == "done"
    assert client.changes(watch, JOB_INTERFACE, "State") == ["running", "queued", "running", "done"]
    assert [s.body[1] for s in client.named("JobRemoved")] == [users, watch]
    assert (await client.job(watch))["Background"] is True


async def test_checks_run_beside_a_pull(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    go = tmp_path / "go"
    pulling = await client.pull(daemon.script("pull", *steps_until(go)))
    await _running(client, pulling)
    checking = await client.check(daemon.script("check", {"result": {"version": "7"}}))
    assert (await client.removed(checking))[3] == "done"
    assert (await client.job(checking))["Result"]["version"] == "7"
    assert (await client.job(pulling))["State"] == "running"
    go.touch()
    await client.removed(pulling)


@needs_root
async def test_a_user_withdraws_without_polkit_and_others_need_it(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "never"))
    async with PolkitDouble.connect(bus.address, Answer.YES) as polkit, user(bus) as one:
        async with user(bus, SOMEBODY) as two:
            path = await one.pull(image)
            await _running(client, path)
            polkit.answer = Answer.NO
            asked = len(polkit.checks)
            assert (await error_of(two.cancel(path))).name == ErrorName.ACCESS_DENIED
            assert polkit.checks[-1].action == "org.hostimage1.cancel"
            assert polkit.checks[-1].details == {"operation": "cancel", "image": image}
            polkit.answer = Answer.YES
            assert await two.pull(image) == path
            polkit.answer = Answer.NO
            asked = len(polkit.checks)
            await two.cancel(path)
            assert (await client.job(path))["State"] == "running"
            # Having withdrawn, they are one of the others again.
            assert (await error_of(two.cancel(path))).name == ErrorName.ACCESS_DENIED
            assert len(polkit.checks) == asked + 1
            await one.cancel(path)
            assert len(polkit.checks) == asked + 1
        assert (await client.removed(path))[3] == "cancelled"


@needs_root
async def test_polkit_is_told_which_deployment_a_cancelled_job_is_about(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    one, other = "a" * 128, "b" * 128
    daemon.findings(deployments=[{"id": one}, {"id": other}])
    await daemon.start()
    await client.until(lambda: len(client.named("InterfacesAdded")) == 2)
    await _running(client, await client.pull(daemon.script("busy", *steps_until(tmp_path / "never"))))
    (path,) = await client.connection.call(
        BUS_NAME, deployment_path(one), DEPLOYMENT_INTERFACE, "Delete", "a{sv}", [{}]
    )
    async with PolkitDouble.connect(bus.address, Answer.NO) as polkit, user(bus) as stranger:
        assert (await error_of(stranger.cancel(path))).name == ErrorName.ACCESS_DENIED
        (check,) = polkit.checks
        assert check.details == {"operation": "cancel", "deployment": one}


@needs_root
async def test_whoever_may_cancel_does_it_for_all(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "never"))
    path = await client.pull(image)
    await _running(client, path)
    async with PolkitDouble.connect(bus.address, Answer.YES), user(bus) as other:
        await other.cancel(path)
    assert (await client.removed(path))[3] == "cancelled"


@needs_root
async def test_a_job_that_ended_during_the_dialog_is_not_cancelled(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    path = await client.pull(daemon.script("image", *steps_until(go)))
    await _running(client, path)
    async with PolkitDouble.connect(bus.address, Answer.HANG) as polkit, user(bus) as other:
        cancelling = asyncio.ensure_future(error_of(other.cancel(path)))
        await polkit.until(lambda p: p.hanging)
        go.touch()
        await client.removed(path)
        polkit.settle(Answer.YES)
        assert (await cancelling).name == ErrorName.JOB_NOT_CANCELLABLE
