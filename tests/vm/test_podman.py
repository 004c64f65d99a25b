"""A host that boots an image becomes one with unified storage: the booted image is also a container image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import podman_image
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_registry import HOST, GuestRegistry
from hostimage_testing.guest_state import check_booted, status
from hostimage_testing.installed import Installed
from hostimage_testing.intact import check_nothing_lost

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(4500),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]

IMAGE = f"{HOST}/os:latest"


def test_the_booted_image_runs_as_a_container(
    tmp_path: Path, disks: Installed, registry: GuestRegistry
) -> None:
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    layout = podman_image.make(disks.layouts, tmp_path, Path(cache) / "vm" if cache else tmp_path)
    with Machine(tmp_path, disks.overlay(tmp_path), disks.images, registry.network) as guest:
        guest.start()
        check_booted(guest, "v1")
        registry.offer(podman_image.VERSION, layout)
        guest.run("hostimagectl", "upgrade", limit=900)
        guest.reboot()
        row = check_booted(guest, podman_image.VERSION)

        # Nothing is downloaded for it but the manifest: podman is fed from the repository.
        print(guest.run("hostimagectl", "set-unified", "on", limit=2400).out)
        assert status(guest)["unified"]
        container = ["podman", "run", "--rm", "--pull=never", "--network=host", IMAGE]
        ran = guest.run(*container, "cat", "/usr/share/version", "/etc/os-release", limit=900)
        version, _, os_release = ran.out.partition("\n")
        assert version == podman_image.VERSION
        assert os_release.strip() == guest.run("cat", "/etc/os-release").out.strip()
        assert check_booted(guest, podman_image.VERSION)["id"] == row["id"]
        check_nothing_lost(guest)
