"""Bound images over the bus: fetched within the job by a worker of its own, told of in the status."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, MANAGER_INTERFACE, NO_OBJECT, ROOT_PATH
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, variants
from hostimage_testing.hostimagectl import run
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.layout import Layout
from hostimage_testing.os_images import OsImage, Recipe
from hostimage_testing.owned_stores import age_images, names, podman_on, put
from hostimage_testing.registry import Registry
from hostimage_testing.samples import copy, three_layers
from hostimage_testing.tools import require

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts of its own need root"),
    pytest.mark.timeout(600),
]
SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())
GONE = "localhost/gone:latest"
_Result = TypeVar("_Result")


@pytest.fixture
def app(tmp_path: Path, registry: Registry, skopeo: str) -> str:
    require("podman")
    layout = Layout(tmp_path / "app")
    three_layers(layout)
    name = f"{registry.host}/bound{os.getpid()}:1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    return name


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> RecordedHost:
    """One deployment, which follows an image of which there is a newer one."""
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe(version="1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    return host


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


def newer(host: RecordedHost, *bound: str) -> OsImage:
    return host.image(Recipe(version="2", kernel=b"kernel two ", bound=bound))


def registries(host: RecordedHost, text: str) -> None:
    (host.root / "etc/containers/registries.conf").write_text(text)


async def aside(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """What ``work`` gives in a thread of its own: the loop must not be blocked by code of ours."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def fill(host: RecordedHost, *called: str) -> None:
    with podman_on(host) as podman:
        for name in called:
            put(podman, name)
    age_images(host)


async def ended(client: Client, member: str, signature: str, *body: Any) -> tuple[list[Any], dict[str, Any]]:
    """How a job ended: its state, error and message; and its result."""
    (job,) = await client.connection.call(
        BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, member, signature, body, timeout=PATIENCE
    )
    # podman tries several times to reach a registry, and is one of several programs that take their time.
    await client.until(lambda: any(s.body[1] == job for s in client.named("JobRemoved")), 6 * PATIENCE)
    end = await client.removed(job)
    return list(end[3:]), (await client.job(job))["Result"]


async def staged(client: Client) -> str:
    found = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Staged"]
    assert isinstance(found, str)
    return found


async def test_an_upgrade_brings_what_it_is_bound_to(
    host: RecordedHost, served: Daemon, client: Client, registry: Registry, app: str
) -> None:
    image = newer(host, app)
    await served.start()
    # As long as that cannot be had nothing is staged, and what was pulled stays.
    end, _ = await ended(client, "Upgrade", "a{sv}", {})
    assert end[0] == "failed"
    assert "bound" in end[2]
    assert await staged(client) == NO_OBJECT
    registries(host, registry.registries_conf)
    end, result = await ended(client, "Upgrade", "a{sv}", {})
    assert end[0] == "done", end
    assert result["result"] == "staged"
    assert result["deployment"] == image.id
    assert result["bound-images"] == result["bound-fetched"] == [app]
    assert await staged(client) != NO_OBJECT
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    bound = {row["id"]: row["bound-images"] for row in document["deployments"]}
    assert bound[image.id] == [{"image": app, "present": True}]
    shown = await run(served.bus, "status")
    assert f"{app} (present)" in shown.out
    assert await aside(names, host) == {app}


async def test_staging_what_is_local_brings_it_too(
    host: RecordedHost, served: Daemon, client: Client, registry: Registry, app: str
) -> None:
    image = newer(host, app)
    await served.start()
    path = await client.pull(image.source)
    assert (await client.removed(path))[3] == "done"
    registries(host, registry.registries_conf)
    end, result = await ended(client, "Stage", "sa{sv}", image.manifest_digest, {})
    assert end[0] == "done", end
    assert result["bound-fetched"] == [app]
    assert await aside(names, host) == {app}


async def test_an_image_that_names_none_is_refused(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    newer(host, "quay.io/%i")
    await served.start()
    end, _ = await ended(client, "Upgrade", "a{sv}", {})
    assert end[:2] == ["failed", ErrorName.UNSUPPORTED_IMAGE]
    assert "/usr/lib/bootc/bound-images.d/app0.container" in end[2]
    assert await staged(client) == NO_OBJECT


async def test_a_dry_run_tells_what_leaves_the_store(
    host: RecordedHost, served: Daemon, client: Client, app: str
) -> None:
    await aside(fill, host, GONE, app)
    await served.start()
    _, dry = await ended(client, "CollectGarbage", "a{sv}", variants({"dry_run": True}))
    assert await aside(names, host) == {GONE, app}
    assert len(dry["store-images"]) == 2
    shown = await run(served.bus, "why", GONE)
    assert "nothing keeps it, the next collection" in shown.out
    _, done = await ended(client, "CollectGarbage", "a{sv}", {})
    assert dry == done | {"dry-run": True}
    assert await aside(names, host) == set()
