"""A real machine boots what we deploy, updates itself through us, and goes back: one chain of boots."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_testing import offline, tools
from hostimage_testing.bootable import MATERIAL
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_registry import GuestRegistry
from hostimage_testing.guest_state import OFFERED, check_booted, deployment, offer, status
from hostimage_testing.installed import Installed
from hostimage_testing.intact import check_nothing_lost

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3000)]

#: Each object below the directory has the digest it is called by, or is printed.
_MEASURE = """cd /sysroot/composefs/objects && find . -type f -print0 | xargs -0 fsverity measure |
awk '{ name = $2; gsub("[./]", "", name); if ($1 != "sha512:" name) print; else right++ }
END { print right + 0 }'"""
_FLIP = """\
import os, sys
disk = os.open("/dev/vda2", os.O_RDWR)
(byte,) = os.pread(disk, 1, int(sys.argv[1]))
os.pwrite(disk, bytes([byte ^ 1]), int(sys.argv[1]))
os.fsync(disk)
"""


@pytest.fixture
def guest(tmp_path: Path, disks: Installed, registry: GuestRegistry) -> Iterator[Machine]:
    with Machine(tmp_path, disks.overlay(tmp_path), disks.images, registry.network) as machine:
        yield machine


def files_of_boot(guest: Machine) -> str:
    return guest.shell("cd /efi && find . -type f | sort | xargs sha256sum; ls /run/composefs").out


def check_etc(guest: Machine, local: str, kept: str, version: str) -> None:
    shown = guest.run("cat", "/etc/local", "/etc/motd", "/var/kept", "/etc/image-setting").out.split("\n")
    assert shown[:4] == [local, "changed", kept, f"of {version}"]


def test_install_update_and_roll_back(
    guest: Machine, registry: GuestRegistry, tmp_path: Path, cfsctl: str
) -> None:
    guest.start()
    first = check_booted(guest, "v1")
    assert int(guest.shell(_MEASURE).out.strip()) > 1000
    assert guest.as_nobody("hostimagectl", "upgrade", check=False).code != 0, "somebody with no session may"
    registry.offer("v2")
    guest.as_user("hostimagectl", "upgrade", limit=600)
    second = deployment(guest, "staged")
    assert second["version"] == "v2"

    guest.shell("echo local >/etc/local; echo changed >/etc/motd; rm /etc/issue.net; echo kept >/var/kept")
    guest.reboot()
    assert check_booted(guest, "v2")["id"] == second["id"]
    check_etc(guest, "local", "kept", "v2")
    guest.run("test", "!", "-e", "/etc/issue.net")
    assert second["boot-digest"] == first["boot-digest"]
    check_nothing_lost(guest)

    guest.shell("echo only here >/etc/local; echo kept on >/var/kept")
    refused = guest.as_user("hostimagectl", "rollback", check=False)
    assert (refused.code, "org.hostimage1.rollback" in refused.out) == (5, True), "that takes a password"
    guest.run("hostimagectl", "rollback")
    guest.reboot()
    assert check_booted(guest, "v1")["id"] == first["id"]
    check_etc(guest, "local", "kept on", "v1")

    before = files_of_boot(guest)
    registry.offer("v3")
    let_the_timer_fire(guest)
    third = deployment(guest, "staged")
    assert (third["version"], third["boot-digest"] != first["boot-digest"]) == ("v3", True)
    guest.run("hostimagectl", "unstage")
    assert files_of_boot(guest) == before
    assert [each for each in status(guest)["deployments"] if each["staged"]] == []
    check_nothing_lost(guest)

    kernel = guest.run("uname", "-r").out.strip()
    offer(guest, "v3")
    guest.run("hostimagectl", "switch", f"oci:{OFFERED}:latest", limit=600)
    guest.reboot()
    assert check_booted(guest, "v3")["id"] == third["id"]
    check_etc(guest, "local", "kept on", "v3")
    assert guest.run("uname", "-r").out.strip() != kernel
    damage_and_repair(guest)
    guest.shut_down()
    check_by_others(cfsctl, tmp_path)


#: Gone with the next boot.
_DROP_IN = "/run/systemd/system/hostimaged-update.timer.d"


def let_the_timer_fire(guest: Machine) -> None:
    """A day passes, and the policy is to stage: what comes of it is staged by itself."""
    guest.run("hostimagectl", "policy", "stage")
    assert guest.run("systemctl", "is-active", "hostimaged-update.timer").out.strip() == "active"
    # What was missed is made up for within the delay, which is drawn anew whenever the clock is set.
    settings = r"[Timer]\nRandomizedDelaySec=0\nAccuracySec=1s\n"
    guest.shell(f"mkdir -p {_DROP_IN}; printf '{settings}' >{_DROP_IN}/test.conf; systemctl daemon-reload")
    guest.shell("date -s '29 hours'")
    deadline = time.monotonic() + 900
    while not [each for each in status(guest)["deployments"] if each["staged"]]:
        assert time.monotonic() < deadline, guest.journal("--boot", "--unit=hostimaged-update.*")
        time.sleep(5)
    service = "hostimaged-update.service"
    assert guest.run("systemctl", "show", "--value", "--property=TriggeredBy", service).out.split() == [
        "hostimaged-update.timer"
    ]
    while guest.run("systemctl", "is-active", service, check=False).out.strip() == "activating":
        assert time.monotonic() < deadline, guest.journal("--boot", "--unit=hostimaged-update.*")
        time.sleep(5)
    assert "success" in guest.run("systemctl", "show", "--property=Result", service).out
    assert guest.run(
        "systemctl", "show", "--value", "--property=LastTriggerUSec", "hostimaged-update.timer"
    ).out.strip()


def damage_and_repair(guest: Machine) -> None:
    """One byte on the disk changes: the kernel does not give it out, we say where it is, and mend it."""
    content = guest.run("sha256sum", f"/{MATERIAL}").out
    digest = guest.run("fsverity", "digest", "--compact", "--hash-alg=sha512", f"/{MATERIAL}").out.strip()
    name = f"{digest[:2]}/{digest[2:]}"
    change_on_disk(guest, f"/sysroot/composefs/objects/{name}")
    refused = guest.run("cat", f"/{MATERIAL}", check=False)
    assert refused.code != 0
    assert "Input/output error" in refused.out

    found = guest.run("hostimagectl", "verify", check=False, limit=600)
    assert (found.code, f"objects/{name}" in found.out) == (EXIT_CODES[ErrorName.CORRUPT_REPOSITORY], True), (
        found.out
    )
    guest.run("hostimagectl", "repair", limit=600)
    measured = guest.run("fsverity", "measure", f"/sysroot/composefs/objects/{name}").out
    assert measured.startswith(f"sha512:{digest} ")
    check_nothing_lost(guest)
    # What looked the file up before has the damaged one until the kernel forgets it.
    guest.shell("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.run("sha256sum", f"/{MATERIAL}").out == content


def change_on_disk(guest: Machine, path: str) -> None:
    """Change a byte of a file that nobody can write to, on the device; and forget what was read of it."""
    listed = guest.run("filefrag", "-v", "-b4096", path).out
    (block,) = re.findall(r"^ +0: +0\.\. +\d+: +(\d+)\.\.", listed, re.MULTILINE)
    guest.run("python3", "-c", _FLIP, str(int(block) * 4096 + 1000))
    guest.shell("echo 3 >/proc/sys/vm/drop_caches")


def check_by_others(cfsctl: str, directory: Path) -> None:
    """composefs-rs finds the repository on the guest's disk as it should be."""
    repository = offline.copy_out(directory / "disk.qcow2", "composefs", directory)
    for check in (["fsck"], ["oci", "fsck"]):
        said = json.loads(tools.run(cfsctl, "--repo", repository, *check, "--json", timeout=600).out)
        assert said["ok"], said
    shutil.rmtree(repository)
