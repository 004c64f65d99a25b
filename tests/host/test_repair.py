"""Damage on whole hosts: what it breaks is said in terms of deployments, and repaired from their origins."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing.hosts import Era
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, installed, upgraded
from hostimage_testing.os_images import OsImage
from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository
from hostimaged.composefs.splitstream import ContentType
from hostimaged.host.damage import Verification, verification_of
from hostimaged.host.repair import Repair, repair
from hostimaged.ids import ManifestDigest, ObjectId, SourceDigest
from hostimaged.oci import fsck, images, pulls
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def object_of(life: Life, id_: ObjectId) -> Path:
    return life.host.repository / "objects" / id_.pathname


def from_layout(paths: HostPaths, image: OsImage) -> None:
    """Say that the image was pulled from the layout that it is in."""
    digest = image.manifest_digest
    row = pulls.PullRow(image.source, ManifestDigest(digest), SourceDigest(digest), int(time.time()))
    pulls.record(paths.pulls, row)


def verified(paths: HostPaths) -> Verification:
    with Repository.open(paths.repository) as repository:
        return verification_of(paths, repository, fsck.check(repository), Silent())


def repaired(paths: HostPaths) -> Repair:
    with Repository.open(paths.repository) as repository:
        return repair(paths, repository, Silent())


def check(life: Life, cfsctl: str) -> None:
    """cfsctl finds nothing wrong, and takes the image of no deployment for garbage."""
    judge = Judge(cfsctl, life.host.repository)
    judge.check()
    judge("gc")
    judge.check()
    for deployment in (life.booted, life.rollback):
        if deployment is not None:
            assert (life.host.repository / "images" / deployment.id).exists()


def test_damage_is_told_in_terms_of_deployments(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(upgraded)
    paths = HostPaths.scratch(life.host.root)
    assert life.rollback is not None
    assert verified(paths).as_dict()["ok"]
    flip(object_of(life, ObjectId(bytes.fromhex(life.rollback.id))))
    found = verified(paths)
    assert found.breaks.deployments == (life.rollback.id,)
    [row] = [row for row in found.rows if row.kind == "object-digest-mismatch"]
    assert row.breaks.deployments == (life.rollback.id,)
    assert f"deployment 1 ({life.rollback.id[:12]})" in "\n".join(found.lines())


@pytest.mark.parametrize("era", [Era.CURRENT])
@pytest.mark.parametrize("what", ["boot image", "configuration", "both", "layer"])
def test_a_deployment_is_repaired(recorded: Recorded, cfsctl: str, what: str, era: Era) -> None:
    life = recorded(upgraded, era=era)
    paths = HostPaths.scratch(life.host.root)
    with Repository.open(paths.repository) as repository:
        image = images.open_image(repository, ManifestDigest(life.booted.image.manifest_digest))
    boot = ObjectId(bytes.fromhex(life.booted.id))
    damaged = {
        "boot image": [boot],
        "configuration": [image.stored_config.stream_id],
        "both": [boot, image.stored_config.stream_id],
        "layer": list(image.layers.values()),
    }[what]
    for id_ in damaged:
        flip(object_of(life, id_))
    if what in ("configuration", "both", "layer"):
        failed = repaired(paths)
        assert not failed.ok
        assert life.booted.id in failed.left[0].breaks.deployments
        from_layout(paths, life.booted.image)
    done = repaired(paths)
    assert done.ok, done.lines()
    check(life, cfsctl)
    with Repository.open(paths.repository) as repository:
        assert images.open_image(repository, image.manifest_digest).config_refs == image.config_refs


def test_what_was_never_tagged_is_named(recorded: Recorded) -> None:
    """A deployment whose manifest nobody has any more can only be told of."""
    life = recorded(installed)
    paths = HostPaths.scratch(life.host.root)
    for tag in (life.host.repository / "streams/refs/oci").iterdir():
        tag.unlink()
    flip(object_of(life, ObjectId(bytes.fromhex(life.booted.id))))
    done = repaired(paths)
    assert not done.ok
    assert [left.breaks.deployments for left in done.left] == [(life.booted.id,)]


@pytest.mark.parametrize("what", ["etc", "kernel"])
def test_copies_on_the_host_serve(recorded: Recorded, cfsctl: str, what: str) -> None:
    """What the loader or ``/etc`` has of an image is taken from there, if it is still as it was."""
    life = recorded(upgraded)
    paths = HostPaths.scratch(life.host.root)
    image = life.booted.image
    content = b"[Service]\n" * 20 if what == "etc" else image.recipe.linux
    lost = fsverity.digest(Algorithm.SHA512, content)
    if what == "etc":
        life.host.state(life.booted).joinpath("etc/service.d/copy.conf").write_bytes(content)
        with Repository.open(paths.repository) as repository:
            assert repository.store_object(content).id == lost
            with repository.new_stream(ContentType.BLOB) as writer:
                writer.external(lost, len(content))
                repository.write_stream("test", writer, "test")
    flip(object_of(life, lost))
    done = repaired(paths)
    assert done.ok, done.lines()
    assert done.size == 0
    assert object_of(life, lost).read_bytes() == content
    check(life, cfsctl)
    # A change to the copy does not reach what was repaired, and is none to repair with.
    for path in life.host.root.rglob("*"):
        if path.is_file() and not path.is_symlink() and "composefs" not in path.parts:
            data = path.read_bytes()
            if data == content:
                path.write_bytes(b"changed" * 20)
    assert object_of(life, lost).read_bytes() == content
    flip(object_of(life, lost))
    assert not repaired(paths).ok
