"""hostimagectl and hostimaged together on a host as bootc left it: every command about deployments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_testing.bus import Bus, Daemon
from hostimage_testing.hostimagectl import run
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import installed, upgraded
from hostimage_testing.os_images import OsImage, Recipe

pytestmark = pytest.mark.interop

NEXT = Recipe(version="2", kernel=b"kernel two ", etc={"new.conf": b"new\n"})


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])


@pytest.fixture
def served(bus: Bus, host: RecordedHost) -> Iterator[Daemon]:
    made = Daemon(bus, host.root, scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


async def said(bus: Bus, *argv: str, code: int = 0) -> list[str]:
    """The lines of a command's result."""
    client = await run(bus, *argv)
    assert client.code == code, (argv, client.out, client.err)
    return client.out.splitlines()


async def refused(bus: Bus, name: ErrorName, *argv: str) -> None:
    """A command fails, with the exit code of its error and one message."""
    client = await run(bus, *argv)
    assert client.code == EXIT_CODES[name], (argv, client.out, client.err)
    assert client.out == ""
    assert client.err.count("hostimagectl: ") == 1


async def field(bus: Bus, name: str) -> str:
    """A line of the status at the top."""
    lines = (line.partition(":") for line in await said(bus, "status"))
    return next(value.strip() for key, _, value in lines if key == name)


async def result(bus: Bus, *argv: str) -> Any:
    client = await run(bus, *argv, "--json")
    assert client.code == 0, client.err
    return json.loads(client.out)["result"]


def followed(host: RecordedHost) -> tuple[str, OsImage, str]:
    """The deployment that runs, the image that its reference leads to by now, and that reference."""
    reference = f"oci:{host.root.with_name(host.root.name + '-work') / 'layout'}:t1"
    booted = host.deploy(host.image(Recipe(version="1", reference=reference)))
    host.live(booted)
    host.booted(booted)
    return booted.id[:12], host.image(NEXT), reference


async def test_an_update_in_words(host: RecordedHost, served: Daemon, bus: Bus) -> None:
    booted, image, reference = followed(host)
    await served.start()
    assert await field(bus, "Tracked image") == reference
    assert await field(bus, "Reboot") == f"starts version 1 ({booted}) again"

    new = image.id[:12]
    lines = await said(bus, "upgrade", "--download-only")
    assert lines[0] == (
        f"downloaded version 2 ({new}): it waits for 'hostimagectl upgrade --from-downloaded'"
    )
    assert f"  Manifest: {image.manifest_digest}" in lines
    assert (await field(bus, "Reboot")).startswith(f"starts version 1 ({booted}) again; version 2 ({new}) is")
    lines = await said(bus, "upgrade", "--from-downloaded")
    assert lines == [f"staged deployment {new}: the next reboot starts it"]
    assert await field(bus, "Reboot") == f"starts version 2 ({new}), which is staged"
    assert (await said(bus, "upgrade"))[0] == f"nothing to do, staged already: version 2 ({new})"
    assert (await result(bus, "upgrade"))["result"] == "already-staged"
    rows = [line.split() for line in await said(bus, "status")]
    assert any(row[:3] == [new, "staged", "2"] for row in rows)
    assert any(row[:3] == [booted, "booted", "1"] for row in rows)

    assert await said(bus, "unstage") == [f"nothing is staged any more; it was deployment {new}"]
    await refused(bus, ErrorName.NOTHING_STAGED, "unstage")
    assert (await said(bus, "stage", image.manifest_digest))[0].startswith("staged version 2")
    other = host.image(Recipe(version="7", kernel=b"kernel seven "))
    assert (await said(bus, "switch", other.source))[0].startswith("staged version 7")
    assert await field(bus, "Tracked image") == other.source
    difference = await said(bus, "diff", "booted", "staged")
    assert difference[0] == f"from version 1 ({booted}) to version 7 ({other.id[:12]})"
    assert any(line.startswith("files (") for line in difference)
    assert (await result(bus, "diff", "booted", "staged"))["diff"]["to"]["id"] == other.id
    await refused(bus, ErrorName.NO_ROLLBACK, "rollback")


async def test_what_is_deployed_in_words(host: RecordedHost, served: Daemon, bus: Bus) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    await served.start()
    old, new = life.rollback.id[:12], life.booted.id[:12]
    assert await said(bus, "rollback") == [f"the next reboot goes back to deployment {old}"]
    assert (await field(bus, "Reboot")).startswith("goes back to version ")
    assert await said(bus, "rollback") == [
        f"nothing to do, the next reboot already goes back to deployment {old}"
    ]
    assert await said(bus, "cancel-rollback") == [
        f"the rollback is taken back: the next reboot starts deployment {new} again"
    ]
    assert await said(bus, "cancel-rollback") == ["nothing to do, no rollback waits for the next reboot"]
    assert await said(bus, "make-default", old) == [f"the next reboot starts deployment {old}"]
    assert await said(bus, "make-default", old) == [
        f"nothing to do, the next reboot already starts deployment {old}"
    ]
    await said(bus, "make-default", "booted")
    assert await said(bus, "pin", "rollback") == [f"pinned deployment {old}: it is kept until it is unpinned"]
    assert await said(bus, "pin", "rollback") == [f"nothing to do, it was so before: deployment {old}"]
    await refused(bus, ErrorName.PRECONDITION_FAILED, "delete", "rollback")
    assert await said(bus, "unpin", "rollback") == [
        f"unpinned deployment {old}: it is no longer kept for its own sake"
    ]
    await refused(bus, ErrorName.ALREADY_BOOTED, "delete", "booted")
    assert await said(bus, "delete", "rollback") == [f"deleted deployment {old}"]
    await refused(bus, ErrorName.NO_SUCH_DEPLOYMENT, "show", "rollback")


async def test_kernel_arguments_in_words(host: RecordedHost, served: Daemon, bus: Bus) -> None:
    booted = installed(host).booted.id[:12]
    await served.start()
    lines = await said(bus, "kargs", "--append=quiet", "--delete=console=ttyS0")
    assert lines[0] == f"the kernel arguments of deployment {booted} are changed from the next boot on"
    assert lines[1].startswith("  Kernel arguments: ")
    assert lines[1].endswith(" quiet")
    await refused(bus, ErrorName.PRECONDITION_FAILED, "kargs", "--delete=console=ttyS0")
    await refused(bus, ErrorName.INVALID_ARGS, "kargs", "--append=composefs=1")


async def test_a_damaged_deployment_is_shown_with_its_problem(
    host: RecordedHost, served: Daemon, bus: Bus
) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    host.origin(life.rollback).unlink()
    await served.start()
    lines = await said(bus, "status")
    assert any(
        line.startswith((f"error of {life.rollback.id[:12]}", f"warning of {life.rollback.id[:12]}"))
        for line in lines
    )
