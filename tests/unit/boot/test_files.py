"""Files of an image: the same from its tree and from a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing.dumps import materialise
from hostimaged.boot.files import DirectoryFiles, ImageFiles, TreeFiles, content_size, open_content
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import ObjectMissing, Repository, Verity
from hostimaged.composefs.tree import Directory, External, Fifo, Inline, Leaf, Sparse, Stat, Symlink
from hostimaged.errors import UnsupportedImage
from hostimaged.ids import ObjectId

BIG = b"big " * 1000


def stat(mode: int) -> Stat:
    return Stat(mode, os.getuid(), os.getgid(), 0, 0, {})


def leaf(content: Inline | External | Sparse | Symlink | Fifo) -> Leaf:
    return Leaf(stat(0o644), content)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(
        tmp_path / "repository", algorithm=Algorithm.SHA512, verity=Verity.OPPORTUNISTIC
    )
    with made:
        yield made


@pytest.fixture
def root(repository: Repository) -> Directory:
    links = {
        b"here": b"small",
        b"up": b"../../usr/lib/small",
        b"absolute": b"/usr/lib/small",
        b"above": b"../../../../usr/./lib//big",
        b"dangling": b"nothing",
        b"loop": b"loop",
        b"outside": b"/etc/hostname",
        b"chain": b"up",
    }
    lib: dict[bytes, Directory | Leaf] = {
        b"small": leaf(Inline(b"small")),
        b"big": leaf(External(repository.store_object(BIG).id, len(BIG))),
        b"pipe": leaf(Fifo()),
        b"\xff": leaf(Inline(b"")),
    }
    lib |= {name: leaf(Symlink(target)) for name, target in links.items()}
    usr = Directory(stat(0o755), {b"lib": Directory(stat(0o755), lib)})
    return Directory(stat(0o755), {b"usr": usr, b"lib": leaf(Symlink(b"usr/lib"))})


@pytest.fixture(params=["tree", "directory"])
def files(
    request: pytest.FixtureRequest, root: Directory, repository: Repository, tmp_path: Path
) -> ImageFiles:
    if request.param == "tree":
        return TreeFiles(root, repository)
    place = tmp_path / "root"
    lib = root.entries[b"usr"].entries[b"lib"].entries  # type: ignore[union-attr]
    kept = lib[b"big"]
    lib[b"big"] = leaf(Inline(BIG))
    place.mkdir()
    materialise(root, place)
    lib[b"big"] = kept
    return DirectoryFiles(place)


@pytest.mark.parametrize("name", ["small", "here", "up", "absolute", "chain", "./small", "../lib/small"])
@pytest.mark.parametrize("directory", ["/usr/lib", "/lib", "lib", "/../lib/"])
def test_reading(files: ImageFiles, name: str, directory: str) -> None:
    assert files.read(f"{directory}/{name}", 5) == b"small"


def test_large_files_and_limits(files: ImageFiles) -> None:
    assert files.read("/usr/lib/above", len(BIG)) == BIG
    with pytest.raises(UnsupportedImage, match="larger than 3999 bytes"):
        files.read("/usr/lib/big", len(BIG) - 1)
    with pytest.raises(UnsupportedImage, match="larger than 4 bytes"):
        files.read("/usr/lib/small", 4)


@pytest.mark.parametrize("path", ["/nothing", "/usr/nothing/x", "/usr/lib/dangling", "/usr/lib/small/x"])
def test_absent(files: ImageFiles, path: str) -> None:
    assert files.read(path, 5) is None
    assert files.open(path) is None


def test_nothing_outside_is_read(files: ImageFiles) -> None:
    assert files.read("/usr/lib/outside", 100) is None


@pytest.mark.parametrize("path", ["/usr", "/usr/lib/pipe", "/usr/lib/loop"])
def test_other_kinds(files: ImageFiles, path: str) -> None:
    for question in (lambda: files.read(path, 100), lambda: files.open(path)):
        with pytest.raises(UnsupportedImage, match=path):
            question()


def test_names(files: ImageFiles) -> None:
    assert files.names("/") == [b"lib", b"usr"]
    assert files.names("/lib")[0] == b"above"
    assert files.names("/lib")[-1] == b"\xff"
    assert files.names("/nothing") == []
    with pytest.raises(UnsupportedImage, match="/usr/lib/small"):
        files.names("/usr/lib/small")


def test_opening(files: ImageFiles) -> None:
    for name, content in (("small", b"small"), ("above", BIG)):
        fd = files.open(f"/lib/{name}")
        assert fd is not None
        with os.fdopen(fd, "rb") as file:
            assert file.read() == content


@pytest.mark.parametrize("path", ["/usr/lib/here", "/lib/small"])
def test_links_are_told_where_they_matter(root: Directory, repository: Repository, path: str) -> None:
    with pytest.raises(UnsupportedImage, match="a symbolic link"):
        TreeFiles(root, repository).read(path, 5, follow=False)
    with pytest.raises(UnsupportedImage, match="a file in place of a directory"):
        TreeFiles(root, repository).read("/usr/lib/small/x", 5, follow=False)
    assert TreeFiles(root, repository).read("/usr/lib/small", 5, follow=False) == b"small"
    assert TreeFiles(root, repository).read("/usr/nothing/x", 5, follow=False) is None


def test_a_missing_object(root: Directory, repository: Repository) -> None:
    root.entries[b"gone"] = leaf(External(ObjectId(bytes(64)), 100))
    with pytest.raises(ObjectMissing):
        TreeFiles(root, repository).read("/gone", 1000)
    with pytest.raises(ObjectMissing):
        TreeFiles(root, repository).open("/gone")


def test_content(repository: Repository) -> None:
    sparse = leaf(Sparse(1 << 40))
    assert content_size(sparse) == 1 << 40
    with os.fdopen(open_content(sparse, repository), "rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 40
        assert file.read(10) == bytes(10)
    assert content_size(leaf(Symlink(b"x"))) == 0
