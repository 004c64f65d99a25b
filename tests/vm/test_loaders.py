"""Each boot loader, with each kind of images, goes through an installation, an update and a rollback."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hostimage_testing import loaders
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_state import check_booted, deployment, offer
from hostimage_testing.loader_disks import Workshop
from hostimage_testing.loaders import Loader

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]

OTHERS = (loaders.SYSTEMD_UKI, loaders.GRUB_UKI, loaders.GRUB_BLS)


#: What the boot digest is of, by another way than ours.
_KERNEL_DIGEST = "cat /usr/lib/modules/*/vmlinuz /usr/lib/modules/*/initramfs.img | sha256sum"


def kernels(guest: Machine) -> set[str]:
    """The deployments whose kernels, or kernel images, lie where the boot loader looks."""
    found = guest.shell("find /efi/EFI/Linux /sysroot/boot -name 'bootc_composefs-*'; true").out.split()
    return {re.sub(r".*/bootc_composefs-|\.efi$", "", path) for path in found if path.startswith("/")}


@pytest.mark.parametrize("loader", OTHERS, ids=lambda loader: loader.name)
def test_install_update_and_roll_back(tmp_path: Path, workshop: Workshop, loader: Loader) -> None:
    disk = workshop.disk(loader)
    with Machine(tmp_path, disk.overlay(tmp_path), disk.images) as guest:
        guest.start()
        first = check_booted(guest, "v1", loader)
        assert kernels(guest) == {first["id"]}
        assert first["boot-digest"] == f"sha256:{guest.shell(_KERNEL_DIGEST).out.split()[0]}"
        if loader is loaders.SYSTEMD_UKI:
            # Nobody mounts it any more: the daemon and the finalizer do, each for itself.
            guest.run("umount", "/efi")
        offer(guest, loader.image("v2"))
        guest.run("hostimagectl", "upgrade", limit=900)
        second = deployment(guest, "staged")
        assert (second["version"], second["boot-digest"]) == ("v2", first["boot-digest"])
        assert deployment(guest, "booted")["default"]
        guest.shell("echo local >/etc/local; echo kept >/var/kept")
        guest.reboot()

        assert check_booted(guest, "v2", loader)["id"] == second["id"]
        assert guest.run("cat", "/etc/local", "/var/kept", "/etc/image-setting").out.split("\n")[:3] == [
            "local",
            "kept",
            "of v2",
        ]
        assert deployment(guest, "is-rollback")["id"] == first["id"]
        # A kernel image is of one deployment only; a kernel and its initrd may be started for both.
        assert kernels(guest) == ({first["id"], second["id"]} if loader.unified else {first["id"]})
        guest.shell("echo later >/etc/later")
        guest.run("hostimagectl", "rollback")
        assert [deployment(guest, kind)["default"] for kind in ("booted", "is-rollback")] == [False, True]
        guest.reboot()

        assert check_booted(guest, "v1", loader)["id"] == first["id"]
        # Its own /etc, as it was when it was left.
        assert guest.run("cat", "/etc/image-setting", "/etc/local").out.split("\n")[:2] == ["of v1", "local"]
        guest.run("test", "!", "-e", "/etc/later")
        assert deployment(guest, "is-rollback")["id"] == second["id"]
