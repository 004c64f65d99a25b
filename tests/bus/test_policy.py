"""The shipped bus policy and the daemon together, member by member, for an unprivileged user."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from jeepney import DBusAddress, new_method_call, new_signal
from jeepney.io.blocking import open_dbus_connection

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import Connection
from hostimage_testing.bus import Bus, Client, Daemon, error_of, steps_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody needs root"),
]
NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """The bus learns our uid from the socket when we connect."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@asynccontextmanager
async def nobody(bus: Bus) -> AsyncIterator[Client]:
    with as_nobody():
        connection = await Connection.connect(bus.abstract)
    try:
        assert await connection.unix_user(connection.unique_name) == NOBODY
        yield Client(connection)
    finally:
        await connection.close()


async def test_nobody_may_read_and_nothing_else(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("job", *steps_until(tmp_path / "never")))
    async with nobody(bus) as user:
        assert (await user.status())["schema"] == 1
        assert await user.manager("ListImages", "a{sv}", {}) == []
        assert len(await user.manager("ListJobs")) == 1
        assert (await user.properties(ROOT_PATH, MANAGER_INTERFACE))["ActiveJob"] == path
        assert (await user.job(path))["State"] in ("queued", "running")
        for interface, member in [
            ("org.freedesktop.DBus.Introspectable", "Introspect"),
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
            ("org.freedesktop.DBus.Peer", "Ping"),
        ]:
            await user.connection.call(BUS_NAME, ROOT_PATH, interface, member)
        refused = await error_of(user.pull("oci:/x"))
        absent = "polkit is not available, so only root may do this: org.hostimage1."
        assert (refused.name, refused.message) == (ErrorName.ACCESS_DENIED, f"{absent}switch-image")
        refused = await error_of(user.cancel(path))
        assert (refused.name, refused.message) == (ErrorName.ACCESS_DENIED, f"{absent}cancel")
        # Wrong arguments are told before anybody is asked who calls.
        assert (await error_of(user.pull("nonsense"))).name == ErrorName.INVALID_REFERENCE
        foreign = error_of(user.connection.call(BUS_NAME, ROOT_PATH, "org.example.Other", "Do"))
        assert (await foreign).name == ErrorName.ACCESS_DENIED
        assert (await error_of(user.connection.request_name(BUS_NAME))).name == ErrorName.ACCESS_DENIED
    assert (await client.job(path))["State"] in ("queued", "running")


async def test_what_is_no_call_of_a_known_interface_stays_on_the_bus(
    daemon: Daemon, bus: Bus, client: Client
) -> None:
    await daemon.start()
    owner = (
        await client.connection.call(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetNameOwner",
            "s",
            [BUS_NAME],
        )
    )[0]
    with as_nobody():
        attacker = open_dbus_connection(bus.abstract)
    with attacker:
        reply = attacker.send_and_get_reply(
            new_method_call(DBusAddress(ROOT_PATH, BUS_NAME), "ListJobs"), timeout=20
        )
        assert "AccessDenied" in str(reply.header.fields)
        signal = new_signal(
            DBusAddress("/org/freedesktop/DBus", interface="org.freedesktop.DBus"), "NameOwnerChanged"
        )
        template = new_method_call(DBusAddress("/", owner), "X").header.fields
        field = next(f for f in template if f.name == "destination")
        signal.header.fields[field] = owner
        attacker.send(signal)
    assert await client.manager("ListJobs") == []


async def test_calls_of_users_are_counted_apart(daemon: Daemon, bus: Bus, client: Client) -> None:
    """A user who floods the daemon with refused calls does not keep root from working."""
    await daemon.start()
    async with nobody(bus) as user:
        flood = [asyncio.ensure_future(error_of(user.pull("oci:/x"))) for _ in range(500)]
        path = await client.pull(daemon.script("job", {"result": {}}))
        assert (await client.removed(path))[3] == "done"
        names = {error.name for error in await asyncio.gather(*flood)}
    assert names <= {ErrorName.ACCESS_DENIED, ErrorName.LIMITS_EXCEEDED}
    assert ErrorName.ACCESS_DENIED in names
