"""The mock for authors of frontends: every scenario against the shipped interfaces, on a bus of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema
import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.introspection import load_shipped, parse
from hostimage_dbus.mock.model import complete_types, default
from hostimage_dbus.mock.scenarios import SCENARIOS
from hostimage_dbus.mock.service import KINDS
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    JOB_INTERFACE,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    ROOT_PATH,
)
from hostimage_dbus.transport import BusError, Connection, Variant
from hostimage_testing.bus import PATIENCE, Bus
from hostimage_testing.hostimagectl import run
from hostimage_testing.tools import REPOSITORY_ROOT, require

INTERFACES = load_shipped()
PROPERTIES = "org.freedesktop.DBus.Properties"
OURS = (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE, JOB_INTERFACE, LOG_CONTROL_INTERFACE)
NAMES = [scenario.name for scenario in SCENARIOS]
SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())
#: What a method is called with, besides empty values of its types.
BODIES: dict[str, list[Any]] = {
    "GetStatus": ["native", {}],
    "GetDeployment": ["booted", {}],
    "SetUpdatePolicy": ["none", {}],
}


@dataclass
class Mock:
    """A running mock and a connection to its bus."""

    process: asyncio.subprocess.Process
    address: str
    connection: Connection

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *body: Any,
        interactive: bool = False,
    ) -> list[Any]:
        return await self.connection.call(
            BUS_NAME, path, interface, member, signature, body, interactive=interactive
        )

    async def properties(self, path: str, interface: str) -> dict[str, Variant]:
        found: dict[str, Variant] = (await self.call(path, PROPERTIES, "GetAll", "s", interface))[0]
        return found

    async def wait_for(
        self, path: str, interface: str, test: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """The properties, once ``test`` is true of their values."""
        changed = asyncio.Event()
        end = self.connection.on_signal(lambda *_: changed.set())
        await self.connection.add_match(f"type='signal',sender='{BUS_NAME}'")
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    changed.clear()
                    values = {n: v.value for n, v in (await self.properties(path, interface)).items()}
                    if test(values):
                        return values
                    await changed.wait()
        finally:
            end()


@asynccontextmanager
async def playing(scenario: str, duration: float = 0.2) -> AsyncIterator[Mock]:
    require("dbus-daemon")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "hostimage_dbus.mock", "--own-bus", "--scenario", scenario, "--duration", str(duration)),
        env=os.environ | {"PYTHONPATH": str(REPOSITORY_ROOT / "dbus")},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode().strip()
        variable, _, address = line.partition("=")
        assert variable == "DBUS_SYSTEM_BUS_ADDRESS"
        connection = await Connection.connect(address)
        try:
            yield Mock(process, address, connection)
        finally:
            await connection.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.parametrize("scenario", NAMES)
async def test_every_property_has_a_value_of_its_type(scenario: str) -> None:
    async with playing(scenario) as mock:
        (objects,) = await mock.call(ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        places = [(path, name) for path, found in objects.items() for name in found]
        assert sum(name == DEPLOYMENT_INTERFACE for _, name in places) >= 2
        for path, name in [
            (ROOT_PATH, MANAGER_INTERFACE),
            (LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE),
            *places,
        ]:
            values = await mock.properties(path, name)
            known = INTERFACES[name].properties
            assert {n: v.signature for n, v in values.items()} == {n: p.signature for n, p in known.items()}
            (xml,) = await mock.call(path, "org.freedesktop.DBus.Introspectable", "Introspect")
            assert parse(xml)[name].xml == INTERFACES[name].xml


@pytest.mark.parametrize("scenario", NAMES)
async def test_the_status_document_is_as_described(scenario: str) -> None:
    async with playing(scenario) as mock:
        (text,) = await mock.call(ROOT_PATH, MANAGER_INTERFACE, "GetStatus", "sa{sv}", "native", {})
        jsonschema.validate(json.loads(text), SCHEMA)


def arguments(member: str, signature: str, other: str) -> list[Any]:
    if member in BODIES:
        return BODIES[member]
    return [other if part == "o" else default(part) for part in complete_types(signature)]


async def test_every_method_answers() -> None:
    async with playing("update-available") as mock:
        (booted,) = await mock.call(ROOT_PATH, MANAGER_INTERFACE, "GetDeployment", "sa{sv}", "booted", {})
        started = set()
        for path, name in ((ROOT_PATH, MANAGER_INTERFACE), (booted, DEPLOYMENT_INTERFACE)):
            for member, method in INTERFACES[name].methods.items():
                body = arguments(member, method.signature, booted)
                reply = await mock.call(path, name, member, method.signature, *body)
                assert len(reply) == len(complete_types(method.out_signature))
                if member in KINDS:
                    job = await mock.properties(reply[0], JOB_INTERFACE)
                    assert job["Kind"].value == KINDS[member]
                    started.add(member)
        assert started == set(KINDS)


async def test_a_method_is_not_forgotten() -> None:
    starting = {
        member
        for name in (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE)
        for member, method in INTERFACES[name].methods.items()
        if method.out_signature == "o" and member != "GetDeployment"
    }
    assert starting == set(KINDS)


async def test_an_upgrade_ends_in_a_staged_deployment() -> None:
    async with playing("update-available") as mock:
        before = await mock.properties(ROOT_PATH, MANAGER_INTERFACE)
        assert (before["Update"].value["state"].value, before["RebootRequired"].value) == ("available", False)
        (path,) = await mock.call(ROOT_PATH, MANAGER_INTERFACE, "Upgrade", "a{sv}", {})
        (again,) = await mock.call(ROOT_PATH, MANAGER_INTERFACE, "Upgrade", "a{sv}", {})
        assert again == path
        job = await mock.wait_for(path, JOB_INTERFACE, lambda values: values["State"] == "done")
        assert (job["Progress"], job["Error"]) == (1.0, ["", ""])
        after = await mock.properties(ROOT_PATH, MANAGER_INTERFACE)
        assert (after["RebootRequired"].value, after["State"].value) == (True, "idle")
        staged = await mock.properties(after["Staged"].value, DEPLOYMENT_INTERFACE)
        assert staged["Staged"].value is True


async def test_a_pull_stands_at_sixty_percent_and_can_be_cancelled() -> None:
    async with playing("pull-at-60-percent") as mock:
        manager = await mock.wait_for(ROOT_PATH, MANAGER_INTERFACE, lambda values: values["ActiveJob"] != "/")
        assert manager["State"] == "pulling"
        path = manager["ActiveJob"]
        job = await mock.wait_for(path, JOB_INTERFACE, lambda values: values["Progress"] >= 0.6)
        assert (job["State"], job["Progress"]) == ("running", 0.6)
        (waiting,) = await mock.call(ROOT_PATH, MANAGER_INTERFACE, "Check", "sa{sv}", "", {})
        assert (await mock.properties(waiting, JOB_INTERFACE))["State"].value == "queued"
        with pytest.raises(BusError) as caught:
            await mock.call(
                ROOT_PATH, MANAGER_INTERFACE, "Check", "sa{sv}", "oci:/other", {"queue": Variant("b", False)}
            )
        assert caught.value.name == ErrorName.BUSY
        await mock.call(path, JOB_INTERFACE, "Cancel", "a{sv}", {})
        await mock.wait_for(path, JOB_INTERFACE, lambda values: values["State"] == "cancelled")
        await mock.wait_for(waiting, JOB_INTERFACE, lambda values: values["State"] == "done")
        with pytest.raises(BusError) as caught:
            await mock.call(path, JOB_INTERFACE, "Cancel", "a{sv}", {})
        assert caught.value.name == ErrorName.JOB_NOT_CANCELLABLE


async def test_denied() -> None:
    async with playing("denied") as mock:
        for interactive, name in (
            (False, ErrorName.AUTHORIZATION_REQUIRED),
            (True, ErrorName.ACCESS_DENIED),
        ):
            with pytest.raises(BusError) as caught:
                await mock.call(
                    ROOT_PATH, MANAGER_INTERFACE, "Pull", "sa{sv}", "", {}, interactive=interactive
                )
            assert caught.value.name == name


async def test_the_client_works_with_it() -> None:
    async with playing("failure") as mock:
        bus: Any = type("Address", (), {"address": mock.address})
        assert isinstance(bus, type)
        failed = await run(bus, "pull", "--json")
        assert failed.code == EXIT_CODES[ErrorName.NETWORK]
        assert json.loads(failed.out)["error"]["name"] == ErrorName.NETWORK
        status = await run(bus, "status")
        assert "no route to host" in status.out
        rows = [line.split()[:3] for line in status.out.splitlines()]
        assert ["b0b0b0b0b0b0", "booted", "42.2"] in rows
        assert ["a0a0a0a0a0a0", "rollback", "42.1"] in rows
        assert (await run(bus, "show", "booted")).code == 0
        assert (await run(bus, "log-level", "debug")).code == 0
        assert (await run(bus, "log-level")).out == "debug\n"
        assert (await run(bus, "hold", "2h")).code == 0
        assert (await mock.properties(ROOT_PATH, MANAGER_INTERFACE))["Holds"].value == ["manual"]


async def test_a_bus_of_somebody_else(bus: Bus) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hostimage_dbus.mock"),
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY_ROOT / "dbus"), "DBUS_SYSTEM_BUS_ADDRESS": bus.address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert (await process.stdout.readline()).decode() == f"DBUS_SYSTEM_BUS_ADDRESS={bus.address}\n"
    bus.process.kill()
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"the connection to the bus is lost" in err


def mock_process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "DBUS_SYSTEM_BUS_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "hostimage_dbus.mock", *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | {"PYTHONPATH": str(REPOSITORY_ROOT / "dbus")} | environment,
    )


def test_list() -> None:
    done = mock_process("--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


def test_the_system_bus_is_left_alone() -> None:
    done = mock_process()
    assert done.returncode == 2
    assert "--own-bus" in done.stderr


def test_no_bus() -> None:
    done = mock_process(DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent/bus")
    assert done.returncode == 1
    assert done.stderr.startswith("mock: cannot connect to the bus")


@pytest.mark.parametrize("argv", [["--scenario", "x"], ["--duration", "0"], ["--duration", "x"]])
def test_wrong_usage(argv: list[str]) -> None:
    assert mock_process(*argv).returncode == 2


@pytest.mark.parametrize(
    ("signature", "parts"),
    [("", []), ("sa{sv}", ["s", "a{sv}"]), ("(ss)aa{sv}a(tsso)o", ["(ss)", "aa{sv}", "a(tsso)", "o"])],
)
def test_complete_types(signature: str, parts: list[str]) -> None:
    assert complete_types(signature) == parts
    for part in parts:
        Variant(part, default(part))
