"""A metered network and a battery hold background jobs, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import jsonschema
import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import Variant
from hostimage_testing.bus import PROPERTIES, Bus, Client, Daemon, connected, error_of
from hostimage_testing.property_double import BATTERY, METERED, PropertyDouble, service
from hostimaged.jobs.conditions import Condition, Watch

SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())


class Told:
    """What a watch told, in order."""

    def __init__(self) -> None:
        self.values: list[bool] = []
        self._news = asyncio.Event()

    def take(self, reason: str, holds: bool) -> None:
        assert reason in ("metered", "battery")
        self.values.append(holds)
        self._news.set()

    async def until(self, *values: bool) -> None:
        async with asyncio.timeout(20):
            while self.values != list(values):
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def watching(client: Client, condition: Condition) -> AsyncIterator[Told]:
    told = Told()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(Watch(client.connection, condition, told.take).run())
        yield told
        task.cancel()


async def double_answered(double: PropertyDouble, client: Client) -> int:
    """Have all that was asked over this connection answered, and how often that was, with two calls more."""
    condition = double.condition
    async with asyncio.timeout(20):
        while not double.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for _ in range(2):
        # What the watch was made to ask before these, it asked before the second of them.
        await client.connection.call(
            condition.name, condition.path, PROPERTIES, "Get", "ss", [condition.interface, condition.member]
        )
    return double.asked


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        (METERED, 0, False),
        (METERED, 1, True),
        (METERED, 2, False),
        (METERED, 3, True),
        (METERED, 4, False),
        (METERED, 77, False),
        (BATTERY, True, True),
        (BATTERY, False, False),
    ],
)
async def test_what_holds(bus: Bus, client: Client, condition: Condition, value: Any, holds: bool) -> None:
    async with service(bus.address, condition, value) as double, watching(client, condition) as told:
        if not holds:
            await double_answered(double, client)
            assert told.values == []
            double.set(Variant(condition.signature, condition.values[0]))
        await told.until(True)


async def test_changes_are_followed(bus: Bus, client: Client) -> None:
    async with watching(client, BATTERY) as told:
        # It comes later than we do, changes, says only that it changed, fails, and goes.
        async with service(bus.address, BATTERY, True) as double:
            await told.until(True)
            double.set(Variant("b", False))
            await told.until(True, False)
            double.set(Variant("b", True), invalidate=True)
            await told.until(True, False, True)
            double.set(None)
            await told.until(True, False, True, False)
            double.set(Variant("b", True))
            await told.until(True, False, True, False, True)
        await told.until(True, False, True, False, True, False)


async def test_a_value_of_another_type_holds_nothing(bus: Bus, client: Client) -> None:
    async with service(bus.address, METERED, 1) as double, watching(client, METERED) as told:
        await told.until(True)
        double.set(Variant("s", "1"))
        await told.until(True, False)


async def test_signals_of_others_are_not_heard(
    bus: Bus, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostimaged.jobs.properties._PAUSE", 0)
    async with (
        service(bus.address, BATTERY, False) as double,
        watching(client, BATTERY) as told,
        connected(bus) as other,
    ):
        await double_answered(double, client)
        # The watch's own rules let none of them by, but another on the same connection may.
        await client.connection.add_match(f"type='signal',member='PropertiesChanged',path='{BATTERY.path}'")
        double.value = Variant("b", True)
        asked = double.asked
        for _ in range(50):
            body = [BATTERY.interface, {"OnBattery": Variant("b", True)}, []]
            other.connection.emit(BATTERY.path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body)
        await client.until(lambda: len(client.named("PropertiesChanged", BATTERY.path)) == 50)
        assert await double_answered(double, client) == asked + 2
        assert told.values == []


async def test_background_jobs_wait_for_better_times(daemon: Daemon, bus: Bus, client: Client) -> None:
    async with service(bus.address, METERED, 1) as network, service(bus.address, BATTERY, True) as power:
        await daemon.start()
        await client.until(
            lambda: ["metered", "battery"] in client.changes(ROOT_PATH, MANAGER_INTERFACE, "Holds")
        )
        image = daemon.script("image", {"result": {}})
        held = await client.check(image, background=True)
        assert (await client.job(held))["HoldReasons"] == ["metered", "battery"]
        refused = await error_of(client.check(image, background=True, queue=False, no_join=True))
        assert refused.name == ErrorName.HELD
        document = await client.status()
        jsonschema.validate(document, SCHEMA)
        assert [hold["kind"] for hold in document["holds"]] == ["metered", "battery"]
        # Somebody waits for this one, and this one may.
        assert (await client.removed(await client.pull(image)))[3] == "done"
        brave = await client.check(
            image, background=True, allow_metered=True, allow_on_battery=True, no_join=True
        )
        assert (await client.removed(brave))[3] == "done"
        network.set(Variant("u", 4))
        await client.changed(held, JOB_INTERFACE, "HoldReasons", ["battery"])
        power.set(Variant("b", False))
        assert (await client.removed(held))[3] == "done"
        assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "Holds")[-1] == []
