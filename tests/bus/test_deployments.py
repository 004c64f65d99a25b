"""Deployments over the bus, on hosts as bootc left them: an update from the check to the rollback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, DEPLOYMENT_INTERFACE, MANAGER_INTERFACE, NO_OBJECT, ROOT_PATH
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, error_of, variants
from hostimage_testing.hosts import KINDS, Deployment, RecordedHost
from hostimage_testing.lives import installed, staged, upgraded
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.host.journal import Operation, Transaction
from hostimaged.ids import DeploymentId

pytestmark = pytest.mark.interop

NEXT = Recipe(version="2", kernel=b"kernel two ", etc={"new.conf": b"new\n"})


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=getattr(request, "param", KINDS[2]))


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    """The daemon of that host, not yet started."""
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


async def start(client: Client, member: str, signature: str, *body: Any, path: str = ROOT_PATH) -> str:
    """Start a job; gives its path."""
    interface = MANAGER_INTERFACE if path == ROOT_PATH else DEPLOYMENT_INTERFACE
    (started,) = await client.connection.call(
        BUS_NAME, path, interface, member, signature, body, timeout=PATIENCE
    )
    assert isinstance(started, str)
    return started


async def do(
    client: Client, member: str, signature: str, *body: Any, path: str = ROOT_PATH
) -> dict[str, Any]:
    """Have a job done; gives its result."""
    started = await start(client, member, signature, *body, path=path)
    ended = await client.removed(started)
    assert ended[3] == "done", ended
    result = (await client.job(started))["Result"]
    assert isinstance(result, dict)
    return result


async def manager(client: Client) -> dict[str, Any]:
    return await client.properties(ROOT_PATH, MANAGER_INTERFACE)


async def known(client: Client, right: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The properties of the Manager once they are ``right``."""
    seen = len(client.signals)
    while not right(properties := await manager(client)):
        await client.until(lambda heard=seen: len(client.signals) > heard)
        seen = len(client.signals)
    return properties


async def shown(client: Client, path: str) -> dict[str, Any]:
    return await client.properties(path, DEPLOYMENT_INTERFACE)


async def finalize(host: RecordedHost, daemon: Daemon) -> None:
    """What the unit does at shutdown."""
    program = [sys.executable, "-m", "hostimaged", "finalize", "--root", str(host.root)]
    process = await asyncio.create_subprocess_exec(*program, env=os.environ | daemon.environment)
    assert await process.wait() == 0


def followed(host: RecordedHost) -> tuple[Deployment, OsImage, str]:
    """The deployment that runs, the image that its reference leads to by now, and that reference."""
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe(version="1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    return booted, host.image(NEXT), reference


@pytest.mark.parametrize("host", [KINDS[0], KINDS[1], KINDS[2], KINDS[3]], ids=str, indirect=True)
async def test_an_update_from_check_to_rollback(host: RecordedHost, served: Daemon, client: Client) -> None:
    booted, image, reference = followed(host)
    await served.start()
    properties = await known(client, lambda found: found["Booted"] != NO_OBJECT)
    assert properties["TrackedImage"] == reference
    assert properties["RebootRequired"] is False
    assert (await shown(client, properties["Booted"]))["Id"] == booted.id

    await do(client, "Check", "sa{sv}", "", {})
    assert (await manager(client))["Update"]["digest"] == image.manifest_digest
    result = await do(client, "Upgrade", "a{sv}", {})
    assert (result["result"], result["deployment"]) == ("staged", image.id)
    properties = await manager(client)
    assert properties["RebootRequired"] is True
    assert properties["Update"]["state"] == "staged"
    row = await shown(client, properties["Staged"])
    assert (row["Id"], row["Version"], row["ImageDigest"]) == (image.id, "2", image.manifest_digest)
    assert (row["Image"], row["Staged"], row["Locked"]) == (reference, True, False)
    assert (await do(client, "Upgrade", "a{sv}", {}))["result"] == "already-staged"

    await finalize(host, served)
    await served.end()
    assert host.reboot() == image.id
    # Job ids begin anew with each boot.
    await client.forget()
    await served.start()
    await known(client, lambda found: found["RollbackTarget"] != NO_OBJECT)
    assert (await do(client, "Rollback", "a{sv}", {}))["result"] == "queued"
    properties = await manager(client)
    assert (properties["RollbackQueued"], properties["RebootRequired"]) == (True, True)
    refused = await error_of(start(client, "Upgrade", "a{sv}", variants({"background": True})))
    assert (refused.name, "a rollback is queued" in refused.message) == (ErrorName.PRECONDITION_FAILED, True)
    await do(client, "CancelRollback", "a{sv}", {})
    assert (await manager(client))["RollbackQueued"] is False
    await do(client, "Rollback", "a{sv}", {})
    await served.end()
    assert host.reboot() == booted.id


async def test_a_download_is_unlocked_and_taken_back(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    _, image, _ = followed(host)
    await served.start()
    await known(client, lambda found: found["Booted"] != NO_OBJECT)
    await do(client, "Upgrade", "a{sv}", variants({"download_only": True}))
    properties = await manager(client)
    assert (await shown(client, properties["Staged"]))["Locked"] is True
    assert properties["RebootRequired"] is False
    await do(client, "Upgrade", "a{sv}", variants({"from_downloaded": True}))
    properties = await manager(client)
    assert (await shown(client, properties["Staged"]))["Locked"] is False
    assert properties["RebootRequired"] is True
    assert (await do(client, "Unstage", "a{sv}", {}))["deployment"] == image.id
    assert (await manager(client))["Staged"] == NO_OBJECT
    # Still in the repository: staged again without a source.
    assert (await do(client, "Stage", "sa{sv}", image.manifest_digest, {}))["result"] == "staged"


async def test_switching_follows_another_image(host: RecordedHost, served: Daemon, client: Client) -> None:
    _, image, _ = followed(host)
    await served.start()
    await known(client, lambda found: found["Booted"] != NO_OBJECT)
    other = host.image(Recipe(version="7", kernel=b"kernel seven "))
    assert (await do(client, "Switch", "sa{sv}", other.source, {}))["result"] == "staged"
    assert (await manager(client))["TrackedImage"] == other.source
    assert (await do(client, "Switch", "sa{sv}", image.source, {}))["deployment"] == image.id


async def test_deployments_are_chosen_pinned_and_deleted(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    await served.start()
    properties = await known(client, lambda found: found["RollbackTarget"] != NO_OBJECT)
    rollback, booted = properties["RollbackTarget"], properties["Booted"]
    assert (await do(client, "SetPinned", "ba{sv}", True, {}, path=rollback))["result"] == "pinned"
    assert (await shown(client, rollback))["Pinned"] is True
    refused = await client.removed(await start(client, "Delete", "a{sv}", {}, path=rollback))
    assert refused[3:5] == ["failed", ErrorName.PRECONDITION_FAILED]
    assert (await do(client, "MakeDefault", "a{sv}", {}, path=rollback))["result"] == "default"
    assert (await manager(client))["RollbackQueued"] is True
    await do(client, "MakeDefault", "a{sv}", {}, path=booted)
    await do(client, "SetPinned", "ba{sv}", False, {}, path=rollback)
    refused = await client.removed(await start(client, "Delete", "a{sv}", {}, path=booted))
    assert refused[3:5] == ["failed", ErrorName.ALREADY_BOOTED]
    assert (await do(client, "Delete", "a{sv}", {}, path=rollback))["result"] == "deleted"
    assert (await manager(client))["RollbackTarget"] == NO_OBJECT
    gone = await error_of(client.properties(rollback, DEPLOYMENT_INTERFACE))
    assert gone.name == ErrorName.UNKNOWN_OBJECT
    assert not host.state(life.rollback).exists()


async def test_kernel_arguments_are_set(host: RecordedHost, served: Daemon, client: Client) -> None:
    life = installed(host)
    await served.start()
    await known(client, lambda found: found["Booted"] != NO_OBJECT)
    result = await do(client, "SetKernelArguments", "asasa{sv}", ["quiet"], ["console=ttyS0"], {})
    assert result["result"] == "changed"
    arguments = (await shown(client, (await manager(client))["Booted"]))["KernelArguments"].split()
    assert "quiet" in arguments
    assert "console=ttyS0" not in arguments
    assert host.reboot() == life.booted.id


async def test_two_deployments_are_compared(host: RecordedHost, served: Daemon, client: Client) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    await served.start()
    properties = await known(client, lambda found: found["RollbackTarget"] != NO_OBJECT)
    booted, rollback = properties["Booted"], properties["RollbackTarget"]
    result = await do(client, "Diff", "oa{sv}", booted, {}, path=rollback)
    document = json.loads(result["diff"])
    assert (document["from"]["id"], document["to"]["id"]) == (life.rollback.id, life.booted.id)
    assert document["files"]["changed"] == result["files-changed"] > 0
    assert (result["problems"], result["truncated"]) == ([], False)
    # Nothing is read a second time, until something is different.
    (host.repository / "images" / life.rollback.id).unlink()
    assert await do(client, "Diff", "oa{sv}", booted, {}, path=rollback) == result
    failed = await client.removed(await start(client, "Diff", "oa{sv}", rollback, {}, path=booted))
    assert failed[3:5] == ["failed", ErrorName.IMAGE_NOT_FOUND]
    itself = await client.removed(await start(client, "Diff", "oa{sv}", booted, {}, path=booted))
    assert itself[3:5] == ["failed", ErrorName.PRECONDITION_FAILED]


async def test_who_starts_the_daemon_is_told_all(host: RecordedHost, served: Daemon, client: Client) -> None:
    """Its first call comes before the first scan."""
    life = upgraded(host)
    await served.start()
    document = await client.status()
    assert [row["id"] for row in document["deployments"] if row["booted"]] == [life.booted.id]


async def test_both_status_documents_tell_of_deployments(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = staged(host)
    assert life.staged is not None
    assert life.rollback is not None
    await served.start()
    await known(client, lambda found: found["Staged"] != NO_OBJECT)
    rows = (await client.status())["deployments"]
    assert [row["id"] for row in rows] == [life.staged.id, life.booted.id, life.rollback.id]
    document = json.loads(await client.manager("GetStatus", "sa{sv}", "bootc-v1", {}))
    assert (document["apiVersion"], document["kind"]) == ("org.containers.bootc/v1", "BootcHost")
    slots = {name: document["status"][name] for name in ("staged", "booted", "rollback")}
    expected = {"staged": life.staged.id, "booted": life.booted.id, "rollback": life.rollback.id}
    assert {name: slot["composefs"]["verity"] for name, slot in slots.items()} == expected


async def test_what_another_program_did_is_seen_by_a_job(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    await served.start()
    await known(client, lambda found: found["RollbackTarget"] != NO_OBJECT)
    host.live(life.rollback, life.booted)
    # A mutating job looks at the host anew, whoever changed it.
    assert (await do(client, "CancelRollback", "a{sv}", {}))["result"] == "cancelled"
    assert life.booted.id in host.menu()[0].text


async def test_an_interrupted_operation_is_finished_at_start(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = staged(host)
    assert life.staged is not None
    journal = host.sysroot / "state/hostimaged/transaction.json"
    journal.parent.mkdir(parents=True, exist_ok=True)
    host.marker.unlink()
    transaction = Transaction(
        Operation.STAGE, "", 1, "", "0" * 64, target=DeploymentId(life.staged.id), state_dir=True
    )
    journal.write_bytes(transaction.serialise())
    await served.start()
    await client.until(lambda: [s for s in client.named("JobRemoved") if s.body[2:4] == ["recover", "done"]])
    assert not journal.exists()
    assert not host.entries_staged.exists()
    assert not host.state(life.staged).exists()
