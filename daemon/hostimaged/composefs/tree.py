"""The tree: what a composefs image describes, in memory.

A tree is its root ``Directory``. A hard link is one ``Leaf`` object under several names; link counts are
computed, never stored. Nothing here resolves symbolic links. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.ids import ObjectId

#: The bits of ``Stat.mode`` that mean something.
PERMISSION_MASK: Final = 0o7777


class Stat(NamedTuple):
    """Metadata of an inode; a value, shared freely.

    ``mode`` has the 12 permission bits; type bits that a source left in it are kept and ignored. ``mtime`` is
    in seconds, ``nsec`` its nanoseconds. ``xattrs`` maps full names to values, and is never changed in place.
    """

    mode: int
    uid: int
    gid: int
    mtime: int
    nsec: int
    xattrs: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Inline:
    """Regular file whose content is in the image."""

    data: bytes


@dataclass(frozen=True, slots=True)
class External:
    """Regular file whose content is the object ``id``, verified by its digest when it is opened."""

    id: ObjectId
    size: int


@dataclass(frozen=True, slots=True)
class ExternalNoVerity:
    """Regular file whose content is the object ``id``, not verified."""

    id: ObjectId
    size: int


@dataclass(frozen=True, slots=True)
class Sparse:
    """Regular file of ``size`` zero bytes without an object."""

    size: int


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """Block device; ``rdev`` in the encoding of ``makedev``."""

    rdev: int


@dataclass(frozen=True, slots=True)
class CharDevice:
    """Character device; ``rdev`` in the encoding of ``makedev``. 0 is a whiteout of overlayfs."""

    rdev: int


@dataclass(frozen=True, slots=True)
class Fifo:
    """Named pipe."""


@dataclass(frozen=True, slots=True)
class Socket:
    """Unix socket."""


@dataclass(frozen=True, slots=True)
class Symlink:
    """Symbolic link."""

    target: bytes


Content: TypeAlias = (
    Inline | External | ExternalNoVerity | Sparse | BlockDevice | CharDevice | Fifo | Socket | Symlink
)


@dataclass(eq=False, slots=True)
class Leaf:
    """Anything but a directory. Compared by identity: one object is one inode."""

    stat: Stat
    content: Content


@dataclass(eq=False, slots=True)
class Directory:
    """A directory with its entries by name, in no order. Compared by identity."""

    stat: Stat
    entries: dict[bytes, Directory | Leaf]


Node: TypeAlias = Directory | Leaf


def makedev(major: int, minor: int) -> int:
    """A device number as the C library encodes it (64 bits; Linux has 12 bits of major, 20 of minor)."""
    return (minor & 0xFF) | ((major & 0xFFF) << 8) | ((minor & ~0xFF) << 12) | ((major & ~0xFFF) << 32)


def walk(root: Directory) -> Iterator[tuple[bytes, Node]]:
    """Every name in the tree as (absolute path, node), depth first, each directory before its children.

    Children come in the order of their names' bytes. A hard-linked leaf comes once for each name.
    """
    yield b"/", root
    stack = [(b"/", iter(sorted(root.entries.items())))]
    while stack:
        prefix, children = stack[-1]
        for name, node in children:
            path = prefix + name
            yield path, node
            if isinstance(node, Directory):
                stack.append((path + b"/", iter(sorted(node.entries.items()))))
                break
        else:
            stack.pop()


def link_counts(root: Directory) -> dict[Leaf, int]:
    """How many names each leaf has."""
    counts: dict[Leaf, int] = {}
    pending = [root]
    while pending:
        for node in pending.pop().entries.values():
            if isinstance(node, Directory):
                pending.append(node)
            else:
                counts[node] = counts.get(node, 0) + 1
    return counts


def lookup(root: Directory, path: bytes) -> Node | None:
    """The node at ``path`` (leading, trailing and double slashes do not matter), or None.

    ``.`` and ``..`` have no meaning, and symbolic links are not followed.
    """
    node: Node = root
    for name in path.split(b"/"):
        if not name:
            continue
        if not isinstance(node, Directory):
            return None
        child = node.entries.get(name)
        if child is None:
            return None
        node = child
    return node
