"""What systemd tells of units that count here, as a double and, in the container, as it is.

When the next update comes by itself, and whether anything will activate it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.names import MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import Connection, MethodCall, Variant
from hostimage_testing.bus import PROPERTIES, Bus, Client, Daemon
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import installed
from hostimaged.jobs.units import FINALIZER_PATH, MANAGER, MANAGER_PATH, NAME, TIMER, TIMER_PATH, UNIT

NEVER = (1 << 64) - 1
SOON = 1_900_000_000_000_000


@dataclass(eq=False)
class SystemdDouble:
    """Knows the properties of both units; None is answered with an error. Tells whom it may of changes."""

    connection: Connection
    values: dict[tuple[str, str], Variant | None]
    finalizer: str = "active"
    subscribers: int = 0
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    faults: list[MethodCall] = field(default_factory=list)

    def handle(self, call: MethodCall) -> None:
        if (call.path, call.interface, call.member) == (MANAGER_PATH, MANAGER, "Subscribe"):
            self.subscribers += 1
            self.subscribed.set()
            self.connection.reply(call, "", [])
        elif (call.path, call.member, call.body) == (FINALIZER_PATH, "Get", [UNIT, "ActiveState"]):
            self.connection.reply(call, "v", [Variant("s", self.finalizer)])
        elif (call.path, call.interface, call.member) == (TIMER_PATH, PROPERTIES, "Get"):
            interface, member = call.body
            value = self.values[interface, member]
            if value is None:
                self.connection.reply_error(call, "org.freedesktop.DBus.Error.Failed", "no")
            else:
                self.connection.reply(call, "v", [value])
        else:
            self.faults.append(call)

    def set(self, interface: str, member: str, value: Variant | None) -> None:
        self.values[interface, member] = value
        if self.subscribers:
            body = [interface, {} if value is None else {member: value}, [member] if value is None else []]
            self.connection.emit(TIMER_PATH, PROPERTIES, "PropertiesChanged", "sa{sv}as", body)

    def set_finalizer(self, state: str) -> None:
        self.finalizer = state
        body = [UNIT, {"ActiveState": Variant("s", state)}, []]
        self.connection.emit(FINALIZER_PATH, PROPERTIES, "PropertiesChanged", "sa{sv}as", body)


@asynccontextmanager
async def systemd(bus: Bus, realtime: int = SOON, monotonic: int = 0) -> AsyncIterator[SystemdDouble]:
    values: dict[tuple[str, str], Variant | None] = {
        (UNIT, "SubState"): Variant("s", "waiting"),
        (TIMER, "NextElapseUSecRealtime"): Variant("t", realtime),
        (TIMER, "NextElapseUSecMonotonic"): Variant("t", monotonic),
    }
    made = SystemdDouble(await Connection.connect(bus.address), values)
    try:
        made.connection.set_handler(made.handle)
        await made.connection.request_name(NAME)
        yield made
    finally:
        await made.connection.close()
    assert not made.faults, made.faults


async def next_check(client: Client) -> int:
    return int((await client.properties(ROOT_PATH, MANAGER_INTERFACE))["NextCheck"])


async def told(client: Client, *values: int) -> None:
    """All changes so far are to these values."""
    await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "NextCheck") == list(values))
    assert await next_check(client) == values[-1]


def with_policy(daemon: Daemon, policy: str = "check") -> None:
    (daemon.root / "etc").mkdir(parents=True, exist_ok=True)
    (daemon.root / "etc/hostimaged.toml").write_text(f'update-policy = "{policy}"\n')


async def test_the_timer_is_followed(daemon: Daemon, bus: Bus, client: Client) -> None:
    with_policy(daemon)
    await daemon.start()
    assert await next_check(client) == 0, "there is no systemd on this bus"
    async with systemd(bus) as double:
        await told(client, SOON)
        assert double.subscribers == 1
        double.set(UNIT, "SubState", Variant("s", "running"))
        await told(client, SOON, 0)
        double.set(TIMER, "NextElapseUSecRealtime", Variant("t", SOON + 7))
        double.set(UNIT, "SubState", Variant("s", "waiting"))
        await told(client, SOON, 0, SOON + 7)
        double.set(UNIT, "SubState", None)
        await told(client, SOON, 0, SOON + 7, 0)
        double.set(UNIT, "SubState", Variant("s", "waiting"))
        await told(client, SOON, 0, SOON + 7, 0, SOON + 7)
    await told(client, SOON, 0, SOON + 7, 0, SOON + 7, 0)


async def test_without_a_policy_the_timer_does_nothing(daemon: Daemon, bus: Bus, client: Client) -> None:
    with_policy(daemon, "none")
    async with systemd(bus) as double:
        await daemon.start()
        await double.subscribed.wait()
        double.set(TIMER, "NextElapseUSecRealtime", Variant("t", SOON + 7))
        with_policy(daemon)
        await client.manager("Reload", "")
        await client.until(
            lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "NextCheck")[-1:] == [SOON + 7]
        )
        with_policy(daemon, "none")
        await client.manager("Reload", "")
        await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "NextCheck")[-1:] == [0])


@pytest.mark.parametrize(
    ("realtime", "monotonic", "due"),
    [
        (NEVER, 0, None),
        (0, NEVER, None),
        (SOON, NEVER, SOON),
        (NEVER, 3600_000_000, 3600_000_000),
        (SOON, 3600_000_000, 3600_000_000),
    ],
)
async def test_what_is_due(
    daemon: Daemon, bus: Bus, client: Client, realtime: int, monotonic: int, due: int | None
) -> None:
    """Of a calendar and of a time since boot the earlier counts."""
    with_policy(daemon)
    async with systemd(bus, realtime, monotonic) as double:
        await daemon.start()
        if due is None:
            await double.subscribed.wait()
            # What was made to be looked at before is answered before this one is.
            double.set(TIMER, "NextElapseUSecRealtime", Variant("t", SOON))
            await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "NextCheck") == [SOON])
            return
        await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "NextCheck"))
        expected = due if due == SOON else due + (time.time_ns() - time.monotonic_ns()) // 1000
        assert await next_check(client) == pytest.approx(expected, abs=5_000_000, rel=0)


@pytest.mark.parametrize("value", [Variant("s", "soon"), Variant("u", 5), None])
async def test_an_answer_of_another_form_is_never(
    daemon: Daemon, bus: Bus, client: Client, value: Any
) -> None:
    with_policy(daemon)
    async with systemd(bus) as double:
        await daemon.start()
        await told(client, SOON)
        double.set(TIMER, "NextElapseUSecRealtime", value)
        await told(client, SOON, 0)


async def finalizer_problem(client: Client, there: bool) -> None:
    """It is told that nothing will activate what is staged, or no more."""

    async def told() -> bool:
        problems = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Problems"]
        return any(id_ == "finalizer" for id_, *_ in problems)

    seen = -1
    while await told() is not there:
        await client.until(lambda heard=seen: len(client.signals) > heard)
        seen = len(client.signals)


@pytest.mark.interop
async def test_a_host_without_its_finalizer(bus: Bus, client: Client, tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    installed(host)
    served = Daemon(bus, host.root, scripted=False)
    try:
        await served.start()
        await finalizer_problem(client, there=False)
        async with systemd(bus) as double:
            await double.subscribed.wait()
            for state, there in (
                ("inactive", True),
                ("activating", False),
                ("failed", True),
                ("active", False),
            ):
                double.set_finalizer(state)
                await finalizer_problem(client, there=there)
            double.set_finalizer("inactive")
            await finalizer_problem(client, there=True)
        await finalizer_problem(client, there=False)
        await served.end()
    finally:
        served.clean_up()


async def test_without_a_deployment_no_finalizer_is_missed(daemon: Daemon, bus: Bus, client: Client) -> None:
    async with systemd(bus) as double:
        double.finalizer = "inactive"
        await daemon.start()
        await double.subscribed.wait()
        await finalizer_problem(client, there=False)
