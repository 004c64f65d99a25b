"""Bound images of an image: links to units inside it, whatever an image puts there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.composefs.erofs import Format, Image, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, External, Fifo, Inline, Leaf, Node, Stat, Symlink
from hostimaged.errors import UnsupportedImage
from hostimaged.host import boundimages
from hostimaged.host.boundimages import MAX_IMAGES, BoundImage, BoundImageError

STAT = Stat(0o755, 0, 0, 0, 0, {})
UNITS = "usr/share/containers/systemd"
APP = "quay.io/foo/foo:latest"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(
        tmp_path / "repository", algorithm=Algorithm.SHA512, verity=Verity.OPPORTUNISTIC
    )
    with made:
        yield made


def tree(nodes: dict[str, bytes | str | Node]) -> Directory:
    """A tree: bytes are a file, text the target of a link."""
    root = Directory(STAT, {})
    for path, content in nodes.items():
        *parents, name = path.encode().split(b"/")
        directory = root
        for parent in parents:
            below = directory.entries.setdefault(parent, Directory(STAT, {}))
            assert isinstance(below, Directory)
            directory = below
        if isinstance(content, bytes):
            content = Leaf(STAT, Inline(content))
        elif isinstance(content, str):
            content = Leaf(STAT, Symlink(content.encode()))
        directory.entries[name] = content
    return root


def bound(name: str, target: str = f"/{UNITS}/app.image") -> dict[str, bytes | str | Node]:
    return {
        f"{UNITS}/app.image": f"[Image]\nImage={APP}\n".encode(),
        f"{boundimages.DIRECTORY}/{name}": target,
    }


def test_links_within_the_image(repository: Repository) -> None:
    large = b"[Container]\n" + b"# why\n" * 100 + b"Image=docker://registry.example/b@sha256:" + b"1" * 64
    stored = External(repository.store_object(large).id, len(large))
    root = tree(
        {
            **bound("a.image"),
            f"{boundimages.DIRECTORY}/b.container": "../../../share/containers/systemd/b.container",
            f"{UNITS}/b.container": Leaf(STAT, stored),
            f"{boundimages.DIRECTORY}/c.image": "/units/one",
            "units": UNITS,
            f"{UNITS}/one": "../../../../../../etc/two",
            "etc/two": b"[Image]\nImage=busybox\n",
            # The same image once more.
            f"{boundimages.DIRECTORY}/d.image": "a.image",
        }
    )
    expected = (
        BoundImage("a.image", APP),
        BoundImage("b.container", "registry.example/b@sha256:" + "1" * 64),
        BoundImage("c.image", "busybox"),
    )
    assert boundimages.read(root, repository) == expected
    # The same through an image.
    image = Image(memoryview(bytes(build(root, Format.V1, Algorithm.SHA512))), Algorithm.SHA512)
    assert boundimages.read(image.lazy_tree(), repository) == expected


@pytest.mark.parametrize(
    "nodes", [{}, {boundimages.DIRECTORY: Directory(STAT, {})}, {"usr": b"no directory"}]
)
def test_none(repository: Repository, nodes: dict[str, bytes | str | Node]) -> None:
    assert boundimages.read(tree(nodes), repository) == ()


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ({f"{boundimages.DIRECTORY}/a.image": b"[Image]\nImage=x\n"}, "a.image: not a symbolic link"),
        ({f"{boundimages.DIRECTORY}/a.image": Directory(STAT, {})}, "a.image: not a symbolic link"),
        ({f"{boundimages.DIRECTORY}/a.image": Leaf(STAT, Fifo())}, "a.image: not a symbolic link"),
        (bound("a.image", "nowhere"), "a.image: the file that it leads to is not in the image"),
        (bound("a.image", f"/{UNITS}"), "a.image of the image: not a regular file"),
        (bound("a.image", "a.image"), "a.image of the image: too many symbolic links"),
        (bound("a.txt"), "a.txt: its name ends in neither"),
        (bound("a.container"), r"a.container: it has no Image= in \[Container\]"),
        (
            bound("a.image") | {f"{UNITS}/app.image": b"[Image]\nImage=oci:/etc\n"},
            "a.image: Image=oci:/etc names no image of a registry",
        ),
        (
            bound("a.image") | {f"{UNITS}/app.image": b"[Image]\nImage=containers-storage:localhost/x\n"},
            "names no image of a registry",
        ),
        (
            bound("a.image") | {f"{UNITS}/app.image": b"[Image]\nImage=--root=/\n"},
            "names no image of a registry",
        ),
        (
            bound("a.image") | {f"{UNITS}/app.image": b"[Image]\nImage=quay.io/" + b"a" * 600 + b"\n"},
            "longer than 512 characters",
        ),
        (
            {f"{boundimages.DIRECTORY}/{at}.image": "x" for at in range(MAX_IMAGES + 1)},
            "more than 256 images",
        ),
        ({boundimages.DIRECTORY: b"a file"}, "bound-images.d of the image: not a directory"),
    ],
)
def test_what_is_refused_is_named(
    repository: Repository, nodes: dict[str, bytes | str | Node], problem: str
) -> None:
    with pytest.raises(UnsupportedImage, match=problem) as raised:
        boundimages.read(tree(nodes), repository)
    assert "/usr/lib/bootc/bound-images.d" in raised.value.message.replace("usr", "/usr").replace("//", "/")


def test_a_name_that_is_no_text(repository: Repository) -> None:
    root = tree(bound("a.image"))
    node: Node = root
    for name in boundimages.DIRECTORY.encode().split(b"/"):
        assert isinstance(node, Directory)
        node = node.entries[name]
    assert isinstance(node, Directory)
    node.entries[b"\xff\x1b.image"] = node.entries[b"a.image"]
    with pytest.raises(BoundImageError, match=r"\\xff\\x1b.image: its name is not UTF-8"):
        boundimages.read(root, repository)


def test_a_tag_beside_a_digest_does_not_count(repository: Repository) -> None:
    """podman pulls it; registries could not be asked for both."""
    digest = "sha256:" + "2" * 64
    unit = f"[Image]\nImage=quay.io/x/y:1@{digest}\n".encode()
    (image,) = boundimages.read(tree(bound("a.image") | {f"{UNITS}/app.image": unit}), repository)
    assert image.name.normal == f"quay.io/x/y@{digest}"
    assert image.name.digest == digest
