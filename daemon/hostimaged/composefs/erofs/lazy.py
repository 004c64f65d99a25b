"""The tree of an image of which only a few files are wanted: a directory is read when it is asked for.

For a path or two that is a thousand times faster than the whole tree. What is read is checked as ever; what
is wrong with the rest is not seen, and neither are link counts, so that a hostile image may have directories
in a circle: a lazy tree is for looking up, not for walking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hostimaged.composefs.erofs.restore import Restorer, is_whiteout
from hostimaged.composefs.tree import CharDevice, Directory, Leaf

if TYPE_CHECKING:
    from collections.abc import ItemsView, Iterator, KeysView, ValuesView

    from hostimaged.composefs.erofs.ondisk import RawImage
    from hostimaged.composefs.erofs.restore import ObjectNames

_T = TypeVar("_T")


class LazyTree(Restorer):
    """Directories and leaves of an image, each made once, when it is first looked at."""

    def __init__(self, raw: RawImage, names: ObjectNames) -> None:
        super().__init__(raw, names)
        self._nodes: dict[int, Directory | Leaf] = {}

    def root(self) -> Directory:
        """The root; its ``entries``, and those of all below it, are dictionaries that fill themselves."""
        node = self.node(self._raw.root_nid)
        if not isinstance(node, Directory):
            raise self._raw.error("has a root that is no directory")
        return node

    def node(self, nid: int) -> Directory | Leaf:
        """The node with the number ``nid``. Raises ``ErofsError``."""
        known = self._nodes.get(nid)
        if known is not None:
            return known
        inode = self._walk.inode(nid)
        xattrs = self._walk.xattrs(inode)
        stat = self._stat(inode, xattrs)
        node: Directory | Leaf
        if inode.is_directory:
            nids = self.checked_entries(inode)
            del nids[b".."]
            if nid == self._raw.root_nid:
                nids = {name: below for name, below in nids.items() if not self.is_stub(nid, name, below)}
            node = Directory(stat, _Entries(self, nids))
        elif is_whiteout(inode, xattrs):
            node = Leaf(stat, CharDevice(0))
        else:
            node = Leaf(stat, self._content(inode, xattrs))
        self._nodes[nid] = node
        return node


class _Entries(dict[bytes, Directory | Leaf]):
    """Entries of a directory that become nodes when they are looked at."""

    __slots__ = ("_nids", "_tree")

    def __init__(self, tree: LazyTree, nids: dict[bytes, int]) -> None:
        super().__init__()
        self._tree = tree
        self._nids = nids

    def __missing__(self, name: bytes) -> Directory | Leaf:
        node = self[name] = self._tree.node(self._nids[name])
        return node

    def get(self, name: bytes, default: _T | None = None) -> Directory | Leaf | _T | None:  # type: ignore[override]
        return self[name] if name in self._nids else default

    def __contains__(self, name: object) -> bool:
        return name in self._nids

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._nids)

    def __len__(self) -> int:
        return len(self._nids)

    def keys(self) -> KeysView[bytes]:  # type: ignore[override]
        return self._whole().keys()

    def values(self) -> ValuesView[Directory | Leaf]:  # type: ignore[override]
        return self._whole().values()

    def items(self) -> ItemsView[bytes, Directory | Leaf]:  # type: ignore[override]
        return self._whole().items()

    def _whole(self) -> dict[bytes, Directory | Leaf]:
        return {name: self[name] for name in self._nids}
