"""A host whose image has systemd in its initramfs, made by dracut, instead of Debian's scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import dracut_image
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_registry import GuestRegistry
from hostimage_testing.guest_state import check_booted
from hostimage_testing.installed import Installed
from hostimage_testing.intact import check_nothing_lost

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]


def test_systemd_mounts_the_deployment(tmp_path: Path, disks: Installed, registry: GuestRegistry) -> None:
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    layout = dracut_image.make(disks.layouts, tmp_path, Path(cache) / "vm" if cache else tmp_path)
    with Machine(tmp_path, disks.overlay(tmp_path), disks.images, registry.network) as guest:
        guest.start()
        first = check_booted(guest, "v1")
        registry.offer(dracut_image.VERSION, layout)
        guest.run("hostimagectl", "upgrade", limit=900)
        guest.shell("echo local >/etc/local")
        guest.reboot()
        row = check_booted(guest, dracut_image.VERSION)
        assert row["id"] != first["id"]
        said = guest.run("journalctl", "--boot", "--output=cat", "--unit=hostimaged-root-setup.service").out
        assert "Finished" in said, "the unit in the initramfs has done it"
        assert guest.run("cat", "/etc/local").out == "local\n"
        guest.run("test", "-d", "/sysroot/composefs/objects")
        check_nothing_lost(guest)

        guest.run("hostimagectl", "rollback")
        guest.reboot()
        assert check_booted(guest, "v1")["id"] == first["id"]
