"""What cannot be read must not pass for what is not there: nothing is removed, and nothing is activated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.lives import Life, staged, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import Recipe
from hostimaged.errors import BootLoaderError, CorruptRepository, HostimageError
from hostimaged.host import reorder
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.pins import set_pinned
from hostimaged.host.session import Session
from hostimaged.host.stage import StageRequest, stage, unstage
from hostimaged.ids import DeploymentId, ManifestDigest

pytestmark = pytest.mark.interop

REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])


def operations(life: Life) -> list[Callable[[Session], Any]]:
    booted = DeploymentId(life.booted.id)
    digest = ManifestDigest(life.booted.image.manifest_digest)
    return [
        lambda opened: reorder.delete(opened, booted),
        reorder.rollback,
        finalize,
        lambda opened: stage(opened, StageRequest(digest, REFERENCE)),
        unstage,
        lambda opened: set_pinned(opened, booted, pinned=True),
    ]


def fingerprint(host: RecordedHost) -> dict[str, bytes]:
    """Everything an operation could spoil."""
    tops = [host.root / "efi", host.sysroot / "state/deploy", host.root / "run/composefs"]
    files = [path for top in tops for path in top.rglob("*") if path.is_file() and not path.is_symlink()]
    return {os.fspath(path): path.read_bytes() for path in files}


def refused_by_all(host: RecordedHost, life: Life, error: type[HostimageError]) -> None:
    before = fingerprint(host)
    for operation in operations(life):
        with session(host) as opened, pytest.raises(error, match="not known"):
            operation(opened)
    assert fingerprint(host) == before


def test_nobody_knows_what_runs(host: RecordedHost) -> None:
    life = staged(host)
    mountinfo = host.root / "proc/self/mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace(f"composefs:{life.booted.id}", "overlay"))
    refused_by_all(host, life, BootLoaderError)


def test_nobody_knows_what_is_staged(host: RecordedHost) -> None:
    life = staged(host)
    host.marker.write_text("{")
    refused_by_all(host, life, BootLoaderError)


def test_nobody_knows_what_is_pinned(host: RecordedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    life = upgraded(host)

    def fail(_: object) -> None:
        raise CorruptRepository("the tags cannot be read")

    monkeypatch.setattr("hostimaged.host.read.tags", fail)
    refused_by_all(host, life, CorruptRepository)


def test_the_kernel_of_a_damaged_entry_stays(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    (entry,) = [path for path in host.entries.iterdir() if life.rollback.id in path.read_text()]
    entry.write_text(entry.read_text().replace(f"composefs=?{life.rollback.id}", "composefs=?12"))
    with session(host) as opened:
        reorder.begin(opened)
    assert host.artifact(life.rollback).is_dir()


def test_the_kernel_of_an_entry_of_somebodys_own_stays(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    (entry,) = [path for path in host.entries.iterdir() if life.rollback.id in path.read_text()]
    rescue = entry.read_text().replace(f"composefs=?{life.rollback.id}", "init=/bin/sh")
    entry.rename(host.entries / "rescue.conf")
    (host.entries / "rescue.conf").write_text(rescue)
    with session(host) as opened:
        reorder.begin(opened)
    assert host.artifact(life.rollback).is_dir()


def test_entries_of_others_are_taken_as_they_are_at_the_shutdown(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    (host.entries / "windows.conf").write_text("title Other\nversion 1\nefi /EFI/other.efi\n")
    with session(host) as opened:
        assert finalize(opened)["result"] == "finalized"
    assert (host.entries / "windows.conf").exists()
    assert host.reboot() == life.staged.id


def test_what_could_not_be_carried_over_keeps_the_menu_as_it_is(host: RecordedHost) -> None:
    life = upgraded(host)
    (host.entries / "directory").mkdir()
    with session(host) as opened, pytest.raises(BootLoaderError, match="would be lost"):
        reorder.rollback(opened)
    assert (host.entries / "directory").is_dir()
    assert host.reboot() == life.booted.id


def test_a_deleted_deployment_is_not_brought_back_by_the_shutdown(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    rollback = DeploymentId(life.rollback.id)
    image = host.image(Recipe(version="9", kernel=b"kernel nine "))
    with session(host) as opened:
        set_pinned(opened, rollback, pinned=True)
    with session(host) as opened:
        wanted = StageRequest(ManifestDigest(image.manifest_digest), REFERENCE, max_entries=3)
        assert stage(opened, wanted)["result"] == "staged"
    with session(host) as opened:
        set_pinned(opened, rollback, pinned=False)
    with session(host) as opened:
        assert reorder.delete(opened, rollback)["result"] == "deleted"
    assert not host.state(life.rollback).exists()
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id
    assert life.rollback.id not in "".join(line.text for line in host.menu())


@pytest.mark.parametrize("kind", [Kind(KINDS[3].loader, uki=True)], ids=str)
def test_addons_go_along_with_an_image_that_gets_its_prefix(kind: Kind, tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=kind)
    old = host.deploy(host.image(Recipe(version="1")), prefixed=False)
    addons = host.uki_dir / f"{old.id}.efi.extra.d"
    addons.mkdir()
    (addons / "a.addon.efi").write_bytes(b"addon")
    host.live(old)
    host.booted(old)
    image = host.image(Recipe(version="2", kernel=b"kernel two "))
    with session(host) as opened:
        stage(opened, StageRequest(ManifestDigest(image.manifest_digest), REFERENCE))
    moved = host.uki_dir / f"bootc_composefs-{old.id}.efi.extra.d"
    assert (moved / "a.addon.efi").read_bytes() == b"addon"
    assert not addons.exists()
