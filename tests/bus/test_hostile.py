"""Callers that mean harm: every call gets a D-Bus error without internals, and the daemon stays as it was."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from jeepney import DBusAddress, MessageFlag, MessageType, new_method_call, new_signal
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.low_level import Endianness

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import Variant
from hostimage_testing.bus import PATIENCE, Client, Daemon, error_of

STANDARD = "org.freedesktop.DBus.Error."
MANAGER = DBusAddress(ROOT_PATH, BUS_NAME, MANAGER_INTERFACE)


@pytest.fixture
def attacker(daemon: Daemon) -> Iterator[DBusConnection]:
    """A foreign implementation of D-Bus, which sends what ours would refuse to."""
    with open_dbus_connection(daemon.bus.address, enable_fds=True) as connection:
        yield connection


def ask(attacker: DBusConnection, message: Any) -> tuple[str, Any]:
    """Send a call; gives the error name, "" for none, and the body."""
    reply = attacker.send_and_get_reply(message, timeout=PATIENCE)
    if reply.header.message_type is MessageType.error:
        text = reply.body[0] if reply.body else ""
        assert "Traceback" not in text
        assert ".py" not in text
        assert len(text) < 2000
    return _error_name(reply), reply.body


def _error_name(reply: Any) -> str:
    return next((v for k, v in reply.header.fields.items() if k.name == "error_name"), "")


def native(member: str = "GetStatus") -> Any:
    return new_method_call(MANAGER, member, "sa{sv}", ("native", {}))


async def test_calls_that_do_not_exist(daemon: Daemon, client: Client, attacker: DBusConnection) -> None:
    await daemon.start()
    elsewhere = DBusAddress("/org/hostimage1/jobs/_99", BUS_NAME, "org.hostimage1.Job")
    other = DBusAddress(ROOT_PATH, BUS_NAME, "org.hostimage1.Job")
    properties = DBusAddress(ROOT_PATH, BUS_NAME, "org.freedesktop.DBus.Properties")
    for message, name in [
        (new_method_call(MANAGER, "NoSuchMethod"), "UnknownMethod"),
        (new_method_call(MANAGER, "GetStatus", "s", ("native",)), "InvalidArgs"),
        (new_method_call(MANAGER, "GetStatus"), "InvalidArgs"),
        (new_method_call(MANAGER, "ListJobs", "u", (1,)), "InvalidArgs"),
        (new_method_call(elsewhere, "Cancel", "a{sv}", ({},)), "UnknownObject"),
        (new_method_call(other, "Cancel", "a{sv}", ({},)), "UnknownInterface"),
        (new_method_call(properties, "Get", "ss", (MANAGER_INTERFACE, "Nothing")), "UnknownProperty"),
        (new_method_call(properties, "Get", "ss", ("org.example.No", "State")), "UnknownInterface"),
        (
            new_method_call(properties, "Set", "ssv", (MANAGER_INTERFACE, "State", ("s", "x"))),
            "PropertyReadOnly",
        ),
        (new_method_call(properties, "GetAll", "s", ("x" * 70000,)), "LimitsExceeded"),
    ]:
        assert ask(attacker, message)[0] == STANDARD + name


async def test_calls_without_interface_find_the_member(
    daemon: Daemon, client: Client, attacker: DBusConnection
) -> None:
    if os.geteuid():
        pytest.skip("the policy lets only root call without an interface")
    await daemon.start()
    nowhere = DBusAddress(ROOT_PATH, BUS_NAME)
    assert ask(attacker, new_method_call(nowhere, "ListJobs")) == ("", ([],))
    assert ask(attacker, new_method_call(nowhere, "Ping"))[0] == ""
    assert ask(attacker, new_method_call(nowhere, "Nothing"))[0] == STANDARD + "UnknownMethod"


async def test_big_endian_callers_are_understood(
    daemon: Daemon, client: Client, attacker: DBusConnection
) -> None:
    await daemon.start()
    message = native()
    message.header.endianness = Endianness.big
    name, body = ask(attacker, message)
    assert name == ""
    assert '"schema": 1' in body[0]
    broken = new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/x", {"wrong": ("t", 1 << 60)}))
    broken.header.endianness = Endianness.big
    assert ask(attacker, broken)[0] == ErrorName.INVALID_ARGS


@pytest.mark.parametrize(
    "image",
    [
        "docker",
        "os:latest",
        "$(reboot)",
        "docker://x; reboot",
        "--policy=/etc/passwd",
        "docker://--help",
        "dir:../../etc",
        "oci:/a\nb",
        "docker://r/" + "a" * 5000,
        "ostree:x",
        "docker://r.example/os:\x1b[31m",
    ],
)
async def test_image_strings_are_validated(daemon: Daemon, client: Client, image: str) -> None:
    await daemon.start()
    error = await error_of(client.pull(image))
    assert error.name == ErrorName.INVALID_REFERENCE
    assert error.message.isprintable()
    assert await client.manager("ListJobs") == []


@pytest.mark.parametrize(
    "options",
    [
        {"unknown": Variant("b", True)},
        {"client-id": Variant("u", 1)},
        {"client-id": Variant("s", "x" * 1000)},
        {"client-id": Variant("s", "a\nb")},
        {"queue": Variant("s", "yes")},
        {"expect-digest": Variant("s", "sha256:1")},
        {"expect-digest": Variant("s", "")},
        {"apply": Variant("s", "none")},
        {"x" * 20000: Variant("b", True)},
    ],
)
async def test_options_are_validated(daemon: Daemon, client: Client, options: dict[str, Variant]) -> None:
    await daemon.start()
    error = await error_of(client.manager("Pull", "sa{sv}", "oci:/x", options))
    assert error.name == ErrorName.INVALID_ARGS
    assert len(error.message) < 1000


async def test_empty_image_needs_a_tracked_one(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    assert (await error_of(client.pull(""))).name == ErrorName.INVALID_ARGS


async def test_unknown_status_format(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    error = await error_of(client.manager("GetStatus", "sa{sv}", "xml", {}))
    assert error.name == ErrorName.INVALID_ARGS


async def test_nothing_grows(daemon: Daemon, client: Client, attacker: DBusConnection) -> None:
    """File descriptors, long bodies, deep variants, ever new signatures: memory and descriptors come back."""
    await daemon.start()
    await client.status()
    unique = (await client.connection.call(*_BUS, "GetNameOwner", "s", [BUS_NAME]))[0]
    for _ in range(3):
        _abuse(attacker, unique, rounds=300)
        descriptors, memory = daemon.descriptors(), daemon.resident()
        await client.status()
    _abuse(attacker, unique, rounds=600)
    await client.status()
    await daemon.gives_back(descriptors)
    assert daemon.resident() < memory + (4 << 20)
    assert daemon.process is not None
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.log.read_text()


_BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


def _abuse(attacker: DBusConnection, unique: str, rounds: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number in range(rounds):
            # To a connection that did not negotiate descriptors the bus answers with an error.
            ask(attacker, new_method_call(MANAGER, "Unknown", "h", (ours.fileno(),)))
            signal = new_signal(DBusAddress(ROOT_PATH, interface="a.b"), "C", "h", (ours.fileno(),))
            signal.header.fields[_DESTINATION] = unique
            attacker.send(signal)
            ask(attacker, new_method_call(MANAGER, "Pull", *_new_signature(number)))
    deep: Any = ("s", "x")
    for _ in range(30):
        deep = ("v", deep)
    assert ask(attacker, new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/x", {"client-id": deep})))[0]
    huge = new_method_call(MANAGER, "Pull", "sa{sv}", ("oci:/x", {"client-id": ("ay", bytes(8 << 20))}))
    assert ask(attacker, huge)[0] == ErrorName.LIMITS_EXCEEDED
    many = new_method_call(MANAGER, "Pull", "av", ([("y", 1)] * 20000,))
    assert ask(attacker, many)[0] == ErrorName.LIMITS_EXCEEDED


_DESTINATION = next(field for field in native().header.fields if field.name == "destination")


def _new_signature(number: int) -> tuple[str, tuple[Any, ...]]:
    """A signature never used before: a struct of bytes and strings, by the bits of ``number``."""
    bits = f"{number + (os.getpid() << 16):b}"
    values = tuple(1 if bit == "1" else "s" for bit in bits)
    return "(" + "".join("y" if bit == "1" else "s" for bit in bits) + ")", (values,)


async def test_calls_that_want_no_answer_get_none(
    daemon: Daemon, client: Client, attacker: DBusConnection
) -> None:
    await daemon.start()
    message = new_method_call(MANAGER, "NoSuchMethod")
    message.header.flags = MessageFlag.no_reply_expected
    attacker.send(message)
    assert ask(attacker, new_method_call(MANAGER, "ListJobs")) == ("", ([],))


async def test_a_flood_of_calls_is_answered_and_leaves_others_served(
    daemon: Daemon, client: Client, attacker: DBusConnection
) -> None:
    await daemon.start()
    await client.status()
    for _ in range(2000):
        attacker.send(native())
    async with asyncio.timeout(PATIENCE):
        assert await client.manager("ListJobs") == []
    answers = [attacker.receive(timeout=PATIENCE) for _ in range(2000)]
    # The bus itself lets 128 calls of a connection wait for their answers.
    errors = {_error_name(answer) for answer in answers} - {""}
    assert errors <= {ErrorName.LIMITS_EXCEEDED}
    assert sum(not _error_name(answer) for answer in answers) >= 128


async def test_a_user_has_a_limited_number_of_calls_under_way(daemon: Daemon, client: Client) -> None:
    """All are answered: jobs up to the limits, and clear errors beyond."""
    await daemon.start()
    image = daemon.script("image", {"stubborn": ""})
    calls = [asyncio.ensure_future(client.pull(image, no_join=True)) for _ in range(200)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    jobs = [r for r in results if isinstance(r, str)]
    names = {r.name for r in results if not isinstance(r, str)}  # type: ignore[union-attr]
    assert 8 <= len(jobs) <= 9
    assert names == {ErrorName.LIMITS_EXCEEDED}
