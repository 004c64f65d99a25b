"""The first /etc and /var of a deployment: all kinds of files, modes of mounting, objects that are wrong."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostimage_testing import etctrees
from hostimage_testing.etctrees import MTIME, ROOT, Items, image, make, opened, snapshot, tree
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.repository.objects import ObjectMissing
from hostimaged.composefs.tree import CharDevice, Directory, External, ExternalNoVerity, Leaf, Sparse, Stat
from hostimaged.errors import NoSpace, StorageError, UnsupportedImage, VerityMismatch
from hostimaged.host.etcseed import seed_bytes, seed_etc, seed_var
from hostimaged.host.setuproot import MountMode
from hostimaged.progress import Silent
from hostimaged.system import durable, trees

OWN = (os.geteuid(), os.getegid())
PLAIN = Stat(0o644, *OWN, MTIME, 0, {})
BIG = b"an object\n" * 1000
EVERYTHING: Items = {
    "a": etctrees.file("inline", 0o600),
    "b": etctrees.file(BIG, 0o4755, xattrs={"user.note": b"1"}),
    "c/d/e": etctrees.file(BIG),
    "c": etctrees.directory(0o2750, xattrs={"user.note": b"2"}),
    "l": etctrees.link("/no/such"),
    "p": etctrees.fifo(0o620),
    "s": etctrees.socket(0o600),
    b"\xff\xfe": etctrees.file(""),
}
OF_ROOT: Items = {
    "dev": etctrees.device(1, 3, 0o666),
    "whiteout": etctrees.device(0, 0, 0),
    "theirs": etctrees.file("x", 0o4711, uid=7, gid=8, xattrs={"security.selinux": b"u:r:etc_t:s0"}),
    "link": etctrees.link("a", uid=7, gid=8, xattrs={"security.selinux": b"u:r:l_t:s0"}),
}


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(tmp_path / "repository", verity=Verity.OPPORTUNISTIC)
    with made as repository:
        repository.store_object(BIG)
        yield repository


def root_of(etc: Directory | Leaf, name: bytes = b"etc") -> Directory:
    return Directory(Stat(0o755, *OWN, 0, 0, {}), {name: etc})


@contextmanager
def deployment(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "deploy"
    path.mkdir(exist_ok=True)
    with opened(path) as fd:
        yield fd


def seed(tmp_path: Path, repository: Repository, etc: Directory, mode: MountMode = MountMode.BIND) -> Path:
    with deployment(tmp_path) as fd:
        seed_etc(root_of(etc), repository, fd, mode, Silent())
        assert os.listdir(fd) == ["etc"]
    return tmp_path / "deploy/etc"


def test_everything(tmp_path: Path, repository: Repository) -> None:
    expected = tree({**EVERYTHING, **(OF_ROOT if ROOT else {})})
    etc = seed(tmp_path, repository, image(expected, mode=0o711))
    assert snapshot(etc) == expected
    assert etc.stat().st_mode & 0o7777 == 0o711
    assert {path.lstat().st_mtime for path in (etc, *etc.rglob("*"))} == {MTIME}


def test_the_stamp_is_left_out(tmp_path: Path, repository: Repository) -> None:
    items = {".updated": etctrees.file(), "d/.updated": etctrees.file()}
    assert set(snapshot(seed(tmp_path, repository, image(tree(items))))) == {b"d", b"d/.updated"}


def test_hard_links(tmp_path: Path, repository: Repository) -> None:
    leaf, link = Leaf(PLAIN, External(digest(Algorithm.SHA512, BIG), len(BIG))), image(tree({})).stat
    below = Directory(link, {b"x": leaf})
    etc = seed(tmp_path, repository, Directory(link, {b"d": below, b"x": leaf, b"y": leaf}))
    assert (etc / "x").stat().st_nlink == 3
    assert (etc / "x").samefile(etc / "d/x")
    assert (etc / "x").samefile(etc / "y")


def test_sparse(tmp_path: Path, repository: Repository) -> None:
    root = image({})
    root.entries[b"x"] = Leaf(PLAIN, Sparse(1 << 30))
    found = (seed(tmp_path, repository, root) / "x").stat()
    assert (found.st_size, found.st_blocks) == (1 << 30, 0)


@pytest.mark.parametrize("mode", [MountMode.NONE, MountMode.TRANSIENT])
def test_no_seed_where_nothing_looks(tmp_path: Path, repository: Repository, mode: MountMode) -> None:
    """The directory itself is there in any case, as bootc expects it."""
    etc = seed(tmp_path, repository, image(tree(EVERYTHING), mode=0o750), mode)
    assert os.listdir(etc) == []
    assert etc.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("stamp", [False, True])
def test_overlay(tmp_path: Path, repository: Repository, stamp: bool) -> None:
    """The merged directory has the metadata of upper."""
    items = {**EVERYTHING, **({".updated": etctrees.file()} if stamp else {})}
    etc = seed(tmp_path, repository, image(tree(items), mode=0o711), MountMode.OVERLAY)
    assert sorted(os.listdir(etc)) == ["upper", "work"]
    assert (etc / "upper").stat().st_mode & 0o777 == 0o711
    assert (etc / "work").stat().st_mode & 0o777 == 0o700
    assert snapshot(etc / "upper") == ({b".updated": etctrees.WHITEOUT} if stamp else {})


def test_what_is_there_is_replaced(tmp_path: Path, repository: Repository) -> None:
    make(tree({"old/x": etctrees.file("x")}), tmp_path / "deploy/etc")
    make(tree({"left": etctrees.file("by a crash")}), tmp_path / "deploy/.etc-seed")
    assert snapshot(seed(tmp_path, repository, image(tree(EVERYTHING)))) == tree(EVERYTHING)


def refused(
    tmp_path: Path, repository: Repository, etc: Directory, error: type[Exception], match: str
) -> None:
    """A seed fails, and leaves what was there."""
    make(tree({"old": etctrees.file("x")}), tmp_path / "deploy/etc")
    with deployment(tmp_path) as fd, pytest.raises(error, match=match):
        seed_etc(root_of(etc), repository, fd, MountMode.BIND, Silent())
    assert snapshot(tmp_path / "deploy") == tree({"etc/old": etctrees.file("x")})


def test_a_missing_object(tmp_path: Path, repository: Repository) -> None:
    root = image(tree({"x": etctrees.file(b"not stored" * 10)}))
    refused(tmp_path, repository, root, ObjectMissing, "is missing from the repository")


@pytest.mark.parametrize("kind", [External, ExternalNoVerity])
def test_an_object_that_is_wrong(
    tmp_path: Path, repository: Repository, kind: type[External | ExternalNoVerity]
) -> None:
    """The kernel does not check it in a repository without fs-verity: we do, before it is copied for good."""
    id_ = digest(Algorithm.SHA512, BIG)
    path = repository.path / "objects" / id_.pathname
    path.unlink()
    path.write_bytes(BIG[:-1] + b"!")
    root = image({})
    root.entries[b"x"] = Leaf(PLAIN, kind(id_, len(BIG)))
    refused(tmp_path, repository, root, VerityMismatch, "has content with the digest")


def test_a_tree_too_deep(tmp_path: Path, repository: Repository) -> None:
    root = image(tree({"/".join(["d"] * (trees.MAX_DEPTH + 2)): etctrees.directory()}))
    refused(tmp_path, repository, root, StorageError, "nested more than")


def test_a_sparse_file_too_large(tmp_path: Path, repository: Repository) -> None:
    root = image({})
    root.entries[b"x"] = Leaf(PLAIN, Sparse(1 << 40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a file system can hold differs; so does the limit for this process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, limits[1]))
    try:
        refused(tmp_path, repository, root, StorageError, "cannot write /etc of the deployment")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("etc", [None, Leaf(PLAIN, Sparse(0)), Leaf(PLAIN, CharDevice(0))])
def test_an_image_without_the_directory(tmp_path: Path, repository: Repository, etc: Leaf | None) -> None:
    root = Directory(PLAIN, {} if etc is None else {b"etc": etc, b"var": etc})
    with deployment(tmp_path) as fd:
        with pytest.raises(UnsupportedImage, match="the image has no directory /etc"):
            seed_etc(root, repository, fd, MountMode.BIND, Silent())
        with pytest.raises(UnsupportedImage, match="the image has no directory /var"):
            seed_var(root, repository, fd, Silent())
        assert os.listdir(fd) == []


def test_times_beyond_any_file_system(tmp_path: Path, repository: Repository) -> None:
    root = image({})
    root.entries[b"x"] = Leaf(PLAIN._replace(mtime=(1 << 63) - 1, nsec=999_999_999), Sparse(0))
    assert (seed(tmp_path, repository, root) / "x").stat().st_mtime > 1 << 32


def test_a_full_disk_is_told(tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "write_all", full)
    refused(tmp_path, repository, image(tree(EVERYTHING)), NoSpace, "cannot write /etc of the deployment")


# --- /var --------------------------------------------------------------------------------------------------


def test_var(tmp_path: Path, repository: Repository) -> None:
    root = root_of(image(tree(EVERYTHING), mode=0o751), b"var")
    with deployment(tmp_path) as fd:
        assert seed_var(root, repository, fd, Silent())
        assert os.listdir(fd) == ["var"]
        assert snapshot(tmp_path / "deploy/var") == tree(EVERYTHING)
        (tmp_path / "deploy/var/a").write_text("of the host")
        assert not seed_var(root, repository, fd, Silent()), "it is everybody's now"
        assert (tmp_path / "deploy/var/a").read_text() == "of the host"


def test_var_that_is_empty(tmp_path: Path, repository: Repository) -> None:
    make({}, tmp_path / "deploy/var")
    make(tree({"left": etctrees.file("by a crash")}), tmp_path / "deploy/.var-seed")
    with deployment(tmp_path) as fd:
        assert seed_var(root_of(image(tree(EVERYTHING)), b"var"), repository, fd, Silent())
        assert os.listdir(fd) == ["var"]
    assert snapshot(tmp_path / "deploy/var") == tree(EVERYTHING)


def test_var_that_is_a_link(tmp_path: Path, repository: Repository) -> None:
    make(tree({"var": etctrees.link("elsewhere")}), tmp_path / "deploy")
    with deployment(tmp_path) as fd, pytest.raises(StorageError, match="cannot read the shared /var"):
        seed_var(root_of(image({}), b"var"), repository, fd, Silent())
    assert (tmp_path / "deploy/var").is_symlink()


def test_how_much_it_takes(tmp_path: Path, repository: Repository) -> None:
    root = image(tree(EVERYTHING))
    etc = seed(tmp_path, repository, root)
    used = sum(path.lstat().st_blocks * 512 for path in (etc, *etc.rglob("*")))
    assert used <= seed_bytes(root) <= 3 * used
    assert seed_bytes(root, MountMode.TRANSIENT) < 20_000
