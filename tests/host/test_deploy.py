"""The first deployment, into roots that are empty or have boot entries of other systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import ESP_UUID, KINDS, Kind, RecordedHost
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import Recipe
from hostimaged.boot.loader import Bootloader
from hostimaged.errors import InvalidArgs, PreconditionFailed
from hostimaged.host import deploy as module
from hostimaged.host.deploy import DeployRequest, deploy
from hostimaged.host.imgref import OriginReference
from hostimaged.host.session import open_session
from hostimaged.ids import ManifestDigest
from hostimaged.progress import Reporter, Silent
from hostimaged.system.paths import HostPaths

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
OWN_MENU = (
    'menuentry "Windows" {\n    savedefault\n    set a=1\n    chainloader /EFI/Microsoft/bootmgfw.efi\n}\n'
)
FOREIGN = b"title Other\nversion 1\nefi /EFI/other/other.efi\n"


@pytest.fixture
def host(kind: Kind, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=kind)


def request(host: RecordedHost, digest: str, *arguments: str) -> DeployRequest:
    uuid = ESP_UUID if host.kind.classic and host.kind.uki else ""
    return DeployRequest(ManifestDigest(digest), REFERENCE, arguments, esp_uuid=uuid)


def run(host: RecordedHost, wanted: DeployRequest, reporter: Reporter | None = None) -> str:
    loader = Bootloader(str(host.kind.loader))
    paths = HostPaths.scratch(host.root)
    with open_session(paths, reporter or Silent(), bootloader=loader) as opened:
        result = deploy(opened, wanted)
    assert result["result"] == "deployed"
    return str(result["deployment"])


def test_it_boots_and_bootc_takes_it(host: RecordedHost, cfsctl: str) -> None:
    image = host.image(Recipe(version="1"))
    arguments = () if host.kind.uki else ("console=ttyS0",)
    assert run(host, request(host, image.manifest_digest, *arguments)) == image.id
    assert host.reboot() == image.id
    assert (host.root / "etc/hostname").read_text() == "image\n"
    assert (host.sysroot / "state/os/default/var/lib/seeded").read_text() == "by the image\n"
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    if not host.kind.uki:
        words = (host.root / "proc/cmdline").read_text().split()
        assert {"rw", "console=ttyS0", f"composefs=?{image.id}"} <= set(words)
    with pytest.raises(PreconditionFailed, match="already"):
        run(host, request(host, image.manifest_digest))


def test_entries_of_other_systems_stay(host: RecordedHost) -> None:
    image = host.image(Recipe(version="1"))
    entries = host.boot_dir / "loader/entries"
    entries.mkdir(parents=True)
    (entries / "other.conf").write_bytes(FOREIGN)
    run(host, request(host, image.manifest_digest))
    assert (entries / "other.conf").read_bytes() == FOREIGN


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_somebodys_own_menu_of_grub(host: RecordedHost) -> None:
    """UKIs are entered beside what is there; entries of kernels would be ignored for it."""
    image = host.image(Recipe(version="1"))
    menu = host.boot_dir / "grub2/user.cfg"
    menu.parent.mkdir(parents=True, exist_ok=True)
    menu.write_text(OWN_MENU)
    if host.kind.uki:
        run(host, request(host, image.manifest_digest))
        assert OWN_MENU in menu.read_text()
        assert host.reboot() == image.id
    else:
        with pytest.raises(PreconditionFailed, match="hides the entry"):
            run(host, request(host, image.manifest_digest))
        assert menu.read_text() == OWN_MENU
        assert not os.listdir(host.sysroot / "state/deploy")


def test_arguments_and_addons_are_checked_before_anything_is_written(host: RecordedHost) -> None:
    image = host.image(Recipe(version="1"))
    digest = ManifestDigest(image.manifest_digest)
    wrong = [DeployRequest(digest, REFERENCE, addons=("nothing.addon.efi",))]
    wrong.append(DeployRequest(digest, REFERENCE, ("composefs=x",)))
    if host.kind.uki:
        wrong.append(DeployRequest(digest, REFERENCE, ("quiet",)))
    for each in wrong:
        with pytest.raises(InvalidArgs):
            run(host, each)
    assert not os.listdir(host.sysroot / "state/deploy")
    assert not (HostPaths.scratch(host.root).transaction).exists()


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]], ids=str)
def test_interrupted_anywhere_it_is_done_again(kind: Kind, tmp_path: Path, cfsctl: str) -> None:
    number = 0
    while True:
        host = RecordedHost(tmp_path / f"host{number}", cfsctl, kind=kind)
        image = host.image(Recipe(version="1"))
        wanted = request(host, image.manifest_digest)
        reporter = At(number)
        try:
            run(host, wanted, reporter)
        except Crash:
            with session(host) as opened:
                done = bool(opened.state().sets.entries)
            if not done:
                run(host, wanted)
            assert host.reboot() == image.id
            number += 1
            continue
        assert set(module.FAULT_POINTS) <= set(reporter.points)
        break
