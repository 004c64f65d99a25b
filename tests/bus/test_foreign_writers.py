"""What other programs do on the host is seen: each fact that status shows changes, and is announced."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.names import (
    DEPLOYMENT_INTERFACE,
    MANAGER_INTERFACE,
    NO_OBJECT,
    ROOT_PATH,
    deployment_path,
)
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, plain
from hostimage_testing.hosts import KINDS, Deployment
from hostimage_testing.lives import Life, Records, upgraded
from hostimage_testing.os_images import Recipe
from hostimage_testing.processes import Process, descendants
from hostimaged.system import syscalls

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Records:
    """Hosts, made once."""
    return Records(tmp_path_factory.mktemp("records"), cfsctl)


@pytest.fixture
def life(request: pytest.FixtureRequest, tmp_path: Path, records: Records) -> Life:
    """A host with two deployments."""
    return records.copy(upgraded, tmp_path / "host", getattr(request, "param", KINDS[2]))


@pytest.fixture
def served(bus: Bus, life: Life) -> Iterator[Daemon]:
    """The daemon of that host, not yet started."""
    made = Daemon(bus, life.host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


class Seen:
    """What the signals tell since it was made, which no call is needed for."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._mark = len(client.signals)

    def values(self, path: str, interface: str, name: str) -> list[Any]:
        return [
            plain(signal.body[1][name])
            for signal in self._client.signals[self._mark :]
            if (signal.member, signal.path) == ("PropertiesChanged", path)
            and signal.body[0] == interface
            and name in signal.body[1]
        ]

    async def manager(self, name: str, value: object) -> None:
        """Wait until it is told that a property of the Manager has become ``value``."""
        await self._client.until(lambda: value in self.values(ROOT_PATH, MANAGER_INTERFACE, name))

    async def deployment(self, of: Deployment, name: str, value: object) -> None:
        """The same of a deployment that stays."""
        path = deployment_path(of.id)
        await self._client.until(lambda: value in self.values(path, DEPLOYMENT_INTERFACE, name))

    async def appears(self, of: Deployment) -> dict[str, Any]:
        """Wait until a deployment is added; its properties."""
        return await self._interfaces("InterfacesAdded", of)

    async def disappears(self, of: Deployment) -> None:
        """Wait until one is removed."""
        await self._interfaces("InterfacesRemoved", of)

    async def _interfaces(self, member: str, of: Deployment) -> dict[str, Any]:
        path = deployment_path(of.id)

        def found() -> list[Any]:
            signals = self._client.signals[self._mark :]
            return [s.body[1] for s in signals if s.member == member and s.body[0] == path]

        (interfaces, *_) = await self._client.until(found)
        return plain(interfaces[DEPLOYMENT_INTERFACE]) if member == "InterfacesAdded" else {}


async def start(served: Daemon, client: Client, life: Life) -> None:
    """Start the daemon, and wait until it shows the host."""
    await served.start()
    rows = (await client.status())["deployments"]
    assert life.booted.id in [row["id"] for row in rows]


def staged(life: Life) -> Life:
    """With a third deployment, as bootc stages it: state, entries, marker."""
    host = life.host
    third = host.deploy(host.image(Recipe(version="3", kernel=b"kernel three ")))
    host.staged(third, life.booted)
    host.mark(third)
    return replace(life, staged=third)


async def rows(client: Client) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in (await client.status())["deployments"]}


@pytest.mark.parametrize("life", [KINDS[0], KINDS[1], KINDS[2]], ids=str, indirect=True)
async def test_staging_and_unstaging(life: Life, served: Daemon, client: Client) -> None:
    """And away again."""
    host = life.host
    await start(served, client, life)
    seen = Seen(client)
    third = staged(life).staged
    assert third is not None
    assert (await seen.appears(third))["Id"] == third.id
    await seen.manager("Staged", deployment_path(third.id))
    await seen.manager("RebootRequired", True)
    assert (await rows(client))[third.id]["staged"]

    seen = Seen(client)
    host.marker.unlink()
    await seen.manager("Staged", NO_OBJECT)
    await seen.manager("RebootRequired", False)
    if host.entries_staged.is_dir():
        shutil.rmtree(host.entries_staged)
    else:
        host.entries_staged.unlink()
    shutil.rmtree(host.state(third))
    await seen.disappears(third)
    assert third.id not in await rows(client)


async def test_the_marker_is_locked_and_unlocked(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    life = staged(life)
    assert life.staged is not None
    await start(served, client, life)
    seen = Seen(client)
    host.mark(life.staged, locked=True)
    await seen.deployment(life.staged, "Locked", True)
    await seen.manager("RebootRequired", False)
    host.mark(life.staged)
    await seen.deployment(life.staged, "Locked", False)


# GRUB's order of files is that of their versions, whatever their places.
@pytest.mark.parametrize("life", [KINDS[1], KINDS[2]], ids=str, indirect=True)
async def test_the_order_of_entries_is_exchanged(life: Life, served: Daemon, client: Client) -> None:
    """As ``bootc rollback`` does it, twice: what took the place of another is watched as that was."""
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    for queued in (True, False):
        seen = Seen(client)
        order = (life.rollback, life.booted) if queued else (life.booted, life.rollback)
        host.staged(*order)
        syscalls.rename_exchange(host.entries, host.entries_staged)
        await seen.manager("RollbackQueued", queued)
        # With their places, entries change their names as well, and so the object is another.
        assert (await rows(client))[life.booted.id]["order"] == int(queued)


async def test_an_origin_is_edited(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    seen = Seen(client)
    host.write_origin(life.booted, reference="ostree-unverified-registry:example.com/other:1")
    await seen.manager("TrackedImage", "docker://example.com/other:1")
    # What never changes of an object changes with the object.
    await seen.disappears(life.booted)
    assert (await seen.appears(life.booted))["Image"] == "docker://example.com/other:1"
    aside = host.root / "aside"
    seen = Seen(client)
    host.origin(life.rollback).rename(aside)
    assert (await seen.appears(life.rollback))["Version"] == ""
    seen = Seen(client)
    aside.rename(host.origin(life.rollback))
    assert (await seen.appears(life.rollback))["Version"] == "1"


async def test_a_pin_is_set_and_released(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    seen = Seen(client)
    tag = host.write_tag(life.rollback.image, "localhost/hostimaged-pin-")
    await seen.deployment(life.rollback, "Pinned", True)
    tag.unlink()
    await seen.deployment(life.rollback, "Pinned", False)


async def images(client: Client, right: Any) -> list[dict[str, Any]]:
    """The images once they are ``right``: there is no property of them, so the Manager is asked."""
    async with asyncio.timeout(PATIENCE):
        while not right(found := plain(await client.manager("ListImages", "a{sv}", {}))):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert isinstance(found, list)
    return found


async def test_images_come_and_go(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    await start(served, client, life)
    other = host.image(Recipe(version="9"))
    tag = host.write_tag(other, "example.com/")
    found = await images(client, lambda rows: len(rows) == 3)
    assert [row["version"] for row in found if row["tag"].startswith("example.com/")] == ["9"]
    tag.unlink()
    await images(client, lambda rows: len(rows) == 2)
    pulled = host.write_tag(other, "localhost/hostimaged-pull-")
    await images(client, lambda rows: len(rows) == 3)
    row = {
        "reference": "docker://example.com/os:9",
        "manifest_digest": other.manifest_digest,
        "source_digest": other.manifest_digest,
        "time": 1_700_000_000,
    }
    pulls = host.sysroot / "state/hostimaged/pulls.json"
    pulls.parent.mkdir(exist_ok=True)
    pulls.write_text(json.dumps({"version": 1, "pulls": [row]}))
    await images(
        client, lambda rows: any(row.get("reference") == "docker://example.com/os:9" for row in rows)
    )
    pulled.unlink()


async def test_an_image_is_damaged(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    link = host.repository / "images" / life.rollback.id
    aside = host.root / "aside"
    seen = Seen(client)
    link.rename(aside)
    await seen.deployment(life.rollback, "Verity", "broken")
    await seen.manager("RollbackTarget", NO_OBJECT)
    aside.rename(link)
    await seen.manager("RollbackTarget", deployment_path(life.rollback.id))


async def test_a_kernel_vanishes(life: Life, served: Daemon, client: Client) -> None:
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    seen = Seen(client)
    host.artifact(life.rollback).rename(host.root / "aside")
    await seen.manager("RollbackTarget", NO_OBJECT)


async def test_the_root_is_mounted_anew(life: Life, served: Daemon, client: Client) -> None:
    """A fact of the table of mounts, which has no property."""
    host = life.host
    await start(served, client, life)
    table = host.root / "proc/self/mountinfo"
    table.write_text(table.read_text().replace("composefs:", "transient:composefs="))
    async with asyncio.timeout(PATIENCE):
        while not (await client.status())["host"]["transient-root"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_host_that_was_not_there(client: Client, bus: Bus, tmp_path: Path, records: Records) -> None:
    """A daemon that was started on an empty root sees what is installed there."""
    root = tmp_path / "host"
    root.mkdir()
    served = Daemon(bus, root, scripted=False)
    try:
        await served.start()
        assert (await client.status())["deployments"] == []
        life = records.copy(upgraded, tmp_path / "made", KINDS[2])
        seen = Seen(client)
        shutil.copytree(life.host.root, root, symlinks=True, dirs_exist_ok=True)
        await seen.manager("Booted", deployment_path(life.booted.id))
    finally:
        served.clean_up()


async def test_ten_thousand_changes(
    life: Life, served: Daemon, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """They cost a few scans, no memory, and the last one is seen."""
    host = life.host
    assert life.rollback is not None
    await start(served, client, life)
    assert served.process is not None
    tags = host.tag(life.rollback.image).parent
    workers: set[Process] = set()
    finished = asyncio.Event()

    async def count() -> None:
        while not finished.is_set():
            assert served.process is not None
            workers.update(descendants(served.process.pid))
            await asyncio.sleep(0.02)

    before, cpu, began = served.resident(), served.cpu(), asyncio.get_running_loop().time()
    counting = asyncio.create_task(count())
    for number in range(10_000):
        link = tags / f"storm-{number}"
        link.symlink_to("../../nowhere")
        link.unlink()
        if number % 100 == 0:
            await asyncio.sleep(0.02)
    seen = Seen(client)
    host.write_tag(life.rollback.image, "localhost/hostimaged-pin-")
    await seen.deployment(life.rollback, "Pinned", True)
    took = asyncio.get_running_loop().time() - began
    finished.set()
    await counting
    grown, used = served.resident() - before, served.cpu() - cpu
    with capsys.disabled():
        print(
            f" [{len(workers)} scans in {took:.1f} s, {used * 1000:.0f} ms, {grown / 1024:+.0f} KiB]", end=""
        )
    assert 1 <= len(workers) <= took / 2 + 2
    assert grown < 2 << 20
    assert used < 0.1 * took + 0.5


def links(daemon: Daemon) -> list[str]:
    """What the daemon has open, but for what it closes just now."""
    assert daemon.process is not None
    place = f"/proc/{daemon.process.pid}/fd"
    found = []
    for fd in os.listdir(place):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"{place}/{fd}"))
    return found


async def test_nothing_is_kept_open(life: Life, served: Daemon, client: Client) -> None:
    """Nothing of the host that could be written to, or that would keep a file system busy."""
    host = life.host
    await start(served, client, life)
    seen = Seen(client)
    host.write_tag(life.booted.image, "localhost/hostimaged-pin-")
    await seen.deployment(life.booted, "Pinned", True)
    opened = links(served)
    assert "anon_inode:inotify" in opened
    ours = (str(host.root / "run/hostimaged"), str(served.log))
    assert [to for to in opened if to.startswith(str(host.root)) and not to.startswith(ours)] == []
