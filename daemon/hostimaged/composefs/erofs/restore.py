"""From a composefs image back to its tree: undoes what the writer does to names and whiteouts.

Facts: composefs-rs 0.9, erofs reader.
"""

from __future__ import annotations

import re
import stat as st
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from hostimaged.composefs.erofs.format import (
    LAYOUT_CHUNKED,
    MAX_DEPTH,
    PREFIX_TRUSTED,
    V2_MAX_INLINE,
    V2_MAX_SYMLINK,
    Format,
)
from hostimaged.composefs.erofs.ondisk import Inode, RawImage, Walk, Xattr
from hostimaged.composefs.erofs.xattrs import METACOPY, REDIRECT
from hostimaged.composefs.fsverity import FsVerityError, parse_pathname
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
    Socket,
    Sparse,
    Stat,
    Symlink,
)
from hostimaged.ids import ObjectId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.fsverity import Algorithm

_OVERLAY: Final = b"trusted.overlay."
_ESCAPED: Final = b"trusted.overlay.overlay."
_WHITEOUT: Final = _ESCAPED + b"whiteout"
#: What the writer adds, and the same names given by a user: neither comes back.
_DROPPED: Final = frozenset(
    _OVERLAY + name
    for name in (b"metacopy", b"redirect", b"overlay.whiteout", b"overlay.whiteouts", b"overlay.opaque")
) | {b"user.overlay.whiteout", b"user.overlay.whiteouts", b"user.overlay.opaque"}
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")
_STUB_LENGTH: Final = 2


def is_escaped_whiteout(inode: Inode, xattrs: list[Xattr]) -> bool:
    """Whether the inode stands for a whiteout of the tree, in V0 and V1."""
    return st.S_ISREG(inode.mode) and any(
        xattr.suffix.endswith(b"whiteout") and xattr.name == _WHITEOUT for xattr in xattrs
    )


def is_whiteout(inode: Inode, xattrs: list[Xattr]) -> bool:
    """Whether the inode stands for a whiteout of the tree, or is one of the image's own."""
    return inode.is_whiteout or is_escaped_whiteout(inode, xattrs)


class ObjectNames:
    """How xattrs of an image name objects."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._length = 4 + algorithm.digest_size
        self._head = bytes((0, self._length, 0, algorithm.kernel_id))

    def in_metacopy(self, value: bytes) -> ObjectId | None:
        """The digest in a value of ``trusted.overlay.metacopy``, None if it is not of the right form."""
        if len(value) == self._length and value.startswith(self._head):
            return ObjectId(value[4:])
        return None

    def in_redirect(self, value: bytes) -> ObjectId | None:
        """The object in a value of ``trusted.overlay.redirect``, None if it is not of the right form."""
        try:
            return parse_pathname(self._algorithm, value.removeprefix(b"/"))
        except FsVerityError:
            return None

    def anywhere(self, data: bytes) -> list[bytes]:
        """The digest in whatever could be such a value, anywhere in ``data``."""
        found: list[bytes] = []
        head, size = self._head, self._algorithm.digest_size
        at = data.find(head)
        while at >= 0:
            start = at + len(head)
            if start + size <= len(data):
                found.append(data[start : start + size])
            # What looks like a head may be part of a value: the next may begin anywhere.
            at = data.find(head, at + 1)
        for match in re.finditer(rb"/[0-9a-fA-F]{%d}" % (2 * size - 2), data):
            with suppress(FsVerityError):
                found.append(parse_pathname(self._algorithm, data[max(match.start() - 2, 0) : match.end()]))
        return found


class _Open(NamedTuple):
    """A directory being read."""

    nid: int
    nlink: int
    directory: Directory
    subdirectories: list[int]
    entries: Iterator[tuple[bytes, int]]


class Restorer:
    """Makes the tree of one image."""

    def __init__(self, raw: RawImage, names: ObjectNames) -> None:
        self._raw = raw
        self._names = names
        self._walk = Walk(raw)
        self._directories: set[int] = set()
        # By nid: the leaf, its link count in the image, and the names seen.
        self._leaves: dict[int, tuple[Leaf, int]] = {}
        self._seen: dict[int, int] = {}
        self._xattr_sets: dict[tuple[tuple[bytes, bytes], ...], dict[bytes, bytes]] = {}

    def restore(self) -> Directory:
        """The root of the tree. Raises ``ErofsError``."""
        raw = self._raw
        root_inode = self._walk.inode(raw.root_nid)
        if not root_inode.is_directory:
            raise raw.error("has a root that is no directory")
        top = self._open(root_inode, self._walk.xattrs(root_inode), raw.root_nid)
        stack = [top]
        while stack:
            at = stack[-1]
            for name, nid in at.entries:
                below = self._entry(at, name, nid)
                if below is not None:
                    if len(stack) > MAX_DEPTH:
                        raise raw.error(f"has directories nested deeper than {MAX_DEPTH}")
                    stack.append(below)
                    break
            else:
                if at.nlink != 2 + len(at.subdirectories):
                    raise raw.error(f"has a wrong link count in directory {at.nid}")
                stack.pop()
        for nid, (_, nlink) in self._leaves.items():
            if self._seen[nid] != nlink:
                raise raw.error(f"has a wrong link count in inode {nid}")
        return top.directory

    def _open(self, inode: Inode, xattrs: list[Xattr], parent_nid: int) -> _Open:
        """A directory whose ``.`` and ``..`` were checked, with its other entries still to be read."""
        self._directories.add(inode.nid)
        found = self.checked_entries(inode)
        if found.pop(b"..") != parent_nid:
            raise self._raw.error(f"has wrong entries . and .. in directory {inode.nid}")
        directory = Directory(self._stat(inode, xattrs), {})
        return _Open(inode.nid, inode.nlink, directory, [], iter(found.items()))

    def checked_entries(self, inode: Inode) -> dict[bytes, int]:
        """Names and nids of a directory, ``..`` among them, but not ``.``, which was checked.

        Raises ``ErofsError``, for a name that is there twice too.
        """
        entries = list(self._walk.entries(inode))
        found = dict(entries)
        if len(found) != len(entries):
            raise self._raw.error(f"has a name twice in directory {inode.nid}")
        if found.pop(b".", None) != inode.nid or b".." not in found:
            raise self._raw.error(f"has wrong entries . and .. in directory {inode.nid}")
        return found

    def is_stub(self, parent_nid: int, name: bytes, nid: int) -> bool:
        """Whether an entry is one of the whiteouts that the writer puts into the root.

        The inode is looked at only if the name is that of one.
        """
        if parent_nid != self._raw.root_nid or len(name) != _STUB_LENGTH or not _HEX.issuperset(name):
            return False
        # Past the bound of the walk, which counts each inode once: what is no stub is read again.
        inode = self._raw.inode(nid)
        return inode.is_whiteout or is_escaped_whiteout(inode, self._walk.xattrs(inode))

    def _entry(self, at: _Open, name: bytes, nid: int) -> _Open | None:
        """Put one entry into the tree; a directory is returned to be gone through."""
        known = self._leaves.get(nid)
        if known is not None:
            self._seen[nid] += 1
            at.directory.entries[name] = known[0]
            return None
        if nid in self._directories:
            raise self._raw.error(f"has directory {nid} in two places")
        if self.is_stub(at.nid, name, nid):
            return None
        inode = self._walk.inode(nid)
        xattrs = self._walk.xattrs(inode)
        if inode.is_directory:
            below = self._open(inode, xattrs, at.nid)
            at.subdirectories.append(nid)
            at.directory.entries[name] = below.directory
            return below
        whiteout = is_whiteout(inode, xattrs)
        if whiteout and inode.nlink > 1:
            raise self._raw.error(f"has a whiteout with hard links, inode {nid}")
        content = CharDevice(0) if whiteout else self._content(inode, xattrs)
        leaf = Leaf(self._stat(inode, xattrs), content)
        self._leaves[nid] = leaf, inode.nlink
        self._seen[nid] = 1
        at.directory.entries[name] = leaf
        return None

    def _stat(self, inode: Inode, xattrs: list[Xattr]) -> Stat:
        kept = []
        for xattr in xattrs:
            name = xattr.name
            if name in _DROPPED:
                continue
            if name.startswith(_ESCAPED):
                name = _OVERLAY + name[len(_ESCAPED) :]
            elif name.startswith(_OVERLAY):
                continue
            kept.append((name, xattr.value))
        key = tuple(sorted(kept))
        shared = self._xattr_sets.get(key)
        if shared is None:
            # Of two with one name the last stored wins, as in composefs-rs.
            shared = self._xattr_sets[key] = dict(sorted(dict(kept).items()))
        sec, nsec = self._raw.build_time if inode.mtime is None else inode.mtime
        if nsec >= 1_000_000_000:
            raise self._raw.error(f"has an impossible time in inode {inode.nid}")
        return Stat(inode.mode & 0o7777, inode.uid, inode.gid, sec, nsec, shared)

    def _content(self, inode: Inode, xattrs: list[Xattr]) -> Content:
        kind = st.S_IFMT(inode.mode)
        if kind == st.S_IFREG:
            return self._regular(inode, xattrs)
        if kind == st.S_IFLNK:
            return self._symlink(inode)
        if kind == st.S_IFCHR:
            return CharDevice(inode.where)
        if kind == st.S_IFBLK:
            return BlockDevice(inode.where)
        if kind == st.S_IFIFO:
            return Fifo()
        if kind == st.S_IFSOCK:
            return Socket()
        raise self._raw.error(f"has inode {inode.nid} of an unknown type")

    def _regular(self, inode: Inode, xattrs: list[Xattr]) -> Content:
        redirect = None
        for prefix, suffix, value in xattrs:
            if prefix != PREFIX_TRUSTED:
                continue
            if suffix == METACOPY and value:
                object_id = self._names.in_metacopy(value)
                if object_id is None:
                    raise self._raw.error(f"has a damaged object name in inode {inode.nid}")
                return External(object_id, inode.size)
            if suffix == REDIRECT and redirect is None:
                redirect = self._names.in_redirect(value)
        if redirect is not None:
            return ExternalNoVerity(redirect, inode.size)
        if inode.layout == LAYOUT_CHUNKED:
            return Sparse(inode.size)
        if self._raw.format is Format.V2 and inode.size > V2_MAX_INLINE:
            raise self._raw.error(f"has a file of more than {V2_MAX_INLINE} bytes, inode {inode.nid}")
        return Inline(self._raw.content(inode))

    def _symlink(self, inode: Inode) -> Symlink:
        if self._raw.format is Format.V2 and inode.size > V2_MAX_SYMLINK:
            raise self._raw.error(
                f"has a symbolic link of more than {V2_MAX_SYMLINK} bytes, inode {inode.nid}"
            )
        target = self._raw.content(inode)
        if not target or b"\0" in target:
            raise self._raw.error(f"has a damaged symbolic link, inode {inode.nid}")
        return Symlink(target)
