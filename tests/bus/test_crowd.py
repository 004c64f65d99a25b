"""A user who means harm with everything they have, while others work."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, MessageType, new_method_call, new_signal
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import BusError, Connection
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, steps_until
from hostimage_testing.host import ACCEPT_ANYTHING
from hostimage_testing.polkit_double import Answer, PolkitDouble
from hostimage_testing.users import NEEDS_ROOT, NOBODY, SOMEBODY, as_user, user

pytestmark = NEEDS_ROOT
MANAGER = DBusAddress(ROOT_PATH, BUS_NAME, MANAGER_INTERFACE)
TRACKED = "docker://registry.example/os:latest"
#: What answers a caller may get from a daemon that is well.
OURS = {"", *(str(name) for name in ErrorName if name is not ErrorName.INTERNAL)}


@contextmanager
def attackers(bus: Bus, count: int) -> Iterator[list[DBusConnection]]:
    """Connections of one user, of another implementation."""
    with ExitStack() as stack:
        with as_user(NOBODY):
            made = [
                stack.enter_context(open_dbus_connection(bus.abstract, enable_fds=True)) for _ in range(count)
            ]
        yield made


def error_name(message: Any) -> str:
    if message.header.message_type is not MessageType.error:
        return ""
    text = message.body[0] if message.body else ""
    assert "Traceback" not in text
    assert ".py" not in text
    return next(str(v) for k, v in message.header.fields.items() if k.name == "error_name")


@pytest.fixture
def tracking(daemon: Daemon) -> Daemon:
    (daemon.root / "etc/containers").mkdir(parents=True)
    (daemon.root / "etc/containers/policy.json").write_text(ACCEPT_ANYTHING)
    daemon.settings(f'tracked-image = "{TRACKED}"\n')
    return daemon


async def test_ten_thousand_calls_of_one_user(tracking: Daemon, bus: Bus, client: Client) -> None:
    """All are answered, some with an error of ours, and a second user is authorised meanwhile."""
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    names: list[str] = []
    calls = 100

    def flood(attacker: DBusConnection) -> None:
        # Checks are authorised by a polkit that hangs: each would hold a place if it were let in.
        message = new_method_call(MANAGER, "Check", "sa{sv}", ("", {}))
        for _ in range(calls):
            attacker.send(message)
        names.extend(error_name(attacker.receive(timeout=120)) for _ in range(calls))

    async with PolkitDouble.connect(bus.address, Answer.YES) as polkit, user(bus, SOMEBODY) as other:
        polkit.answers["org.hostimage1.check"] = Answer.HANG
        with attackers(bus, 100) as crowd:
            threads = [threading.Thread(target=flood, args=(attacker,)) for attacker in crowd]
            for thread in threads:
                thread.start()
            started = await other.manager("Upgrade", "a{sv}", {})
            assert [c.action for c in polkit.checks if c.subject["name"] == other.connection.unique_name] == [
                "org.hostimage1.update"
            ]
            while any(thread.is_alive() for thread in threads):
                polkit.settle(Answer.NO)
                await asyncio.sleep(0.01)
    await client.removed(started)
    assert len(names) == 100 * calls
    assert set(names) <= OURS, set(names) - OURS
    assert names.count(ErrorName.LIMITS_EXCEEDED) > 1000
    assert await client.manager("ListJobs") == []


async def test_many_hanging_dialogs(tracking: Daemon, bus: Bus, client: Client, tmp_path: Path) -> None:
    """One user fills their own places; reading, root and other users go on; all is given back."""
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    before = tracking.descriptors()
    async with PolkitDouble.connect(bus.address, Answer.HANG) as polkit, AsyncExitStack() as stack:
        many = [await stack.enter_async_context(user(bus)) for _ in range(8)]
        asking = [
            asyncio.ensure_future(one.manager("Upgrade", "a{sv}", {}, interactive=True))
            for one in many
            for _ in range(8)
        ]
        await polkit.until(lambda p: p.hanging == 4)
        assert (await many[0].status())["schema"] == 1
        image = tracking.script("image", *steps_until(tmp_path / "go"))
        path = await client.pull(image)
        await client.cancel(path)
        await client.removed(path)
        other = await stack.enter_async_context(user(bus, SOMEBODY))
        waiting = asyncio.ensure_future(other.manager("Upgrade", "a{sv}", {}, interactive=True))
        await polkit.until(lambda p: p.hanging == 5)
        # Those who leave take their dialogs along.
        for one in many:
            await one.connection.close()
        await polkit.until(lambda p: p.hanging == 1)
        results = await asyncio.gather(*asking, return_exceptions=True)
        names = {error.name for error in results if isinstance(error, BusError)}
        assert names <= {ErrorName.LIMITS_EXCEEDED, "org.freedesktop.DBus.Error.Disconnected"}
        assert ErrorName.LIMITS_EXCEEDED in names
        polkit.settle(Answer.YES)
        await client.removed(await waiting)
    await tracking.gives_back(before)


async def test_sixty_four_dialogs_of_sixteen_users(tracking: Daemon, bus: Bus, client: Client) -> None:
    """The places of all users together: the 65th is refused, root is not."""
    import pwd

    uids = sorted({entry.pw_uid for entry in pwd.getpwall()} - {0})[:17]
    if len(uids) < 17:
        pytest.skip("the machine knows too few users")
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    async with PolkitDouble.connect(bus.address, Answer.HANG) as polkit, AsyncExitStack() as stack:
        users = [await stack.enter_async_context(user(bus, uid)) for uid in uids]
        asking = [
            asyncio.ensure_future(one.manager("Upgrade", "a{sv}", {}, interactive=True))
            for one in users[:16]
            for _ in range(4)
        ]
        await polkit.until(lambda p: p.hanging == 64)
        with pytest.raises(BusError) as refused:
            await users[16].manager("Upgrade", "a{sv}", {}, interactive=True)
        assert refused.value.name == ErrorName.LIMITS_EXCEEDED
        path = await client.pull(tracking.script("image", {"result": {}}))
        assert (await client.removed(path))[3] == "done"
        polkit.settle(Answer.NO)
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert {error.name for error in results if isinstance(error, BusError)} == {ErrorName.ACCESS_DENIED}


async def test_whatever_is_sent_memory_and_descriptors_come_back(
    tracking: Daemon, bus: Bus, client: Client
) -> None:
    """Descriptors in calls and in unicast signals, long arrays, deep variants, long and broken strings."""
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    owner = await client.owner()
    with attackers(bus, 4) as crowd:
        for attacker in crowd:
            await asyncio.to_thread(_everything, attacker, owner)
        await client.status()
        descriptors, memory = tracking.descriptors(), tracking.resident()
        for _ in range(3):
            for attacker in crowd:
                await asyncio.to_thread(_everything, attacker, owner)
        await client.status()
        await tracking.gives_back(descriptors)
        assert tracking.resident() < memory + (4 << 20)
    assert "Traceback" not in tracking.log.read_text()
    assert await client.manager("ListJobs") == []
    await asyncio.get_running_loop().shutdown_default_executor()


def _everything(attacker: DBusConnection, owner: str) -> None:
    destination = next(f for f in new_method_call(MANAGER, "X").header.fields if f.name == "destination")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(50):
            _ask(attacker, new_method_call(MANAGER, "Unknown", "h", (ours.fileno(),)))
            signal = new_signal(DBusAddress(ROOT_PATH, interface="a.b"), "C", "h", (ours.fileno(),))
            signal.header.fields[destination] = owner
            attacker.send(signal)
    # The protocol allows 32 arrays and 32 structs within each other, and 64 of all; variants count as well.
    for depth in (10, 60):
        nested: Any = ("s", "x")
        for _ in range(depth):
            nested = ("v", nested)
        _ask(attacker, new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/x", {"client-id": nested})))
    for value in (("ay", bytes(30 << 20)), ("s", "x" * (1 << 20)), ("as", ["y"] * 10_000)):
        _ask(attacker, new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/x", {"client-id": value})))
    _ask(attacker, new_method_call(MANAGER, "GetDeployment", "sa{sv}", ("x" * (1 << 20), {})))
    _ask(attacker, new_method_call(MANAGER, "SetKernelArguments", "asasa{sv}", (["a"] * 1000, [], {})))
    _ask(attacker, new_method_call(MANAGER, "HoldUpdates", "tsa{sv}", (2**64 - 1, "\u202e", {})))


def _ask(attacker: DBusConnection, message: Any) -> None:
    # A polkit is not there: whatever gets past the checks is refused.
    assert error_name(attacker.send_and_get_reply(message, timeout=PATIENCE)) in OURS | {
        "org.freedesktop.DBus.Error.UnknownMethod",
        "org.freedesktop.DBus.Error.NotSupported",
    } - {""}


async def test_what_is_no_text_ends_the_senders_connection_only(
    tracking: Daemon, bus: Bus, client: Client
) -> None:
    """Invalid UTF-8 and nonsense for a message: the bus keeps it, whoever sent it goes, we do not notice."""
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    for change in (
        lambda d: d.replace(b"oci:/marker", b"oci:/\xff\xfe\xff\xff\xff\xff"),
        lambda d: d[:40] + os.urandom(200),
    ):
        with attackers(bus, 1) as (attacker,):
            raw = new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/marker", {})).serialise(serial=99)
            attacker.sock.sendall(change(raw))
            attacker.sock.settimeout(1)
            try:
                while attacker.sock.recv(4096):
                    pass
            except OSError:
                pass
        assert (await client.status())["schema"] == 1
    assert "Traceback" not in tracking.log.read_text()


async def test_a_crowd_of_watchers_on_a_stopped_bus(
    tracking: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    """The bus stands still while a job tells of itself thousands of times: nothing is lost that counts."""
    await tracking.start()
    # While it starts, calls wait in a place that is small.
    await client.status()
    steps: list[dict[str, Any]] = [{"totals": [1000_000, 0]}]
    for number in range(5000):
        steps += [{"message": f"message {number} " + "x" * 500}]
    said = tmp_path / "said"
    steps += [{"touch": str(said)}, {"result": {"changed": True}}]
    path = await client.pull(tracking.script("chatty", *steps))
    bus.freeze()
    async with asyncio.timeout(PATIENCE):
        while not said.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    bus.thaw()
    assert (await client.removed(path))[3] == "done"
    assert (await client.job(path))["Message"].startswith("message 4999 ")
    assert client.changes(path, "org.hostimage1.Job", "State")[-1] == "done"
    assert isinstance(client.connection, Connection)
