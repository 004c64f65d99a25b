"""What a deployment is said to free is freed by deleting it and collecting garbage."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_dbus.names import DEPLOYMENT_INTERFACE, MANAGER_INTERFACE, ROOT_PATH, deployment_path
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon
from hostimage_testing.hosts import KINDS, Deployment, RecordedHost
from hostimage_testing.lives import upgraded
from hostimage_testing.os_images import Recipe

pytestmark = pytest.mark.interop


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    """The daemon of that host, not yet started."""
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


def blocks(*paths: Path) -> int:
    """Bytes on disk of what is at and below ``paths``."""
    every = [each for path in paths for each in (path, *path.rglob("*"))]
    return sum(each.lstat().st_blocks * 512 for each in every)


async def size(client: Client, of: Deployment) -> int:
    properties = await client.properties(deployment_path(of.id), DEPLOYMENT_INTERFACE)
    found = properties["SizeExclusive"]
    assert isinstance(found, int)
    return found


async def invalidated(client: Client, of: Deployment, mark: int) -> None:
    """Wait until it is told that the size is another."""
    path = deployment_path(of.id)

    def told() -> bool:
        signals = [s for s in client.signals[mark:] if (s.member, s.path) == ("PropertiesChanged", path)]
        return any("SizeExclusive" in signal.body[2] for signal in signals)

    await client.until(told)


async def measured(client: Client, of: Deployment) -> int:
    """Its size, once that is known."""
    mark = 0
    while not (found := await size(client, of)):
        await invalidated(client, of, mark)
        mark = len(client.signals)
    return found


def objects(host: RecordedHost) -> int:
    return sum(blocks(path) for path in (host.repository / "objects").glob("*/*"))


async def collect(host: RecordedHost, cfsctl: str) -> None:
    collector = await asyncio.create_subprocess_exec(
        cfsctl, "--insecure", "--repo", host.repository, "gc", stdout=asyncio.subprocess.DEVNULL
    )
    assert await collector.wait() == 0


async def test_what_is_told_is_freed(host: RecordedHost, served: Daemon, client: Client, cfsctl: str) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    # What nothing leads to by now is not the deployment's.
    await collect(host, cfsctl)
    await served.start()
    await client.status()
    told = await measured(client, life.rollback)
    assert (await measured(client, life.booted)) > 0
    rows = {row["id"]: row["size-exclusive"] for row in (await client.status())["deployments"]}
    assert rows[life.rollback.id] == told

    kernel = host.artifact(life.rollback)
    beside = blocks(host.state(life.rollback), *kernel.iterdir())
    before = objects(host)
    path = deployment_path(life.rollback.id)
    (job,) = await client.connection.call(
        "org.hostimage1", path, DEPLOYMENT_INTERFACE, "Delete", "a{sv}", [{}], timeout=PATIENCE
    )
    assert (await client.removed(job))[3] == "done"
    assert not host.state(life.rollback).exists()
    assert not kernel.exists()
    host.tag(life.rollback.image).unlink(missing_ok=True)
    await collect(host, cfsctl)
    assert told == before - objects(host) + beside


async def test_sharing_and_pulling(host: RecordedHost, served: Daemon, client: Client) -> None:
    """What others need is nobody's alone; what was pulled for a deployment is its own."""
    life = upgraded(host)
    assert life.rollback is not None
    host.write_tag(life.rollback.image, "localhost/hostimaged-pull-")
    await served.start()
    await client.status()
    alone = await measured(client, life.rollback)
    mark = len(client.signals)
    tag = host.write_tag(life.rollback.image, "example.com/")
    await invalidated(client, life.rollback, mark)
    shared = await measured(client, life.rollback)
    assert 0 < shared < alone
    assert shared >= blocks(host.state(life.rollback))
    mark = len(client.signals)
    tag.unlink()
    await invalidated(client, life.rollback, mark)
    assert await measured(client, life.rollback) == alone


async def test_a_damaged_repository_tells_nothing(host: RecordedHost, served: Daemon, client: Client) -> None:
    life = upgraded(host)
    other = host.image(Recipe(version="9"))
    host.write_tag(other, "example.com/")
    link = host.stream("config", other.config_digest)
    target = (link.parent / os.readlink(link)).resolve()
    target.write_bytes(b"x" * 100)
    await served.start()
    await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "Booted"))
    sizes = host.root / "run/hostimaged/sizes.json"
    async with asyncio.timeout(PATIENCE):
        while not os.path.exists(sizes):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.05)
    found = json.loads(sizes.read_text())
    assert (found["contents"], found["exclusive"]) == ("", {})
    assert found["used"] > 0
    assert await size(client, life.booted) == 0
