"""hostimagectl as a process of its own on a real bus, against a daemon that does what the test says."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from hostimage_dbus.errors import EXIT_CODES, EXIT_NO_SERVICE, ErrorName
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH, job_path
from hostimage_dbus.transport import Connection, MethodCall, Variant
from hostimage_testing.bus import Bus
from hostimage_testing.hostimagectl import Hostimagectl, Screen, run

DIGEST = "sha256:" + "ab" * 32
PROPERTIES = "org.freedesktop.DBus.Properties"
PATH = job_path(1)


class Puppet:
    """Owns the bus name and answers as told: ``handlers`` by member, with one job by default."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.calls: list[str] = []
        self.state: dict[str, Variant] = {
            "Id": Variant("t", 1),
            "Kind": Variant("s", "pull"),
            "Target": Variant("s", "oci:/image"),
            "State": Variant("s", "queued"),
            "Progress": Variant("d", -1.0),
        }
        self.handlers: dict[str, Callable[[MethodCall], None]] = {
            "Pull": lambda call: connection.reply(call, "o", [PATH]),
            "Cancel": connection.reply,
            "GetAll": lambda call: connection.reply(call, "a{sv}", [self.state]),
            "ListImages": lambda call: connection.reply(call, "aa{sv}", [[]]),
        }
        self._called = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def running(cls, bus: Bus) -> AsyncIterator[Puppet]:
        connection = await Connection.connect(bus.address)
        try:
            await connection.request_name(BUS_NAME)
            puppet = cls(connection)
            connection.set_handler(puppet._handle)
            yield puppet
        finally:
            await connection.close()

    def _handle(self, call: MethodCall) -> None:
        self.calls.append(call.member)
        self.handlers[call.member](call)
        self._called.set()

    def change(self, **values: Variant) -> None:
        self.state |= values
        self.connection.emit(PATH, PROPERTIES, "PropertiesChanged", "sa{sv}as", [JOB_INTERFACE, values, []])

    def end(self, state: str, name: str = "", message: str = "", **values: Variant) -> None:
        self.change(State=Variant("s", state), Error=Variant("(ss)", [name, message]), **values)
        self.announce(state, name, message)

    def announce(self, state: str, name: str = "", message: str = "") -> None:
        body = [1, PATH, "pull", state, name, message]
        self.connection.emit(ROOT_PATH, MANAGER_INTERFACE, "JobRemoved", "tossss", body)

    async def called(self, member: str) -> None:
        async with asyncio.timeout(20):
            while member not in self.calls:
                self._called.clear()
                await self._called.wait()


@pytest_asyncio.fixture
async def puppet(bus: Bus) -> AsyncIterator[Puppet]:
    async with Puppet.running(bus) as running:
        yield running


RESULT = Variant("a{sv}", {"manifest-digest": Variant("s", DIGEST), "changed": Variant("b", True)})


async def test_pull(bus: Bus, puppet: Puppet) -> None:
    client = await Hostimagectl.start(bus, "pull", "oci:/image")
    await puppet.called("GetAll")
    puppet.change(State=Variant("s", "running"), Phase=Variant("s", "pulling"))
    await client.says("pulling")
    puppet.end("done", Result=RESULT)
    assert await client.end() == 0
    assert client.out.splitlines() == ["pulled oci:/image", f"  Manifest: {DIGEST}"]


async def test_a_job_that_ends_before_the_reply(bus: Bus, puppet: Puppet) -> None:
    def pull(call: MethodCall) -> None:
        puppet.end("done", Result=RESULT)
        puppet.connection.reply(call, "o", [PATH])

    puppet.handlers["Pull"] = pull
    client = await run(bus, "pull", "oci:/image", "--json", "--quiet")
    assert client.code == 0
    document = json.loads(client.out)
    assert document["job"]["state"] == "done"
    assert document["result"] == {"manifest-digest": DIGEST, "changed": True}


@pytest.mark.parametrize("name", [ErrorName.BUSY, ErrorName.ACCESS_DENIED, ErrorName.INVALID_REFERENCE])
async def test_exit_code_of_an_error(bus: Bus, puppet: Puppet, name: ErrorName) -> None:
    puppet.handlers["Pull"] = lambda call: puppet.connection.reply_error(call, name, "because\x1b[2J")
    client = await run(bus, "pull", "oci:/image")
    assert client.code == EXIT_CODES[name]
    assert client.err.startswith("hostimagectl: because\\x1b[2J\nhint: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_cancels(bus: Bus, puppet: Puppet, number: signal.Signals) -> None:
    client = await Hostimagectl.start(bus, "pull", "oci:/image")
    await puppet.called("GetAll")
    puppet.change(State=Variant("s", "running"))
    client.process.send_signal(number)
    await puppet.called("Cancel")
    puppet.end("cancelled", ErrorName.CANCELLED, "cancelled")
    assert await client.end() == EXIT_CODES[ErrorName.CANCELLED]
    assert client.err.endswith("hostimagectl: job 1 was cancelled\n")


async def test_the_second_signal_leaves(bus: Bus, puppet: Puppet) -> None:
    client = await Hostimagectl.start(bus, "pull", "oci:/image")
    await puppet.called("GetAll")
    client.process.send_signal(signal.SIGINT)
    await puppet.called("Cancel")
    client.process.send_signal(signal.SIGINT)
    assert await client.end() == 130
    assert "job 1 goes on" in client.err
    assert client.out == ""


async def test_the_daemon_is_restarted_in_the_middle(bus: Bus) -> None:
    async with Puppet.running(bus) as first:
        client = await Hostimagectl.start(bus, "pull", "oci:/image")
        await first.called("GetAll")
    async with Puppet.running(bus) as second:
        second.handlers["GetAll"] = lambda call: second.connection.reply_error(
            call, ErrorName.UNKNOWN_OBJECT, "no such job"
        )
        second.handlers["GetStatus"] = lambda call: second.connection.reply(call, "s", ['{"results": []}'])
        await second.called("GetAll")
        second.announce("failed", ErrorName.INTERNAL, "the daemon ended while the job was not done")
        assert await client.end() == EXIT_CODES[ErrorName.INTERNAL]
    assert "hostimaged went away" in client.err
    assert "hostimagectl: the daemon ended while the job was not done\n" in client.err


async def test_the_bus_dies(bus: Bus, puppet: Puppet) -> None:
    client = await Hostimagectl.start(bus, "pull", "oci:/image")
    await puppet.called("GetAll")
    bus.process.kill()
    assert await client.end() == EXIT_NO_SERVICE
    assert "the connection to the bus is lost" in client.err


@pytest.mark.parametrize("command", [["pull", "oci:/i"], ["images"], ["status"], ["jobs"], ["cancel", "1"]])
async def test_no_daemon(bus: Bus, command: list[str]) -> None:
    client = await run(bus, *command)
    assert client.code == EXIT_NO_SERVICE
    assert client.err.startswith("hostimagectl: hostimaged does not answer: ")


async def test_a_terminal_gets_a_bar_and_the_result_stays_clean(bus: Bus, puppet: Puppet) -> None:
    with Screen() as screen:
        client = await Hostimagectl.start(bus, "pull", "oci:/image", "--json", stderr=screen.slave)
        await puppet.called("GetAll")
        puppet.change(
            State=Variant("s", "running"),
            Phase=Variant("s", "pulling"),
            Progress=Variant("d", 0.42),
            BytesDone=Variant("t", 84 << 20),
            BytesTotal=Variant("t", 200 << 20),
            Rate=Variant("t", 10 << 20),
            Eta=Variant("t", 12_000_000),
            Message=Variant("s", "layer \x1b]0;owned\x07"),
        )
        await screen.shows("pulling", "42%", "84.0 MiB of 200.0 MiB", "10.0 MiB/s", "0:12 left")
        await screen.shows("layer \\x1b]0;owned\\x07")
        client.process.send_signal(signal.SIGINT)
        await screen.shows("cancelling job 1")
        puppet.end("done", Result=RESULT)
        assert await client.end() == 0
        await screen.shows("it finished before it could be cancelled")
    assert json.loads(client.out)["result"]["manifest-digest"] == DIGEST
    assert "\x1b]" not in screen.text
    # The cursor is back, and the bar is gone.
    assert screen.text.rfind("\x1b[?25h") > screen.text.rfind("\x1b[?25l")


async def test_a_table_on_a_terminal(bus: Bus, puppet: Puppet) -> None:
    row = {"reference": Variant("s", "oci:/[bold]x\x1b[2J"), "manifest-digest": Variant("s", DIGEST)}
    puppet.handlers["ListImages"] = lambda call: puppet.connection.reply(call, "aa{sv}", [[row]])
    with Screen() as screen:
        client = await Hostimagectl.start(bus, "images", stdout=screen.slave)
        assert await client.end() == 0
        await screen.shows("oci:/[bold]x\\x1b[2J")
    assert DIGEST[:19] in re.sub(r"\s", "", screen.text)
