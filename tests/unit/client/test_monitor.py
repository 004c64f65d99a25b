"""hostimagectl monitor: every signal of the daemon becomes an event, and an event at most a few lines."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_NO_SERVICE
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH, job_path
from hostimage_dbus.transport import Variant
from hostimagectl.commands.monitor import Monitor
from hostimagectl.events import Event, Narrator, event_of
from hostimagectl.failure import Failure

PATH = job_path(1)
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"


async def watched(bus: Any, daemon: Any, console: Any, *, play: Any) -> int:
    """Run the monitor, call ``play`` when it listens, interrupt it; gives its exit code."""
    task = asyncio.create_task(Monitor(daemon).run(console))
    await bus.called("GetNameOwner")
    play()
    await asyncio.sleep(0.01)
    signal.raise_signal(signal.SIGINT)
    return await task


def texts(console: Any) -> list[str]:
    return [line.split("  ", 1)[1] for line in console.out.splitlines()]


async def test_a_job_from_its_start_to_its_end(bus: Any, daemon: Any, make_console: Any) -> None:
    def play() -> None:
        bus.add_job()
        bus.signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", [PATH, {JOB_INTERFACE: {}}])
        bus.signal(ROOT_PATH, MANAGER_INTERFACE, "JobNew", [1, PATH, "pull"])
        bus.change(PATH, State="running", Phase="pulling")
        for thousandth in range(500, 515):
            bus.change(PATH, Progress=thousandth / 1000, BytesDone=thousandth)
        bus.end(PATH, "failed", "org.hostimage1.Error.Network", "no route \x1b[2J")
        bus.signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", [PATH, [JOB_INTERFACE]])

    console = make_console()
    assert await watched(bus, daemon, console, play=play) == 130
    assert texts(console) == [
        "hostimaged runs",
        "job 1: new, pull",
        "job 1: running, pulling",
        "job 1: 50%",
        "job 1: 51%",
        "job 1: failed",
        "job 1: failed: no route \\x1b[2J",
    ]
    assert bus._callbacks == []


async def test_json_is_a_document_a_line(bus: Any, daemon: Any, make_console: Any) -> None:
    def play() -> None:
        bus.signal(ROOT_PATH, MANAGER_INTERFACE, "JobNew", [1, PATH, "pull"])
        manager = [MANAGER_INTERFACE, {"State": Variant("s", "pulling")}, ["RepositorySize"]]
        bus.signal(ROOT_PATH, PROPERTIES, "PropertiesChanged", manager)
        added = {JOB_INTERFACE: {"Progress": Variant("d", float("nan"))}}
        bus.signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", [PATH, added])
        bus.signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", [PATH, [JOB_INTERFACE]])
        bus.announce(PATH, "failed", "org.hostimage1.Error.Network", "no route")

    console = make_console(as_json=True)
    await watched(bus, daemon, console, play=play)
    events = [json.loads(line) for line in console.out.splitlines()]
    assert all(event.pop("time") > 1_600_000_000_000_000 for event in events)
    assert events == [
        {"event": "service", "running": True},
        {"event": "job-new", "id": 1, "path": PATH, "kind": "pull"},
        {
            "event": "changed",
            "path": ROOT_PATH,
            "interface": MANAGER_INTERFACE,
            "properties": {"State": "pulling"},
            "invalidated": ["RepositorySize"],
        },
        {"event": "added", "path": PATH, "interfaces": {JOB_INTERFACE: {"Progress": None}}},
        {"event": "removed", "path": PATH, "interfaces": [JOB_INTERFACE]},
        {
            "event": "job-removed",
            "id": 1,
            "path": PATH,
            "kind": "pull",
            "result": "failed",
            "error": {"name": "org.hostimage1.Error.Network", "message": "no route"},
        },
    ]


async def test_the_daemon_goes_and_comes(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.owner = None

    def play() -> None:
        bus.own(":1.8")
        bus.signal(ROOT_PATH, MANAGER_INTERFACE, "JobNew", [1, PATH, "pull"])
        bus.own(None)

    console = make_console()
    await watched(bus, daemon, console, play=play)
    assert texts(console) == [
        "hostimaged does not run",
        "hostimaged runs",
        "job 1: new, pull",
        "hostimaged does not run",
    ]


async def test_it_does_not_start_the_daemon(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.owner = None
    await watched(bus, daemon, make_console(), play=lambda: None)
    assert {member for member, _, _ in bus.calls} == {"GetNameOwner"}


async def test_strangers_are_ignored(bus: Any, daemon: Any, make_console: Any) -> None:
    def play() -> None:
        bus.signal(ROOT_PATH, MANAGER_INTERFACE, "JobNew", [1, PATH, "pull"], ":1.66")
        bus.signal(
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "NameOwnerChanged",
            ["org.hostimage1", "", ":1.66"],
            ":1.66",
        )

    console = make_console()
    await watched(bus, daemon, console, play=play)
    assert texts(console) == ["hostimaged runs"]


async def test_the_bus_is_lost(bus: Any, daemon: Any, make_console: Any) -> None:
    task = asyncio.create_task(Monitor(daemon).run(make_console()))
    await bus.called("GetNameOwner")
    bus.lost.set()
    with pytest.raises(Failure) as caught:
        await task
    assert caught.value.code == EXIT_NO_SERVICE


@pytest.mark.parametrize(
    ("interface", "member", "body"),
    [
        (MANAGER_INTERFACE, "JobNew", []),
        (MANAGER_INTERFACE, "JobNew", ["1", PATH, "pull"]),
        (MANAGER_INTERFACE, "JobRemoved", [1, PATH]),
        (MANAGER_INTERFACE, "Unknown", [1]),
        (PROPERTIES, "PropertiesChanged", [1, {}, []]),
        (OBJECT_MANAGER, "InterfacesAdded", [PATH, []]),
        ("com.example", "JobNew", [1, PATH, "pull"]),
    ],
)
def test_signals_that_make_no_sense(interface: str, member: str, body: list[Any]) -> None:
    assert event_of(ROOT_PATH, interface, member, body) is None


def test_lines_about_other_objects() -> None:
    deployment = "/org/hostimage1/deployments/_00"
    narrator = Narrator()

    def told(name: str, **details: Any) -> list[str]:
        return [
            line.split("  ", 1)[1] for line in narrator.lines(Event(1_700_000_000_000_000, name, details))
        ]

    assert told("added", path=deployment, interfaces={}) == [f"{deployment}: added"]
    assert told(
        "changed",
        path=deployment,
        interface="org.hostimage1.Deployment",
        properties={"Staged": True, "Verity": "\x1b"},
        invalidated=["SizeExclusive"],
    ) == [
        f"{deployment}: Staged is yes",
        f"{deployment}: Verity is \\x1b",
        f"{deployment}: SizeExclusive changed",
    ]
    assert told(
        "changed",
        path=ROOT_PATH,
        interface=MANAGER_INTERFACE,
        properties={"Update": {}, "Staged": "/", "QueuedJobs": []},
        invalidated=[],
    ) == ["Manager: Update is empty", "Manager: Staged is empty", "Manager: QueuedJobs is empty"]
