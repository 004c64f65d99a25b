"""A seed of /etc is what ``cp -a`` makes of the mounted image, which is what bootc does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import walk
from hostimage_testing.etctrees import opened
from hostimage_testing.tools import absent, require, run
from hostimaged.composefs.erofs import Format, build
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import (
    CharDevice,
    Directory,
    External,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Stat,
    Symlink,
)
from hostimaged.host import etctree
from hostimaged.host.etcplan import make_plan
from hostimaged.host.etcseed import seed_etc
from hostimaged.host.setuproot import MountMode
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent

pytestmark = [pytest.mark.interop, pytest.mark.root]

BIG = b"an object\n" * 5000
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def stat(mode: int, uid: int = 0, gid: int = 0, **xattrs: bytes) -> Stat:
    """Metadata; ``user_x`` stands for ``user.x``."""
    named = {os.fsencode(name.replace("_", ".", 1)): value for name, value in xattrs.items()}
    return Stat(mode, uid, gid, 1_700_000_000, 123_456_789, named)


def sample() -> Directory:
    """The root of an image."""
    shared = Leaf(stat(0o640, 7, 8, user_x=b"1"), External(digest(Algorithm.SHA512, BIG), len(BIG)))
    deep = Directory(stat(0o700), {b"again": shared, b"\xff\xfe": Leaf(stat(0o644), Inline(b"odd name"))})
    etc = Directory(
        stat(0o751, 1, 2, user_of_etc=b"e"),
        {
            b"a": Leaf(stat(0o644), Inline(b"inline")),
            b"big": shared,
            b"cap": Leaf(stat(0o6755, 3, 4, security_capability=CAPABILITY), Inline(b"x")),
            b"d": deep,
            b"dangling": Leaf(stat(0o777, 5, 6), Symlink(b"/no/such")),
            b"empty": Leaf(stat(0), Inline(b"")),
            b"fifo": Leaf(stat(0o620), Fifo()),
            b"null": Leaf(stat(0o666), CharDevice(os.makedev(1, 3))),
            b"selinux": Leaf(stat(0o644, security_selinux=b"u:r:etc_t:s0"), Inline(b"labelled")),
            b"socket": Leaf(stat(0o600), Socket()),
            b"sticky": Directory(stat(0o1777, 9, 9, user_x=b"2"), {}),
        },
    )
    return Directory(stat(0o755), {b"etc": etc})


@pytest.mark.parametrize("image_format", Format)
def test_the_same_as_cp_of_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: Format
) -> None:
    if os.geteuid() != 0:
        absent("mounting needs root")
    monkeypatch.setattr(
        walk, "KEPT_XATTRS", ("security.capability", "security.selinux", "user.x", "user.of_etc")
    )
    data = build(sample(), image_format, Algorithm.SHA512)
    repository, _ = Repository.init(tmp_path / "repository", verity=Verity.OPPORTUNISTIC)
    with repository:
        repository.store_object(BIG)
        deployment = DeploymentId(repository.write_image(data).hex())
        root = etctree.read_image(repository, deployment)
        (tmp_path / "deploy").mkdir()
        with opened(tmp_path / "deploy") as fd:
            seed_etc(root, repository, fd, MountMode.BIND, Silent())
    (tmp_path / "image").write_bytes(data)
    with walk.mounted(tmp_path / "image", tmp_path / "repository/objects", tmp_path) as merged:
        copied = tmp_path / "copied"
        copied.mkdir()
        run(require("cp"), "-a", "--remove-destination", f"{merged}/etc/.", copied)
    found, expected = walk.snapshot(tmp_path / "deploy/etc"), walk.snapshot(copied)
    assert found.nodes == expected.nodes
    assert found.hardlinks == expected.hardlinks
    assert len(found.nodes) == 14
    assert found.nodes[b"/cap"].xattrs == (("security.capability", CAPABILITY),)
    # And nobody changed anything in either, as a merge sees it.
    pristine = etctree.subdirectory(root, b"etc")
    for place in (tmp_path / "deploy/etc", copied):
        with opened(place) as fd:
            plan = make_plan(pristine, fd, etctree.ImageView(pristine))
            assert plan.summary == {"added": 0, "modified": 0, "removed": 0, "conflicts": 0}
