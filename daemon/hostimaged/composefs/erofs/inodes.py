"""The inodes of an image being written: which there are, and in which order.

V0 and V1 number them breadth first, add 256 stub whiteouts to the root (they hide the directories of the
object store when that is a data layer of an overlay), and escape the tree's own whiteouts. V2 numbers them
depth first and changes nothing. Facts: composefs-rs 0.9, erofs writer.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from hostimaged.composefs.erofs import xattrs as xa
from hostimaged.composefs.erofs.format import (
    MAX_DEPTH,
    MAX_NAME,
    STUB_NAMES,
    FileType,
    Format,
    UnsupportedTree,
)
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Content,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Leaf,
    Node,
    Socket,
    Sparse,
    Stat,
    Symlink,
    link_counts,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hostimaged.ids import ObjectId

_FILE_TYPES: Final[dict[type, tuple[FileType, xa.Overlay]]] = {
    Inline: (FileType.REGULAR, xa.Overlay.NONE),
    External: (FileType.REGULAR, xa.Overlay.VERITY),
    ExternalNoVerity: (FileType.REGULAR, xa.Overlay.NO_VERITY),
    Sparse: (FileType.REGULAR, xa.Overlay.SPARSE),
    CharDevice: (FileType.CHAR, xa.Overlay.NONE),
    BlockDevice: (FileType.BLOCK, xa.Overlay.NONE),
    Fifo: (FileType.FIFO, xa.Overlay.NONE),
    Socket: (FileType.SOCKET, xa.Overlay.NONE),
    Symlink: (FileType.SYMLINK, xa.Overlay.NONE),
}

_WITH_OBJECT: Final = (External, ExternalNoVerity)

_SELINUX: Final = b"security.selinux"
_STUB_MODE: Final = 0o644


class Inode:
    """An inode of the image. Fields after ``children`` are set when its place is found."""

    __slots__ = (
        "blocks", "children", "content", "extended", "file_type", "group", "index", "layout", "names",
        "nlink", "object_id", "offset", "size", "stat", "tail", "variant",
    )  # fmt: skip

    def __init__(self, file_type: FileType, stat: Stat, nlink: int, content: Content | None) -> None:
        self.file_type = file_type
        self.stat = stat
        self.nlink = nlink
        #: None for a directory and for an escaped whiteout.
        self.content = content
        self.object_id: ObjectId | None = None
        #: Directories: names and inodes of all entries, ``.`` and ``..`` included, in the order of names.
        self.names: Sequence[bytes] = ()
        self.children: Sequence[Inode] = ()
        self.index = -1
        self.group: xa.Group
        self.variant: xa.Variant
        self.size = 0
        self.layout = 0
        #: Data blocks outside the inode, and bytes of data in it.
        self.blocks = 0
        self.tail = 0
        self.extended = False
        self.offset = 0


def collect(root: Directory, image_format: Format, table: xa.XattrTable) -> list[Inode]:
    """The inodes in the order of the image, the root's first, each counted in ``table``.

    Raises ``UnsupportedTree``.
    """
    links = {leaf: count for leaf, count in link_counts(root).items() if count > 1}
    if any(isinstance(leaf.content, CharDevice) and not leaf.content.rdev for leaf in links):
        raise UnsupportedTree("a whiteout has hard links")
    collector = _Collector(root, image_format, table, links)
    if image_format is Format.V2:
        collector.depth_first()
    else:
        collector.breadth_first()
    return collector.inodes


class _Open(NamedTuple):
    """A directory being gone through."""

    inode: Inode
    parent: Inode
    entries: Iterator[tuple[bytes, Node]]
    names: list[bytes]
    children: list[Inode]


class _Collector:
    def __init__(
        self, root: Directory, image_format: Format, table: xa.XattrTable, links: dict[Leaf, int]
    ) -> None:
        self.inodes: list[Inode] = []
        self._root = root
        self._format = image_format
        self._table = table
        # The leaves with several names, how many those are, and their inodes.
        self._links = links
        self._linked: dict[Leaf, Inode] = {}

    def _directory(self, directory: Directory) -> Inode:
        inode = Inode(FileType.DIRECTORY, directory.stat, 2, None)
        inode.index = len(self.inodes)
        self.inodes.append(inode)
        return inode

    def _count(self, inode: Inode, appended: xa.Pairs = ()) -> None:
        inode.group = self._table.group(inode.stat.xattrs, appended, xa.Overlay.NONE, None)

    def _new_leaf(self, leaf: Leaf, nlink: int) -> Inode:
        content = leaf.content
        file_type, overlay = _FILE_TYPES[type(content)]
        inode = Inode(file_type, leaf.stat, nlink, content)
        if isinstance(content, _WITH_OBJECT):
            inode.object_id = content.id
        inode.group = self._table.group(leaf.stat.xattrs, (), overlay, inode.object_id)
        return inode

    def _append(self, inode: Inode) -> Inode:
        inode.index = len(self.inodes)
        self.inodes.append(inode)
        return inode

    def depth_first(self) -> None:
        """Collect in the order of V2: each directory, then its children by name, entering them when met."""
        root = self._enter(self._root, None)
        stack = [root]
        while stack:
            at = stack[-1]
            for name, node in at.entries:
                at.names.append(name)
                if isinstance(node, Directory):
                    below = self._enter(node, at)
                    at.children.append(below.inode)
                    stack.append(below)
                    _check_depth(len(stack) - 1)
                    break
                nlink = self._links.get(node, 1)
                at.children.append(
                    self._hard_link(node, nlink, True) if nlink > 1 else self._append(self._new_leaf(node, 1))
                )
            else:
                stack.pop()
                _fill(at.inode, at.parent, at.names, at.children)

    def _enter(self, directory: Directory, above: _Open | None) -> _Open:
        inode = self._directory(directory)
        self._count(inode)
        entries = iter(_sorted_entries(directory.entries))
        return _Open(inode, inode if above is None else above.inode, entries, [], [])

    def breadth_first(self) -> None:
        """Collect in the order of V0 and V1, with stubs, and with the tree's whiteouts escaped."""
        root_entries, stubs = _with_stubs(self._root)
        homes = self._canonical_directories(root_entries)
        root = self._directory(self._root)
        queue = deque([(self._root, root, root, root_entries, 0)])
        while queue:
            directory, inode, parent, entries, depth = queue.popleft()
            _check_depth(depth)
            names: list[bytes] = []
            children: list[Inode] = []
            whiteouts = False
            for name, node in entries:
                names.append(name)
                if isinstance(node, Directory):
                    child = self._directory(node)
                    queue.append((node, child, inode, _sorted_entries(node.entries), depth + 1))
                elif (nlink := self._links.get(node, 1)) > 1:
                    child = self._hard_link(node, nlink, homes[node] is directory)
                elif (
                    type(node.content) is CharDevice
                    and not node.content.rdev
                    and not (
                        inode is root and (node in stubs or _like_stub(name, node.stat, self._root.stat))
                    )
                ):
                    child = self._append(self._escaped_whiteout(node))
                    whiteouts = True
                else:
                    child = self._append(self._new_leaf(node, 1))
                children.append(child)
            _fill(inode, parent, names, children)
            appended = self._whiteouts_inside() if whiteouts else ()
            if inode is root:
                appended += xa.ROOT_OPAQUE
            self._count(inode, appended)

    def _whiteouts_inside(self) -> xa.Pairs:
        return xa.WHITEOUTS + xa.OPAQUE_X if self._format is Format.V1 else xa.WHITEOUTS

    def _escaped_whiteout(self, leaf: Leaf) -> Inode:
        inode = Inode(FileType.REGULAR, leaf.stat, 1, None)
        self._count(inode, xa.WHITEOUT)
        return inode

    def _hard_link(self, leaf: Leaf, nlink: int, at_home: bool) -> Inode:
        """The inode of a leaf with several names; its place in the order is in its canonical directory."""
        inode = self._linked.get(leaf)
        if inode is None:
            inode = self._linked[leaf] = self._new_leaf(leaf, nlink)
        if at_home and inode.index < 0:
            self._append(inode)
        return inode

    def _canonical_directories(self, root_entries: list[tuple[bytes, Node]]) -> dict[Leaf, Directory]:
        """For each leaf with several names the directory of the first, depth first."""
        homes: dict[Leaf, Directory] = {}
        if not self._links:
            return homes
        stack = [(self._root, iter(root_entries))]
        while stack:
            directory, entries = stack[-1]
            for _, node in entries:
                if isinstance(node, Directory):
                    stack.append((node, iter(_sorted_entries(node.entries))))
                    break
                if self._links.get(node, 1) > 1:
                    homes.setdefault(node, directory)
            else:
                stack.pop()
        return homes


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UnsupportedTree(f"directories are nested deeper than {MAX_DEPTH}")


def _sorted_entries(entries: dict[bytes, Node]) -> list[tuple[bytes, Node]]:
    # Names are unique, so nodes are never compared.
    return sorted(entries.items())


def _fill(inode: Inode, parent: Inode, names: list[bytes], children: list[Inode]) -> None:
    """Give a directory its entries, with ``.`` and ``..`` put where the order of names wants them."""
    for name, target in ((b".", inode), (b"..", parent)):
        at = 0
        while at < len(names) and names[at] < name:
            at += 1
        names.insert(at, name)
        children.insert(at, target)
    if max(map(len, names)) > MAX_NAME:
        raise UnsupportedTree(f"a name is longer than {MAX_NAME} bytes")
    inode.names = names
    inode.children = children
    inode.nlink = sum([child.file_type is FileType.DIRECTORY for child in children])


def _with_stubs(root: Directory) -> tuple[list[tuple[bytes, Node]], set[Leaf]]:
    """The entries of the root with a whiteout under each of the 256 names that is free, and these."""
    stat = root.stat
    label = stat.xattrs.get(_SELINUX)
    stub_stat = stat._replace(mode=_STUB_MODE, xattrs={} if label is None else {_SELINUX: label})
    stubs = {name: Leaf(stub_stat, CharDevice(0)) for name in sorted(STUB_NAMES) if name not in root.entries}
    return _sorted_entries({**root.entries, **stubs}), set(stubs.values())


def _like_stub(name: bytes, stat: Stat, root: Stat) -> bool:
    """Whether a whiteout of the tree in the root cannot be told from a stub, and is treated as one."""
    if name not in STUB_NAMES or stat.mode != _STUB_MODE or stat[1:5] != root[1:5]:
        return False
    label = root.xattrs.get(_SELINUX)
    return stat.xattrs == ({} if label is None else {_SELINUX: label})
