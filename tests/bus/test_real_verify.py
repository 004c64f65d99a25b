"""The daemon as it is shipped, verifying and repairing a real repository, and the client that tells of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_testing import hostimagectl
from hostimage_testing.bus import Client, Daemon, variants
from hostimage_testing.host import scratch_host
from hostimage_testing.labelled_images import layer
from hostimage_testing.layout import Layout
from hostimaged.composefs.repository import Repository


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "layout")
    files = {f"usr/file-{number}": b"%d " % number * 500 for number in range(50)}
    made.image("v1", [made.layer(layer(files, ["usr"]))])
    return made


@pytest.fixture
def host(real_daemon: Daemon) -> Iterator[Daemon]:
    scratch_host(real_daemon.root)
    return real_daemon


async def finished(client: Client, path: str) -> dict[str, Any]:
    """The result of a job that is waited for."""
    assert (await client.removed(path))[3:] == ["done", "", ""]
    result: dict[str, Any] = (await client.job(path))["Result"]
    return result


async def started(client: Client, member: str, **options: Any) -> str:
    """Path of the job that ``member`` starts."""
    path: str = await client.manager(member, "a{sv}", variants(options))
    return path


async def problems(client: Client) -> list[list[str]]:
    found: list[list[str]] = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["Problems"]
    return found


def repository_of(host: Daemon) -> Path:
    return host.root / "sysroot/composefs"


def flip_one(host: Daemon) -> Path:
    path = next(
        path for path in sorted(repository_of(host).glob("objects/??/*")) if path.read_bytes()[:2] == b"7 "
    )
    path.chmod(0o644)
    path.write_bytes(b"8" + path.read_bytes()[1:])
    return path


async def test_damage_is_found_told_and_repaired(host: Daemon, client: Client, layout: Layout) -> None:
    await host.start()
    pulled = await finished(client, await client.pull(f"oci:{layout.path}:v1"))
    result = await finished(client, await started(client, "VerifyRepository"))
    assert (result["ok"], result["damaged"], json.loads(result["findings"])) == (True, 0, [])
    assert result["objects-checked"] == len(list(repository_of(host).glob("objects/??/*")))
    assert await problems(client) == []

    path = flip_one(host)
    verify = await started(client, "VerifyRepository")
    result = await finished(client, verify)
    job = await client.job(verify)
    assert job["BytesDone"] == job["BytesTotal"] > 25_000
    assert client.changes(verify, JOB_INTERFACE, "Phase") == ["verifying"]
    assert (result["ok"], result["damaged"]) == (False, 1)
    [finding] = json.loads(result["findings"])
    assert finding["path"] == f"objects/{path.parent.name}/{path.name}"
    assert finding["breaks"]["images"] == [pulled["tag"]] == result["broken-images"]
    [[name, severity, text]] = await problems(client)
    assert (name, severity) == ("damage", "error")
    assert pulled["tag"] in text

    planned = await finished(client, await started(client, "Repair", **{"dry-run": True}))
    assert planned["bytes-to-fetch"] == 0, "the layout is on this machine"
    assert len(await problems(client)) == 1, "nothing was done"
    repaired = await finished(client, await started(client, "Repair"))
    assert (repaired["ok"], repaired["repaired"], repaired["bytes-fetched"]) == (
        True,
        1,
        0,
    )
    for told in (planned, repaired):
        [image] = json.loads(told["images"])
        assert (image["local"], image["bytes"]) == ([f"oci:{layout.path}"], 0)
    assert await problems(client) == []
    assert (await finished(client, await started(client, "VerifyRepository")))["ok"]


async def test_a_problem_outlives_the_daemon(host: Daemon, client: Client, layout: Layout) -> None:
    await host.start()
    await finished(client, await client.pull(f"oci:{layout.path}:v1"))
    flip_one(host)
    await finished(client, await started(client, "VerifyRepository"))
    known = await problems(client)
    assert len(known) == 1
    # It is written while the end is announced.
    while not (host.root / "run/hostimaged/verified.json").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await host.end()
    await host.start()
    assert await problems(client) == known


async def test_the_client_tells_of_damage(host: Daemon, client: Client, layout: Layout) -> None:
    await host.start()
    pulled = await finished(client, await client.pull(f"oci:{layout.path}:v1"))
    code = EXIT_CODES[ErrorName.CORRUPT_REPOSITORY]
    path = flip_one(host)
    told = await hostimagectl.run(host.bus, "verify")
    assert told.code == code, told
    assert f"objects/{path.parent.name}/{path.name}: its content is not what its name says" in told.out
    assert f"breaks image {pulled['tag']}" in told.out
    told = await hostimagectl.run(host.bus, "verify", "--json")
    assert told.code == code
    [finding] = json.loads(told.out)["result"]["findings"]
    assert finding["kind"] == "object-digest-mismatch"
    told = await hostimagectl.run(host.bus, "repair")
    assert told.code == 0, told
    assert "repaired: 1 objects" in told.out
    assert (await hostimagectl.run(host.bus, "verify")).code == 0


async def test_verification_lets_others_have_the_lock(host: Daemon, client: Client, layout: Layout) -> None:
    """Whoever wants it for itself gets it while one verification after the other runs."""
    await host.start()
    await finished(client, await client.pull(f"oci:{layout.path}:v1"))
    verify = await started(client, "VerifyRepository")

    # Blocks the test's loop: nothing the job does needs an answer of ours.
    Repository.open(repository_of(host), exclusive=True, lock_timeout=30).close()
    await finished(client, verify)
