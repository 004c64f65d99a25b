"""Soft reboots over the bus: prepared by the job that is asked for one, started when it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, DEPLOYMENT_INTERFACE, MANAGER_INTERFACE, NO_OBJECT, ROOT_PATH
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, error_of, variants
from hostimage_testing.hosts import KINDS, Deployment, RecordedHost
from hostimage_testing.logind_double import LogindDouble, logind
from hostimage_testing.os_images import Recipe
from hostimaged.host import softreboot
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

SOFT = {"apply": "soft-reboot"}
STARTED = ("RebootWithFlags", (4,))


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> Iterator[RecordedHost]:
    """A host that runs from the second of two deployments."""
    made = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])
    yield made
    softreboot.cancel(HostPaths.scratch(made.root))


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture
def machine(bus: Bus) -> Iterator[LogindDouble]:
    """Whoever restarts the machine."""
    with logind(bus.address) as double:
        yield double


def two(host: RecordedHost, other: Recipe) -> tuple[Deployment, Deployment]:
    """The one that runs, and one from ``other``."""
    first, second = host.deploy(host.image(Recipe("2"))), host.deploy(host.image(other))
    host.live(first, second)
    host.booted(first)
    return first, second


def prepared(host: RecordedHost) -> str:
    """Id of the deployment whose root is mounted where systemd looks for the next one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[4] == str(host.root / "run/nextroot"):
            return after.split(" ")[1].removeprefix("composefs:")
    return ""


def reboots(machine: LogindDouble) -> list[tuple[str, Any]]:
    return [call for call in machine.calls if "eboot" in call[0]]


async def known(client: Client) -> dict[str, Any]:
    """The properties of the Manager once the host is known."""
    seen = len(client.signals)
    while (properties := await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Booted"] == NO_OBJECT:
        await client.until(lambda heard=seen: len(client.signals) > heard)
        seen = len(client.signals)
    return properties


async def ended(client: Client, member: str, signature: str = "a{sv}", *body: Any) -> tuple[str, list[Any]]:
    """A job and its end; options are the last argument."""
    *arguments, options = body or ({},)
    path = await client.manager(member, signature, *arguments, variants(options))
    return path, await client.removed(path)


async def done(client: Client, member: str, signature: str = "a{sv}", *body: Any) -> dict[str, Any]:
    path, end = await ended(client, member, signature, *body)
    assert end[3] == "done", end
    result = (await client.job(path))["Result"]
    assert isinstance(result, dict)
    return result


async def until(client: Client, right: Callable[[], bool]) -> None:
    """Wait for another thread's doing: a call of the daemon's, which comes when its job is announced."""
    for _ in range(2000):
        if right():
            return
        await client.status()
    raise AssertionError


async def test_back_at_once(
    host: RecordedHost, served: Daemon, client: Client, machine: LogindDouble
) -> None:
    first, second = two(host, Recipe("1"))
    await served.start()
    await known(client)
    assert await done(client, "Rollback", "a{sv}", SOFT) == {
        "result": "queued",
        "deployment": second.id,
        "soft-reboot": "prepared",
    }
    assert prepared(host) == second.id
    assert (host.root / "run/nextroot/etc/os.conf").read_text() == "version = 1\n"
    await until(client, lambda: reboots(machine) == [STARTED])

    result = await done(client, "CancelRollback")
    assert result == {"result": "cancelled", "deployment": first.id}
    assert prepared(host) == ""
    assert not (host.root / "run/nextroot").exists()
    assert reboots(machine) == [STARTED]


async def test_an_update_without_the_firmware(
    host: RecordedHost, served: Daemon, client: Client, machine: LogindDouble
) -> None:
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe("1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    image = host.image(Recipe("2"))
    await served.start()
    await known(client)
    result = await done(client, "Upgrade", "a{sv}", SOFT)
    assert (result["result"], result["deployment"]) == ("staged", image.id)
    assert result["soft-reboot"] == "prepared"
    assert prepared(host) == image.id
    await until(client, lambda: reboots(machine) == [STARTED])

    # Another one that is asked for the same finds it there.
    result = await done(client, "Upgrade", "a{sv}", SOFT)
    assert (result["result"], result["soft-reboot"]) == ("already-staged", "prepared")
    await until(client, lambda: reboots(machine) == [STARTED] * 2)

    await done(client, "Unstage")
    assert prepared(host) == ""


async def test_nothing_new_restarts_nothing(
    host: RecordedHost, served: Daemon, client: Client, machine: LogindDouble
) -> None:
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t0"
    booted = host.deploy(host.image(Recipe("1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    await served.start()
    await known(client)
    result = await done(client, "Upgrade", "a{sv}", SOFT)
    assert (result["result"], result["soft-reboot"]) == ("already-current", "not-needed")
    assert prepared(host) == ""
    await client.status()
    assert reboots(machine) == []


async def test_what_is_known_to_be_out_of_reach_is_refused(
    host: RecordedHost, served: Daemon, client: Client, machine: LogindDouble
) -> None:
    two(host, Recipe("1", kernel=b"another kernel "))
    await served.start()
    target = (await known(client))["RollbackTarget"]
    entries = sorted(path.read_bytes() for path in host.entries.iterdir())
    for member, path, interface in (
        ("Rollback", ROOT_PATH, MANAGER_INTERFACE),
        ("MakeDefault", target, DEPLOYMENT_INTERFACE),
    ):
        call = client.connection.call(
            BUS_NAME, path, interface, member, "a{sv}", [variants(SOFT)], timeout=PATIENCE
        )
        error = await error_of(call)
        assert error.name == ErrorName.PRECONDITION_FAILED
        assert "another kernel or initrd" in error.message
    assert sorted(path.read_bytes() for path in host.entries.iterdir()) == entries
    assert reboots(machine) == []


async def test_what_turns_out_to_be_out_of_reach_is_done_all_the_same(
    host: RecordedHost, served: Daemon, client: Client, machine: LogindDouble
) -> None:
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe("1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    image = host.image(Recipe("2", kernel=b"another kernel "))
    await served.start()
    await known(client)
    _, end = await ended(client, "Upgrade", "a{sv}", SOFT)
    assert end[3:5] == ["failed", ErrorName.PRECONDITION_FAILED]
    assert end[5].startswith("done, and effective from the next reboot; but there is no soft reboot: ")
    assert "another kernel or initrd" in end[5]
    staged = await client.properties(
        (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Staged"], DEPLOYMENT_INTERFACE
    )
    assert staged["Id"] == image.id
    assert prepared(host) == ""
    assert reboots(machine) == []
