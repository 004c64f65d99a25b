"""The connection on a real bus: what was measured to break the library's own must not break ours."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.transport import BusClosed, Connection, Limits, MethodCall
from hostimage_testing.bus import PATIENCE, Bus, Client, connected, error_of
from hostimage_testing.tools import REPOSITORY_ROOT

BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


async def test_thousands_of_messages_survive_a_stopped_bus(bus: Bus) -> None:
    sender = await Connection.connect(bus.address)
    async with connected(bus) as receiver:
        await receiver.connection.add_match("type='signal',interface='org.example.Test'")
        bus.freeze()
        sent = [sender.emit("/x", "org.example.Test", "Count", "us", [n, "x" * 200]) for n in range(5000)]
        assert all(sent)
        assert sender.congested
        assert not sender.emit("/x", "org.example.Test", "Count", "us", [9999, ""], droppable=True)
        call = asyncio.ensure_future(sender.call(*BUS, "GetId"))
        await asyncio.sleep(0)
        bus.thaw()
        assert len((await call)[0]) == 32
        await receiver.until(lambda: len(receiver.named("Count")) == 5000)
        assert [s.body[0] for s in receiver.named("Count")] == list(range(5000))
        assert not sender.congested
    await sender.close()


async def test_a_bus_that_takes_nothing_is_given_up(bus: Bus) -> None:
    connection = await Connection.connect(bus.address)
    bus.freeze()
    text = "x" * (1 << 20)
    for _ in range(80):
        if not connection.emit("/x", "org.example.Test", "Count", "s", [text]):
            break
        await asyncio.sleep(0)
    reason = await connection.closed()
    assert str(reason) == "the bus takes no messages"
    bus.thaw()


async def test_calls_end_with_the_bus(bus: Bus) -> None:
    connection = await Connection.connect(bus.address)
    bus.freeze()
    calls = [asyncio.ensure_future(error_of(connection.call(*BUS, "GetId"))) for _ in range(3)]
    await asyncio.sleep(0)
    bus.process.kill()
    assert all(isinstance(error, BusClosed) for error in await asyncio.gather(*calls))
    assert isinstance(await connection.closed(), BusClosed)
    assert isinstance(await error_of(connection.call(*BUS, "GetId")), BusClosed)
    assert not connection.emit("/x", "org.example.Test", "Count", "", [])
    await connection.close()


async def test_a_call_without_answer_times_out(bus: Bus) -> None:
    silent = await Connection.connect(bus.address)
    silent.set_handler(lambda call: None)
    async with connected(bus) as client:
        error = await error_of(
            client.connection.call(silent.unique_name, "/", "org.freedesktop.DBus.Peer", "Ping", timeout=0.05)
        )
    # The stock policy lets nobody call an unknown service; either way the call ends.
    assert error.name in (ErrorName.TIMEOUT, ErrorName.ACCESS_DENIED)
    await silent.close()


@pytest.mark.parametrize(
    "address",
    ["unix:path=/nonexistent/bus", "tcp:host=localhost,port=1", "unix:abstract=hostimage-none", "x"],
)
async def test_no_bus(address: str) -> None:
    with pytest.raises(BusClosed):
        await Connection.connect(address)


async def test_what_listens_but_is_no_bus(tmp_path: Path) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(nonsense, tmp_path / "socket")
    async with server:
        with pytest.raises(BusClosed):
            await Connection.connect(f"unix:path={tmp_path}/socket")


async def test_one_bad_message_costs_itself(bus: Bus) -> None:
    """A header field of a type that does not exist: the library refuses the message, we go on."""
    async with connected(bus) as client:
        calls: list[MethodCall] = []
        framed = client.connection
        framed.set_handler(calls.append)
        await client.connection.call(*BUS, "GetId")
        framed.data_received(_raw_call(kind=b"("))
        framed.data_received(_raw_call())
        assert [call.member for call in calls] == ["Do"]
        assert len((await client.connection.call(*BUS, "GetId"))[0]) == 32


def _raw_call(kind: bytes = b"o") -> bytes:
    """A method call /x Do; ``kind`` is the type of the path field."""
    import struct

    path = b"\x01\x01" + kind + b"\x00" + struct.pack("<I", 2) + b"/x\0"
    path += bytes(-len(path) % 8)
    fields = path + b"\x03\x01s\x00" + struct.pack("<I", 2) + b"Do\0"
    head = b"l\x01\x00\x01" + struct.pack("<III", 0, 9, len(fields))
    return head + fields + bytes(-len(fields) % 8)


async def test_descriptors_do_not_arrive(bus: Bus, client: Client) -> None:
    """They are not negotiated: the bus refuses them, and a peer that sends them anyway fills nothing."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_connection(lambda: Connection(Limits()), sock=ours)
        socket.send_fds(theirs, [b"OK 12\r\n"], [0, 1, 2])
        await asyncio.sleep(0.01)
        transport.abort()
        await protocol.closed()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_both_libraries_marshal_alike(bus: Bus) -> None:
    """The same script over dbus-next and dbus-fast, the latter by hiding the former."""
    script = (
        "import asyncio\n"
        "from hostimage_dbus import transport as t\n"
        "async def main():\n"
        "    c = await t.Connection.connect()\n"
        "    c.on_signal(lambda *a: print(a[3]))\n"
        "    await c.add_match(\"type='signal',interface='org.example.T'\")\n"
        "    V = t.Variant\n"
        "    c.emit('/x', 'org.example.T', 'S', 'a{sv}(tb)as', [{'a': V('t', 1)}, [5, True], ['x']])\n"
        "    await c.call('org.freedesktop.DBus', '/', 'org.freedesktop.DBus', 'GetId')\n"
        "    try: await c.call('org.freedesktop.DBus', '/', 'org.freedesktop.DBus', 'No')\n"
        "    except t.BusError as e: print(e.name)\n"
        "    print(t.Message.__module__.split('.')[0])\n"
        "    await c.close()\n"
        "asyncio.run(main())\n"
    )
    outputs = {}
    environment = os.environ | {
        "DBUS_SYSTEM_BUS_ADDRESS": bus.address,
        "PYTHONPATH": str(REPOSITORY_ROOT / "dbus"),
        "HOSTIMAGE_DBUS_LIBRARY": "",
    }
    for hidden in ("", "import sys; sys.modules['dbus_next'] = None\n"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", hidden + script, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
        assert process.returncode == 0, err
        *lines, library = out.decode().splitlines()
        outputs[library] = [
            line.replace("dbus_fast", "dbus_next").replace("(5, True)", "[5, True]") for line in lines
        ]
    if sys.version_info < (3, 15):
        assert outputs.keys() == {"dbus_next", "dbus_fast"}
        one, other = outputs.values()
        assert one[-1] == other[-1] == "org.freedesktop.DBus.Error.UnknownMethod"
        assert one[0].partition("}")[2] == other[0].partition("}")[2]
