"""A real machine boots what we deploy, updates itself through us, and goes back: one chain of boots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.emulator import Machine
from hostimage_testing.installed import Installed

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3000)]

#: Each object below the directory has the digest it is called by, or is printed.
_MEASURE = """cd /sysroot/composefs/objects && find . -type f -print0 | xargs -0 fsverity measure |
awk '{ name = $2; gsub("[./]", "", name); if ($1 != "sha512:" name) print; else right++ }
END { print right + 0 }'"""


@pytest.fixture
def guest(tmp_path: Path, disks: Installed) -> Iterator[Machine]:
    with Machine(tmp_path, disks.overlay(tmp_path), disks.images) as machine:
        yield machine


def offer(guest: Machine, version: str) -> None:
    """Let the tracked image be of this version, from now to the next boot."""
    guest.shell("mkdir -p /run/images; mountpoint -q /run/images || mount -o ro /dev/vdb /run/images")
    guest.run("ln", "-sfn", f"images/{version}", "/run/os")


def status(guest: Machine) -> dict[str, Any]:
    """What is told once the daemon, which the first call starts, has looked at all; it is slow here."""
    while True:
        found: dict[str, Any] = json.loads(guest.as_nobody("hostimagectl", "status", "--json").out)
        if not any(problem["id"] == "scan" for problem in found["problems"]):
            return found


def deployment(guest: Machine, kind: str) -> dict[str, Any]:
    (found,) = (each for each in status(guest)["deployments"] if each[kind])
    return dict(found)


def check_booted(guest: Machine, version: str) -> dict[str, Any]:
    """The guest runs this version, as the kernel says and as our status says; gives the row of it."""
    assert guest.run("systemctl", "is-system-running", "--wait", check=False).out.strip() == "running"
    row = deployment(guest, "booted")
    assert (row["version"], row["verity"], row["default"]) == (version, "ok", True)
    source, kind, options = guest.shell("findmnt --raw -no SOURCE,FSTYPE,OPTIONS /").out.split()
    assert (source, kind) == (f"composefs:{row['id']}", "overlay")
    assert {"ro", "verity=require"} <= set(options.split(","))
    arguments = guest.run("cat", "/proc/cmdline").out.split()
    assert [word for word in arguments if word.startswith("hostimage.version=")] == [
        f"hostimage.version={version}"
    ]
    assert [word for word in arguments if word.startswith("composefs=")] == [f"composefs={row['id']}"]
    assert {"rw", "console=ttyS0"} <= set(arguments)
    assert guest.run("cat", "/usr/share/version").out.strip() == version
    assert "as-expected" in guest.journal("--boot", "--unit=hostimaged-boot-check.service")
    found = status(guest)
    assert (found["problems"], found["host"]["bootloader"]) == ([], "systemd")
    check_origin(guest, row)
    return row


def check_origin(guest: Machine, row: dict[str, Any]) -> None:
    """The deployment says what image it is of, and a tag keeps that."""
    origin = guest.run("cat", f"/sysroot/state/deploy/{row['id']}/{row['id']}.origin").out
    assert f"manifest_digest={row['image-digest']}" in origin.replace(" ", "")
    tags = guest.run("ls", "/sysroot/composefs/streams/refs/oci").out
    assert f"bootc-{row['image-digest']}".replace(":", "%3A") in tags or row["image-digest"] in tags


def files_of_boot(guest: Machine) -> str:
    return guest.shell("cd /efi && find . -type f | sort | xargs sha256sum; ls /run/composefs").out


def test_install_update_and_roll_back(guest: Machine) -> None:
    guest.start()
    first = check_booted(guest, "v1")
    assert int(guest.shell(_MEASURE).out.strip()) > 1000
    assert guest.as_nobody("hostimagectl", "upgrade", check=False).code != 0, "somebody with no session may"
    offer(guest, "v2")
    guest.as_user("hostimagectl", "upgrade", limit=600)
    second = deployment(guest, "staged")
    assert second["version"] == "v2"

    guest.shell("echo local >/etc/local; echo changed >/etc/motd; rm /etc/issue.net; echo kept >/var/kept")
    guest.reboot()
    assert check_booted(guest, "v2")["id"] == second["id"]
    shown = guest.run("cat", "/etc/local", "/etc/motd", "/var/kept", "/etc/image-setting").out.split("\n")
    assert shown[:4] == ["local", "changed", "kept", "of v2"]
    guest.run("test", "!", "-e", "/etc/issue.net")
    assert second["boot-digest"] == first["boot-digest"]

    guest.shell("echo only here >/etc/local; echo kept on >/var/kept")
    refused = guest.as_user("hostimagectl", "rollback", check=False)
    assert (refused.code, "org.hostimage1.rollback" in refused.out) == (5, True), "that takes a password"
    guest.run("hostimagectl", "rollback")
    guest.reboot()
    assert check_booted(guest, "v1")["id"] == first["id"]
    shown = guest.run("cat", "/etc/local", "/etc/motd", "/var/kept", "/etc/image-setting").out.split("\n")
    assert shown[:4] == ["local", "changed", "kept on", "of v1"]

    before = files_of_boot(guest)
    offer(guest, "v3")
    guest.as_user("hostimagectl", "upgrade", limit=600)
    third = deployment(guest, "staged")
    assert third["boot-digest"] != first["boot-digest"]
    guest.run("hostimagectl", "unstage")
    assert files_of_boot(guest) == before
    assert [each for each in status(guest)["deployments"] if each["staged"]] == []
