"""Unified storage through the daemon as it is shipped: real podman, real registry, confined workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_testing.bus import Client, Daemon, error_of
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.registry import Registry
from hostimage_testing.samples import BASE, copy, more
from hostimage_testing.tools import require
from hostimaged.oci.storage import owned
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="podman's mounts need root"),
]


T = TypeVar("T")


@pytest.fixture
def images(tmp_path: Path, registry: Registry, skopeo: str) -> list[str]:
    """Two versions of an image in the registry, and another image."""
    require("podman")
    layout = Layout(tmp_path / "layout")
    found = []
    for tag, extra in (("v1", b"a"), ("v2", b"b"), ("other", b"c")):
        layout.image(tag, [layout.layer(BASE, "gzip"), layout.layer(more(extra), "zstd")])
        name = f"{registry.host}/bus{os.getpid()}:{tag}"
        copy(skopeo, f"oci:{layout.path}:{tag}", f"docker://{name}", "--preserve-digests")
        found.append(name)
    return found


@pytest_asyncio.fixture
async def host(real_daemon: Daemon, registry: Registry) -> AsyncIterator[HostPaths]:
    yield scratch_host(real_daemon.root, registries=registry.registries_conf)


async def unified(client: Client) -> bool:
    found: bool = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Unified"]
    return found


def stored(host: HostPaths) -> set[str]:
    store = owned.open_store(host)
    if store is None:
        return set()
    with store:
        return {name for image in store.images() for name in image.names}


async def aside(function: Callable[[HostPaths], T], host: HostPaths) -> T:
    """What ``function`` finds, read in a thread that ends."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, function, host)


async def test_r17_asked_for_once(
    real_daemon: Daemon, client: Client, host: HostPaths, images: list[str]
) -> None:
    """The image is in both places, in one job with one progress."""
    await real_daemon.start()
    assert not await unified(client)
    path = await client.pull(f"docker://{images[0]}", unified=True)
    assert (await client.removed(path))[3:] == ["done", "", ""]
    job = await client.job(path)
    result = job["Result"]
    assert (result["unified"], result["stored-as"], result["changed"]) == (True, images[0], True)
    assert result["objects-linked"] + result["objects-reflinked"] == 2
    assert result["objects-copied"] == 0
    assert result["bytes-fetched"] == result["bytes-total"] == job["BytesTotal"] == job["BytesDone"]
    assert client.changes(path, JOB_INTERFACE, "Phase") == ["resolving", "pulling", "importing"]
    progress = client.changes(path, JOB_INTERFACE, "Progress")
    assert progress == sorted(progress)
    assert await aside(stored, host) == {images[0]}
    (row,) = (await client.status())["images"]
    assert row["reference"] == f"docker://{images[0]}"
    # It is not what this host follows, so nothing else is stored that way.
    assert not await unified(client)


async def test_r20_a_unified_host_stays_so(
    real_daemon: Daemon, client: Client, host: HostPaths, images: list[str]
) -> None:
    """Also under another name, until that is ended; and nothing is stored by asking (R-23)."""
    settings = host.etc / "hostimaged.toml"
    settings.write_text(f'verity = "opportunistic"\ntracked-image = "docker://{images[0]}"\n')
    await real_daemon.start()
    assert not await unified(client)
    assert not await aside(owned.exists, host)
    path = await client.manager("SetUnified", "ba{sv}", True, {})
    assert (await client.removed(path))[3:] == ["done", "", ""]
    assert (await client.job(path))["Result"]["stored-as"] == images[0]
    assert await unified(client)
    # Nothing is imported.
    status = await client.status()
    assert (status["images"], status["unified"]) == ([], True)
    path = await client.pull(f"docker://{images[2]}")
    assert (await client.removed(path))[3] == "done"
    assert (await client.job(path))["Result"]["unified"] is True
    assert await aside(stored, host) == {images[0], images[2]}
    path = await client.pull(f"docker://{images[1]}", unified=False)
    assert (await client.removed(path))[3] == "done"
    assert "unified" not in (await client.job(path))["Result"]
    path = await client.manager("SetUnified", "ba{sv}", False, {})
    assert (await client.removed(path))[3:] == ["done", "", ""]
    assert (await client.job(path))["Result"]["removed"] == [images[0]]
    assert not await unified(client)
    assert await aside(stored, host) == {images[2]}


async def test_settings_decide(
    real_daemon: Daemon, client: Client, host: HostPaths, images: list[str]
) -> None:
    settings = host.etc / "hostimaged.toml"
    settings.write_text(f'verity = "opportunistic"\nunified = true\ntracked-image = "docker://{images[0]}"\n')
    await real_daemon.start()
    assert await unified(client)
    assert not await aside(owned.exists, host)
    path = await client.pull("")
    assert (await client.removed(path))[3] == "done"
    assert await aside(stored, host) == {images[0]}
    refused = await error_of(client.manager("SetUnified", "ba{sv}", False, {}))
    assert refused.name == ErrorName.PRECONDITION_FAILED
    assert "unified = true" in refused.message
