"""The shipped bus policy and the daemon together, member by member, for an unprivileged user."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jeepney import DBusAddress, new_method_call, new_signal
from jeepney.io.blocking import open_dbus_connection

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, MANAGER_INTERFACE, ROOT_PATH
from hostimage_testing.bus import Bus, Client, Daemon, error_of, steps_until
from hostimage_testing.users import NEEDS_ROOT, NOBODY, as_user, user

pytestmark = NEEDS_ROOT


async def test_nobody_may_read_and_nothing_else(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("job", *steps_until(tmp_path / "never")))
    async with user(bus) as nobody:
        assert (await nobody.status())["schema"] == 1
        assert await nobody.manager("ListImages", "a{sv}", {}) == []
        assert len(await nobody.manager("ListJobs")) == 1
        assert (await nobody.properties(ROOT_PATH, MANAGER_INTERFACE))["ActiveJob"] == path
        assert (await nobody.job(path))["State"] in ("queued", "running")
        for interface, member in [
            ("org.freedesktop.DBus.Introspectable", "Introspect"),
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
            ("org.freedesktop.DBus.Peer", "Ping"),
        ]:
            await nobody.connection.call(BUS_NAME, ROOT_PATH, interface, member)
        refused = await error_of(nobody.pull("oci:/x"))
        absent = "polkit is not available, so only root may do this: org.hostimage1."
        assert (refused.name, refused.message) == (ErrorName.ACCESS_DENIED, f"{absent}switch-image")
        refused = await error_of(nobody.cancel(path))
        assert (refused.name, refused.message) == (ErrorName.ACCESS_DENIED, f"{absent}cancel")
        # Wrong arguments are told before anybody is asked who calls.
        assert (await error_of(nobody.pull("nonsense"))).name == ErrorName.INVALID_REFERENCE
        foreign = error_of(nobody.connection.call(BUS_NAME, ROOT_PATH, "org.example.Other", "Do"))
        assert (await foreign).name == ErrorName.ACCESS_DENIED
        assert (await error_of(nobody.connection.request_name(BUS_NAME))).name == ErrorName.ACCESS_DENIED
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
    with as_user(NOBODY):
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
    async with user(bus) as nobody:
        flood = [asyncio.ensure_future(error_of(nobody.pull("oci:/x"))) for _ in range(500)]
        path = await client.pull(daemon.script("job", {"result": {}}))
        assert (await client.removed(path))[3] == "done"
        names = {error.name for error in await asyncio.gather(*flood)}
    assert names <= {ErrorName.ACCESS_DENIED, ErrorName.LIMITS_EXCEEDED}
    assert ErrorName.ACCESS_DENIED in names
