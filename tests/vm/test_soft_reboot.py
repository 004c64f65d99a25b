"""A soft reboot under the guest's own systemd: a new root, the same kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import loaders
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_state import (
    OFFERED,
    boot_id,
    check_booted,
    check_origin,
    check_root,
    deployment,
    offer,
    status,
)
from hostimage_testing.loader_disks import SOFT, SOFT_VERSION, Workshop

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]


def uptime(guest: Machine) -> float:
    return float(guest.run("cat", "/proc/uptime").out.split()[0])


def test_another_root_on_the_same_kernel(tmp_path: Path, workshop: Workshop) -> None:
    disk = workshop.disk(loaders.SYSTEMD)
    with Machine(tmp_path, disk.overlay(tmp_path), disk.images) as guest:
        guest.start()
        first = check_booted(guest, "v1")
        kernel, before = boot_id(guest), uptime(guest)
        firmware = guest.console_of_boot().count("BdsDxe: starting")
        guest.shell("echo local >/etc/local; rm /etc/issue.net; echo kept >/var/kept")
        offer(guest, SOFT)
        took = guest.soft_reboot(f"hostimagectl switch --apply=soft-reboot oci:{OFFERED}:latest")
        print(f"switched, restarted and ready after {took:.0f} s")

        row = check_root(guest, SOFT_VERSION)
        assert row["id"] != first["id"]
        assert (boot_id(guest), uptime(guest) > before) == (kernel, True)
        assert guest.console_of_boot().count("BdsDxe: starting") == firmware
        assert f"composefs={first['id']}" in guest.run("cat", "/proc/cmdline").out.split()
        assert guest.run("systemctl", "show", "-P", "SoftRebootsCount").out.strip() == "1"
        assert guest.run("cat", "/etc/local", "/var/kept", "/etc/image-setting").out.split("\n")[:3] == [
            "local",
            "kept",
            f"of {SOFT_VERSION}",
        ]
        guest.run("test", "!", "-e", "/etc/issue.net")
        found = status(guest)
        assert (found["problems"], found["host"]["soft-rebooted"]) == ([], True)
        assert found["host"]["next"] == row["id"]
        assert [each["id"] for each in found["deployments"]] == [row["id"], first["id"]]
        assert deployment(guest, "is-rollback")["soft-reboot-capable"]
        check_origin(guest, row)
        assert guest.run("test", "-e", "/run/nextroot/usr", check=False).code != 0

        # By the firmware it is the same, with what was written since.
        guest.shell("echo later >/etc/later")
        guest.reboot()
        assert boot_id(guest) != kernel
        assert check_booted(guest, SOFT_VERSION, argument="v1")["id"] == row["id"]
        assert guest.run("cat", "/etc/local", "/etc/later").out.split() == ["local", "later"]
