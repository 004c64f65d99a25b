"""Together with logind: who else is logged in, and what keeps the machine awake."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.descriptors import call_for_descriptor
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE
from hostimage_dbus.transport import BusError, Variant
from hostimage_testing.bus import Bus, Client, Daemon
from hostimage_testing.logind_double import NAME as LOGIND
from hostimage_testing.logind_double import SYSTEMD, LogindDouble, logind
from hostimage_testing.polkit_double import Answer, PolkitDouble
from hostimage_testing.users import NEEDS_ROOT, NOBODY, user
from hostimaged.jobs.inhibitors import DOWNLOAD, STAGING
from hostimaged.jobs.logind import Logind

INHIBIT = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "Inhibit")
WHAT = ["idle:sleep", "me", "why", "block"]


@pytest.fixture
def sessions(bus: Bus) -> Iterator[LogindDouble]:
    with logind(bus.address) as double:
        yield double


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (another thread's doing)
            await asyncio.sleep(0.005)


# who is logged in


@pytest.mark.parametrize(
    ("sessions_there", "others"),
    [
        ([], False),
        ([(1000, "user")], False),
        ([(1000, "user"), (1000, "user")], False),
        ([(1001, "user")], True),
        ([(1000, "user"), (0, "user")], True),
        ([(42, "greeter"), (1001, "background"), (1001, "manager"), (1001, "lock-screen")], False),
        ([(42, "greeter"), (1001, "user-early")], True),
        ([(1001, "user-light")], True),
        ([(1001, "of-the-future")], True),
        ([(1001, "gone"), (1002, "gone")], False),
        ([(1001, "greeter")] * 100, True),
    ],
)
async def test_other_sessions(
    bus: Bus, client: Client, sessions: LogindDouble, sessions_there: list[tuple[int, str]], others: bool
) -> None:
    sessions.sessions = sessions_there
    assert await Logind(client.connection, bus.address).other_sessions(1000) is others


async def test_what_is_not_known_counts_as_others(bus: Bus, client: Client) -> None:
    asked = Logind(client.connection, bus.address)
    assert await asked.other_sessions(1000), "no logind"
    with logind(bus.address) as double:
        assert not await asked.other_sessions(1000)
        double.answer = "no"
        assert await asked.other_sessions(1000)


@pytest.mark.parametrize("others", [pytest.param(value, marks=NEEDS_ROOT) for value in (True, False)])
async def test_a_reboot_is_authorised_as_logind_does(
    daemon: Daemon, bus: Bus, sessions: LogindDouble, others: bool
) -> None:
    sessions.sessions = [(NOBODY, "user"), (NOBODY - 1 if others else NOBODY, "user")]
    await daemon.start()
    async with PolkitDouble.connect(bus.address, Answer.YES) as polkit, user(bus) as person:
        assert await person.manager("Rollback", "a{sv}", {"apply": Variant("s", "reboot")})
        reboot = "org.freedesktop.login1.reboot" + ("-multiple-sessions" if others else "")
        assert [check.action for check in polkit.checks][1] == reboot


# reboots

_ERROR = "org.freedesktop.DBus.Error."
SOFT = ("RebootWithFlags", (4,))
UNIT = ("StartUnit", ("soft-reboot.target", "replace-irreversibly"))


@pytest.mark.parametrize(
    ("names", "error", "calls"),
    [
        ((LOGIND, SYSTEMD), "", [SOFT]),
        ((LOGIND, SYSTEMD), "UnknownMethod", [SOFT, UNIT]),
        ((LOGIND, SYSTEMD), "InvalidArgs", [SOFT, UNIT]),
        # Somebody keeps the machine from it: that is not passed over.
        ((LOGIND, SYSTEMD), "AccessDenied", [SOFT]),
        ((SYSTEMD,), "", [UNIT]),
        ((LOGIND,), "UnknownMethod", [SOFT]),
    ],
)
async def test_a_soft_reboot(
    bus: Bus, client: Client, names: tuple[str, ...], error: str, calls: list[tuple[str, tuple[Any, ...]]]
) -> None:
    with logind(bus.address, *names) as double:
        double.soft_reboot = error and _ERROR + error
        await Logind(client.connection, bus.address).soft_reboot()
        assert double.calls == calls


# locks


async def test_taking_and_giving_back(bus: Bus, client: Client, sessions: LogindDouble) -> None:
    service = Logind(client.connection, bus.address)
    before = len(os.listdir("/proc/self/fd"))
    for inhibition, mode in ((DOWNLOAD, "block-weak"), (STAGING, "block")):
        lock = await service.inhibit(inhibition)
        assert lock is not None
        assert not os.get_inheritable(lock)
        (taken,) = [one for one in sessions.locks if one.released is None]
        assert (taken.what, taken.who, taken.mode) == (inhibition.what, "hostimaged", mode)
        assert taken.why == inhibition.why
        os.close(lock)
        await eventually(lambda: not sessions.held)
    # The double keeps its end of each.
    assert len(os.listdir("/proc/self/fd")) == before + 2


async def test_a_logind_that_knows_no_weak_locks(bus: Bus, client: Client, sessions: LogindDouble) -> None:
    sessions.knows_weak = False
    service = Logind(client.connection, bus.address)
    for _ in range(2):
        lock = await service.inhibit(DOWNLOAD)
        assert lock is not None
        os.close(lock)
    assert [lock.mode for lock in sessions.locks] == ["block", "block"]
    assert [body[3] for member, body in sessions.calls] == ["block-weak", "block", "block"]


@pytest.mark.parametrize("answer", ["no", "wrong", "two"])
async def test_an_answer_that_is_no_lock(
    bus: Bus, client: Client, sessions: LogindDouble, answer: str
) -> None:
    sessions.answer = answer
    assert await Logind(client.connection, bus.address).inhibit(DOWNLOAD) is None
    await eventually(lambda: not sessions.held)


async def test_without_logind(bus: Bus, client: Client) -> None:
    assert await Logind(client.connection, bus.address).inhibit(DOWNLOAD) is None
    assert await Logind(client.connection, "unix:path=/nonexistent").inhibit(DOWNLOAD) is None
    assert await Logind(client.connection, "tcp:host=x").inhibit(DOWNLOAD) is None


async def test_a_logind_that_says_nothing(bus: Bus, sessions: LogindDouble) -> None:
    sessions.answer = "silence"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BusError, match=r"within 0\.2 s"):
        await call_for_descriptor(*INHIBIT, "ssss", WHAT, address=bus.address, timeout=0.2)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_the_connection_ends_with_the_call(bus: Bus, client: Client, sessions: LogindDouble) -> None:
    os.close(await call_for_descriptor(*INHIBIT, "ssss", WHAT, address=bus.address, timeout=5))
    (name,) = sessions.callers
    (there,) = await client.connection.call(
        "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner", "s", [name]
    )
    assert not there


async def test_descriptors_of_others(bus: Bus, sessions: LogindDouble) -> None:
    """Signals and calls with descriptors, sent to the connection while it waits: none stays."""
    sessions.answer = "flood"
    before = len(os.listdir("/proc/self/fd"))
    lock = await call_for_descriptor(*INHIBIT, "ssss", WHAT, address=bus.address, timeout=20)
    assert sessions.held == ["idle:sleep"]
    os.close(lock)
    await eventually(lambda: not sessions.held)
    assert len(os.listdir("/proc/self/fd")) == before + 1, "the end that the double keeps"


# jobs


async def test_a_download_of_a_user_keeps_the_machine_awake(
    daemon: Daemon, client: Client, sessions: LogindDouble, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    image = daemon.script(
        "image", {"phase": "resolving"}, {"phase": "pulling"}, {"wait": str(go)}, {"result": {}}
    )
    before = daemon.descriptors()
    released: list[bool] = []
    client.connection.on_signal(
        lambda _p, interface, member, _b, _s: (
            (sessions.look(), released.append(not sessions.held))
            if (interface, member) == (MANAGER_INTERFACE, "JobRemoved")
            else None
        )
    )
    path = await client.pull(image)
    await eventually(lambda: sessions.held == ["idle:sleep"])
    assert sessions.locks[0].mode == "block-weak"
    go.touch()
    await client.removed(path)
    assert released == [True], "given back before the end was announced"
    await eventually(lambda: daemon.descriptors() <= before)


async def test_a_background_download_does_not(
    daemon: Daemon, client: Client, sessions: LogindDouble, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    image = daemon.script(
        "image", {"phase": "pulling"}, {"message": "here"}, {"wait": str(go)}, {"result": {}}
    )
    path = await client.pull(image, background=True)
    await client.changed(path, JOB_INTERFACE, "Message", "here")
    await client.status()
    assert sessions.locks == []
    # Until a user waits for it.
    assert await client.pull(image) == path
    await eventually(lambda: sessions.held == ["idle:sleep"])
    go.touch()
    await client.removed(path)


async def test_staging_is_not_cut_off(
    daemon: Daemon, client: Client, sessions: LogindDouble, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    image = daemon.script("image", {"phase": "staging"}, {"wait": str(go)}, {"result": {}})
    path = await client.pull(image, background=True)
    await eventually(lambda: sessions.held == ["shutdown:sleep"])
    # Whatever happens to the daemon, the lock ends with it.
    await daemon.kill()
    await eventually(lambda: not sessions.held)
    del path


async def test_a_logind_that_does_not_answer_delays_nobody(
    daemon: Daemon, client: Client, sessions: LogindDouble
) -> None:
    sessions.answer = "silence"
    await daemon.start()
    path = await client.pull(daemon.script("image", {"phase": "pulling"}, {"result": {}}))
    assert (await client.removed(path))[3] == "done"
    assert await daemon.end() == 0


async def test_jobs_run_without_logind(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("image", {"phase": "pulling"}, {"result": {}}))
    assert (await client.removed(path))[3] == "done"
    assert "Traceback" not in await asyncio.to_thread(daemon.log.read_text)
    await asyncio.get_running_loop().shutdown_default_executor()
