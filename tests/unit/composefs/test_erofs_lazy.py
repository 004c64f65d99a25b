"""Looking up single files of an image gives what its whole tree has."""

from __future__ import annotations

import pytest

from hostimaged.composefs.erofs import ErofsError, Format, Image, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.tree import CharDevice, Directory, Inline, Leaf, Stat, Symlink, lookup, walk

STAT = Stat(0o755, 0, 0, 5, 0, {b"user.x": b"y"})


def directory(**entries: Directory | Leaf) -> Directory:
    return Directory(STAT, {name.encode(): node for name, node in entries.items()})


def tree() -> Directory:
    link = Leaf(STAT, Symlink(b"../a"))
    hard = Leaf(STAT, Inline(b"content"))
    deep = directory(a=hard, b=link, c=Leaf(STAT, CharDevice(0)), d=directory())
    return directory(etc=deep, usr=directory(lib=directory(x=hard)), ff=Leaf(STAT, Inline(b"no stub")))


@pytest.mark.parametrize("kind", Format)
def test_it_is_the_same_tree(kind: Format) -> None:
    image = Image(build(tree(), kind, Algorithm.SHA512), Algorithm.SHA512)
    whole, lazy = image.tree(), image.lazy_tree()
    paths = [path for path, _ in walk(whole)]
    assert [path for path, _ in walk(lazy)] == paths
    for path, node in walk(whole):
        found = lookup(image.lazy_tree(), path)
        assert found is not None
        assert found.stat == node.stat
        if isinstance(node, Leaf):
            assert isinstance(found, Leaf)
            assert found.content == node.content
        else:
            assert isinstance(found, Directory)
            assert set(found.entries) == set(node.entries)
            assert len(found.entries) == len(node.entries)


def test_what_is_asked_twice_is_the_same_node() -> None:
    root = Image(build(tree(), Format.V1, Algorithm.SHA512), Algorithm.SHA512).lazy_tree()
    etc = root.entries[b"etc"]
    assert isinstance(etc, Directory)
    assert root.entries.get(b"etc") is etc
    assert lookup(root, b"/usr/lib/x") is etc.entries[b"a"]
    assert root.entries.get(b"missing") is None
    assert b"missing" not in root.entries
    with pytest.raises(KeyError):
        root.entries[b"missing"]


def test_damage_elsewhere_is_not_looked_at() -> None:
    image = build(tree(), Format.V1, Algorithm.SHA512)
    at = image.rindex(b"../a")
    image[at : at + 4] = b"\0" * 4
    with pytest.raises(ErofsError):
        Image(image, Algorithm.SHA512).tree()
    root = Image(image, Algorithm.SHA512).lazy_tree()
    assert lookup(root, b"/etc/a") is not None
    with pytest.raises(ErofsError):
        lookup(root, b"/etc/b")


def refused(image: bytearray, path: bytes, message: str) -> None:
    """Both ways of reading say the same of a directory, the lazy one when that is looked at."""
    for look in (Image.tree, lambda opened: lookup(opened.lazy_tree(), path)):
        with pytest.raises(ErofsError, match=message):
            look(Image(image, Algorithm.SHA512))


@pytest.mark.parametrize("kind", Format)
def test_a_name_that_is_there_twice(kind: Format) -> None:
    entries = {name: Leaf(STAT, Inline(b"")) for name in ("name-one", "name-two")}
    image = build(directory(etc=directory(**entries), usr=directory()), kind, Algorithm.SHA512)
    at = image.index(b"name-two")
    image[at : at + 8] = b"name-one"
    refused(image, b"/etc/name-one", "name twice")
    assert lookup(Image(image, Algorithm.SHA512).lazy_tree(), b"/usr") is not None


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize("name", [b".", b".."])
def test_a_directory_that_does_not_know_itself(kind: Format, name: bytes) -> None:
    image = build(directory(etc=directory(unique_name=Leaf(STAT, Inline(b"")))), kind, Algorithm.SHA512)
    # The names of a directory follow each other: ".", "..", then the others.
    at = image.index(b"...unique_name")
    image[at : at + 3] = b".x." if name == b".." else b"x.."
    refused(image, b"/etc/unique_name", "wrong entries")


@pytest.mark.parametrize("kind", Format)
def test_what_is_named_as_a_stub_is_read_as_any(kind: Format) -> None:
    """A directory that is nearly all of the image: the bound on what is read once counts it once."""
    names = {f"{n:0200}": Leaf(STAT, Inline(b"")) for n in range(1000)}
    image = Image(build(directory(ff=directory(**names)), kind, Algorithm.SHA512), Algorithm.SHA512)
    for root in (image.tree(), image.lazy_tree()):
        found = lookup(root, b"/ff")
        assert isinstance(found, Directory)
        assert len(list(found.entries.values())) == 1000
