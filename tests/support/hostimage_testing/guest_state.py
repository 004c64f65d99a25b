"""What a guest says of itself, and what it must say after a boot, whichever boot loader it has."""

from __future__ import annotations

import json
import time
from typing import Any

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_testing.emulator import Machine
from hostimage_testing.loaders import SYSTEMD, Loader

#: Where ``offer`` lets updates be found; on disks made by ``loader_disks`` it is what they follow.
OFFERED = "/run/os"
#: Seconds for the first look, on a machine that does much else.
LIMIT = 300.0


def offer(guest: Machine, image: str) -> None:
    """Let ``OFFERED`` be this image of the disk with images, from now to the next boot."""
    guest.shell("mkdir -p /run/images; mountpoint -q /run/images || mount -o ro /dev/vdb /run/images")
    guest.run("ln", "-sfn", f"images/{image}", OFFERED)


def status(guest: Machine) -> dict[str, Any]:
    """What is told once the daemon, which the first call starts, has looked at all; it is slow here."""
    deadline = time.monotonic() + LIMIT
    while True:
        asked = guest.as_nobody("hostimagectl", "status", "--json", check=False)
        if asked.code == 0:
            found: dict[str, Any] = json.loads(asked.out)
            if not any(problem["id"] == "scan" for problem in found["problems"]):
                return found
        assert asked.code in (0, EXIT_CODES[ErrorName.TIMEOUT]), asked.out
        assert time.monotonic() < deadline, asked.out


def deployment(guest: Machine, kind: str) -> dict[str, Any]:
    """The row of the only deployment that is ``kind`` ("booted", "staged", "is-rollback")."""
    (found,) = (each for each in status(guest)["deployments"] if each[kind])
    return dict(found)


def boot_id(guest: Machine) -> str:
    """The kernel's own, new at each start of it."""
    return guest.run("cat", "/proc/sys/kernel/random/boot_id").out.strip()


def check_root(guest: Machine, version: str) -> dict[str, Any]:
    """This version runs, as the mounts say and as our status says; gives the row of it."""
    guest.run("systemctl", "is-system-running", "--wait", check=False)
    failed = guest.run("systemctl", "list-units", "--failed", "--no-legend", "--plain").out.splitlines()
    # The login on the console gives up after a minute on a busy machine; nothing here needs it.
    assert not [line for line in failed if line.strip() and not line.startswith("session-")]
    row = deployment(guest, "booted")
    assert (row["version"], row["verity"], row["default"]) == (version, "ok", True)
    source, kind, options = guest.shell("findmnt --raw -no SOURCE,FSTYPE,OPTIONS /").out.split()
    assert (source, kind) == (f"composefs:{row['id']}", "overlay")
    assert {"ro", "verity=require"} <= set(options.split(","))
    assert guest.run("cat", "/usr/share/version").out.strip() == version
    assert "as-expected" in guest.journal("--boot", "--unit=hostimaged-boot-check.service")
    return row


def check_booted(
    guest: Machine, version: str, loader: Loader = SYSTEMD, *, argument: str = ""
) -> dict[str, Any]:
    """As ``check_root``, and the firmware started it, by this boot loader, and nothing is wrong.

    ``argument``: the version in the kernel's arguments, if it is another one.
    """
    row = check_root(guest, version)
    words = guest.run("cat", "/proc/cmdline").out.split()
    told = [word for word in words if word.startswith("hostimage.version=")]
    assert told == [f"hostimage.version={argument or version}"]
    assert [word for word in words if word.startswith("composefs=")] == [f"composefs={row['id']}"]
    assert {"rw", "console=ttyS0"} <= set(words)
    found = status(guest)
    assert (found["problems"], found["host"]["bootloader"]) == ([], loader.named)
    assert not found["host"]["soft-rebooted"]
    assert row["boot-type"] == ("uki" if loader.unified else "bls")
    check_origin(guest, row)
    return row


def check_origin(guest: Machine, row: dict[str, Any]) -> None:
    """The deployment says what image it is of, and a tag keeps that."""
    origin = guest.run("cat", f"/sysroot/state/deploy/{row['id']}/{row['id']}.origin").out
    assert f"manifest_digest={row['image-digest']}" in origin.replace(" ", "")
    assert row["image-digest"] in tagged(guest)


def tagged(guest: Machine) -> set[str]:
    """Digests of the manifests that tags of deployments keep."""
    names = guest.run("ls", "/sysroot/composefs/streams/refs/oci").out.split()
    decoded = (name.replace("%3A", ":").replace("%2F", "/") for name in names)
    return {name.removeprefix("localhost/bootc-") for name in decoded if name.startswith("localhost/bootc-")}
