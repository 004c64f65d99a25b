"""Garbage over the bus: collected when asked and by itself, told of beforehand, and why things are kept."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.names import BUS_NAME, DEPLOYMENT_INTERFACE, MANAGER_INTERFACE, NO_OBJECT, ROOT_PATH
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, variants
from hostimage_testing.collecting import DAY, age, objects
from hostimage_testing.hostimagectl import run
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import installed, staged, upgraded
from hostimage_testing.os_images import Recipe

pytestmark = pytest.mark.interop

NEXT = Recipe(version="2", kernel=b"kernel two ", etc={"new.conf": b"new\n"})
OTHER = Recipe(version="8", files={"usr/share/other": b"only here\n" * 50})


@pytest.fixture
def host(tmp_path: Any, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    """The daemon of that host, not yet started."""
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


async def do(
    client: Client, member: str, signature: str, *body: Any, path: str = ROOT_PATH
) -> dict[str, Any]:
    """Have a job done; gives its result."""
    interface = MANAGER_INTERFACE if path == ROOT_PATH else DEPLOYMENT_INTERFACE
    (job,) = await client.connection.call(
        BUS_NAME, path, interface, member, signature, body, timeout=PATIENCE
    )
    ended = await client.removed(job)
    assert ended[3] == "done", ended
    result = (await client.job(job))["Result"]
    assert isinstance(result, dict)
    return result


async def by_itself(client: Client) -> dict[str, Any]:
    """The result of the collection that nobody asked for, once it is done."""
    await client.until(lambda: _ends(client) != [])
    path = _ends(client)[0][1]
    job = await client.job(path)
    assert job["Background"] is True
    assert isinstance(job["Result"], dict)
    return job["Result"]


def _ends(client: Client) -> list[Any]:
    ends = [signal.body for signal in client.named("JobRemoved") if signal.body[2] == "collect"]
    assert all(body[3] == "done" for body in ends), ends
    return ends


async def sizes(client: Client) -> tuple[int, int]:
    used, reclaimable = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["RepositorySize"]
    return used, reclaimable


async def test_what_a_dry_run_tells_is_what_goes(host: RecordedHost, served: Daemon, client: Client) -> None:
    installed(host)
    garbage = host.image(OTHER)
    await served.start()
    before = objects(host.repository)
    dry = await do(client, "CollectGarbage", "a{sv}", variants({"dry_run": True}))
    assert dry.pop("dry-run") is True
    assert objects(host.repository) == before
    done = await do(client, "CollectGarbage", "a{sv}", {})
    assert done == dry
    left = objects(host.repository)
    assert done["objects-removed"] == len(before) - len(left) > 0
    assert done["objects-bytes"] == sum(before.values()) - sum(left.values())
    assert not (host.repository / "images" / garbage.id).exists()
    assert (await do(client, "CollectGarbage", "a{sv}", {}))["result"] == "nothing"


async def test_what_could_be_reclaimed_is_known_after_a_job(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    age(host.tag(life.rollback.image), 2 * DAY)
    await served.start()
    host.image(OTHER)
    dry = await do(client, "CollectGarbage", "a{sv}", variants({"dry_run": True}))
    # A job that leaves no garbage of its own, so that none is collected after it.
    await do(client, "CancelRollback", "a{sv}", {})
    assert (await sizes(client))[1] == dry["objects-bytes"] > 0
    await do(client, "CollectGarbage", "a{sv}", {})
    assert (await sizes(client))[1] == 0


async def test_in_doubt_the_reasons_are_told(host: RecordedHost, served: Daemon, client: Client) -> None:
    installed(host)
    host.image(OTHER)
    (host.entries / "bootc_testos-9-1.conf").write_text("title no kernel\n")
    before = objects(host.repository)
    await served.start()
    done = await do(client, "CollectGarbage", "a{sv}", {})
    assert done["result"] == "kept"
    assert any("bootc_testos-9-1.conf" in reason for reason in done["reasons"])
    assert objects(host.repository) == before


async def test_an_upgrade_and_a_deletion_are_followed_by_a_collection(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe(version="1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    image, garbage = host.image(NEXT), host.image(OTHER)
    await served.start()
    assert (await do(client, "Upgrade", "a{sv}", {}))["deployment"] == image.id
    assert (await by_itself(client))["objects-removed"] > 0
    assert not (host.repository / "images" / garbage.id).exists()
    assert (host.repository / "images" / image.id).exists()
    await client.forget()
    await do(client, "Unstage", "a{sv}", {})
    result = await by_itself(client)
    # The newest of the image that is followed stays pulled.
    assert result["tags"] == [f"localhost/bootc-{image.manifest_digest}"]
    assert (host.repository / "images" / image.plain_id).exists()


async def test_the_first_boot_of_an_update_is_followed_by_a_collection(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    """The shutdown drops the deployment that could be rolled back to so far, and has no time for more."""
    life = upgraded(host)
    assert life.rollback is not None
    age(host.tag(life.rollback.image), 2 * DAY)
    image = host.image(NEXT)
    await served.start()
    await do(client, "Switch", "sa{sv}", image.source, {})
    await by_itself(client)
    assert (host.repository / "images" / life.rollback.id).exists()
    program = [sys.executable, "-m", "hostimaged", "finalize", "--root", str(host.root)]
    process = await asyncio.create_subprocess_exec(*program, env=os.environ | served.environment)
    assert await process.wait() == 0
    await served.end()
    assert host.reboot() == image.id
    await client.forget()
    await served.start()
    result = await by_itself(client)
    assert result["states"] == [life.rollback.id]
    assert not (host.repository / "images" / life.rollback.id).exists()
    assert not (host.sysroot / "state/hostimaged/collection-due").exists()


async def test_why_things_are_kept(host: RecordedHost, served: Daemon, client: Client) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    app, garbage = host.image(OTHER), host.image(NEXT)
    tag = "localhost/app-" + app.manifest_digest
    host.write_tag(app, "localhost/app-")
    await served.start()

    async def why(what: str) -> dict[str, Any]:
        return await do(client, "Explain", "sa{sv}", what, {})

    booted = await why("booted")
    assert (booted["deployment"], booted["kept"]) == (life.booted.id, True)
    assert "it runs" in booted["text"]
    for what in (tag, app.manifest_digest, f"oci-manifest-{app.manifest_digest}"):
        found = await why(what)
        assert found["kept"] is True
        assert found["chains"][0].startswith(f"tag {tag} (")
    only_here = await why(app.plain_id)
    assert len(only_here["chains"]) == 1
    assert f"oci-config-{app.config_digest}" in only_here["chains"][0]
    lost = await why(garbage.manifest_digest)
    assert (lost["kept"], lost["chains"]) == (False, [])
    job = await client.manager("Explain", "sa{sv}", "f" * 128, {})
    assert (await client.removed(job))[3:5] == ["failed", ErrorName.IMAGE_NOT_FOUND]


async def test_what_deleting_a_deployment_would_free_is_what_it_frees(
    host: RecordedHost, served: Daemon, client: Client
) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    age(host.tag(life.rollback.image), 2 * DAY)
    host.image(OTHER)
    await served.start()
    told = await do(client, "Explain", "sa{sv}", life.rollback.id[:20], {})
    assert told["bytes-freed"] > 0
    assert told["boot-bytes-freed"] == len(life.rollback.image.recipe.linux) + len(
        life.rollback.image.recipe.initramfs
    )
    await do(client, "CollectGarbage", "a{sv}", {})
    await client.forget()
    before = objects(host.repository)
    properties = await client.properties(ROOT_PATH, MANAGER_INTERFACE)
    assert properties["RollbackTarget"] != NO_OBJECT
    await do(client, "Delete", "a{sv}", {}, path=properties["RollbackTarget"])
    await by_itself(client)
    left = objects(host.repository)
    assert told["objects-freed"] == len(before) - len(left)
    assert told["bytes-freed"] == sum(before.values()) - sum(left.values())


async def test_the_client_tells_it_to_people(host: RecordedHost, served: Daemon, bus: Bus) -> None:
    life = installed(host)
    host.image(OTHER)
    await served.start()
    said = await run(bus, "gc", "--dry-run")
    assert said.out.startswith("would delete ")
    done = await run(bus, "gc")
    assert done.out == said.out.replace("would delete", "deleted")
    assert (await run(bus, "gc")).out == "nothing to do: there is no garbage\n"
    why = await run(bus, "why", "booted")
    assert why.out.startswith(f"deployment {life.booted.id}:\n  kept as it runs\n")
    assert "kept by tag localhost/bootc-" in why.out
    assert (await run(bus, "why", "no-such-thing")).code == EXIT_CODES[ErrorName.IMAGE_NOT_FOUND]
    (host.entries / "bootc_testos-9-1.conf").write_text("title no kernel\n")
    kept = await run(bus, "gc")
    assert kept.code == 0
    assert kept.out.startswith("nothing is deleted, as it is in doubt what is needed:\n  ")


@pytest.mark.parametrize("left", ["by bootc", "an old repository"])
async def test_what_others_left_is_settled_at_start_and_then_collected(
    host: RecordedHost, served: Daemon, client: Client, left: str
) -> None:
    life = staged(host)
    assert life.staged is not None
    if left == "by bootc":
        host.marker.unlink()
    else:
        (host.repository / "meta.json").unlink()
    await served.start()
    await client.until(
        lambda: [s for s in client.named("JobRemoved") if s.body[2:4] == ["recover", "done"]] != []
    )
    assert host.entries_staged.exists() is (left != "by bootc")
    assert host.state(life.staged).exists() is (left != "by bootc")
    assert (host.repository / "meta.json").exists()
    assert (await by_itself(client))["result"] in ("collected", "nothing")
    # It may be writing into /run still.
    await served.end()
    assert host.reboot() == life.booted.id
