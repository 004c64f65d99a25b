"""Reads composefs images: which objects one names, the tree it was made from, whether its structure is sound.

Facts: composefs-rs 0.9, erofs reader.
"""

from __future__ import annotations

import stat as st
from typing import TYPE_CHECKING, Self

from hostimaged.composefs.bulk import no_gc
from hostimaged.composefs.erofs.format import BLOCK, LAYOUT_INLINE, PREFIX_TRUSTED, SLOT, STUB_NAMES, Format
from hostimaged.composefs.erofs.ondisk import Inode, RawImage, Walk, Xattr
from hostimaged.composefs.erofs.restore import ObjectNames, Restorer, is_escaped_whiteout
from hostimaged.composefs.erofs.xattrs import METACOPY, REDIRECT
from hostimaged.composefs.fsverity import Algorithm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.tree import Directory
    from hostimaged.ids import ObjectId


class Image:
    """A composefs image in memory.

    ``algorithm`` is the hash of the objects it names; ``name`` stands in messages. The constructor checks
    that it is a composefs image; the methods check what they read. All raise ``ErofsError``, in a time and
    with memory proportional to the size of the image, whatever is in it. ``data`` must not change meanwhile.
    """

    def __init__(self, data: Buffer, algorithm: Algorithm, *, name: str = "the image") -> None:
        self._raw = RawImage(data, name)
        self._names = ObjectNames(algorithm)

    @classmethod
    def detect(cls, data: Buffer, *, name: str = "the image") -> Self:
        """Open an image of unknown hash: that of the first digest in it, sha256 if there is none."""
        raw = RawImage(data, name)
        known = [(algorithm, ObjectNames(algorithm)) for algorithm in Algorithm]
        for _, xattrs in _inodes(raw, Walk(raw)):
            for prefix, suffix, value in xattrs:
                if prefix == PREFIX_TRUSTED and suffix == METACOPY:
                    for algorithm, names in known:
                        if names.in_metacopy(value) is not None:
                            return cls(data, algorithm, name=name)
        return cls(data, Algorithm.SHA256, name=name)

    @property
    def format(self) -> Format:
        """The format that the header names."""
        return self._raw.format

    def objects(self) -> set[ObjectId]:
        """Every object that the image needs, which is also what garbage collection must keep.

        Includes ``check``.
        """
        found: set[ObjectId] = set()
        for _, xattrs in self._checked_inodes():
            for prefix, suffix, value in xattrs:
                if prefix != PREFIX_TRUSTED:
                    continue
                if suffix == METACOPY:
                    object_id = self._names.in_metacopy(value)
                elif suffix == REDIRECT:
                    object_id = self._names.in_redirect(value)
                else:
                    continue
                if object_id is not None:
                    found.add(object_id)
        return found

    def check(self) -> None:
        """Check the structure of the whole image.

        V0 and V1: the root has the 256 stub names, there is no whiteout elsewhere, and no symbolic link is
        stored across a block boundary, which kernels before 6.12 refuse. V2: no escaped whiteouts.
        """
        for _ in self._checked_inodes():
            pass

    def tree(self) -> Directory:
        """The tree that the image was made from.

        What does not come back: some of overlayfs' own xattrs where the tree had them, whiteouts in the root
        with the name of a stub, and in V2 nanoseconds. Does not include ``check``.
        """
        with no_gc():
            return Restorer(self._raw, self._names).restore()

    def lazy_tree(self) -> Directory:
        """The tree, of which each part is read when it is looked at: see ``lazy``. Later reads may raise."""
        from hostimaged.composefs.erofs.lazy import LazyTree

        return LazyTree(self._raw, self._names).root()

    def _checked_inodes(self) -> Iterator[tuple[Inode, list[Xattr]]]:
        """Every inode with its xattrs, once, each checked."""
        epoch1 = self._raw.format is not Format.V2
        check = self._check_directory if epoch1 else None
        for inode, xattrs in _inodes(self._raw, Walk(self._raw), check):
            self._check_inode(inode, xattrs, epoch1)
            yield inode, xattrs

    def _check_directory(self, inode: Inode, entries: list[tuple[bytes, int]]) -> None:
        if inode.nid == self._raw.root_nid:
            if not STUB_NAMES.issubset(name for name, _ in entries):
                raise self._raw.error("lacks some of the 256 whiteouts in the root")
        elif any(_is_whiteout(*self._raw.mode_and_where(nid)) for _, nid in entries):
            raise self._raw.error("has a whiteout outside the root")

    def _check_inode(self, inode: Inode, xattrs: list[Xattr], epoch1: bool) -> None:
        if epoch1:
            if st.S_ISLNK(inode.mode) and inode.layout == LAYOUT_INLINE:
                tail = inode.size % BLOCK
                head = inode.tail_at - inode.nid * SLOT
                if tail and inode.nid * SLOT % BLOCK + head + tail > BLOCK:
                    raise self._raw.error("has a symbolic link across a block boundary")
        elif is_escaped_whiteout(inode, xattrs):
            raise self._raw.error("is of format V2 and has an escaped whiteout")


def possible_objects(data: bytes, algorithm: Algorithm, *, name: str = "the image") -> list[bytes]:
    """Every object that the image in ``data`` needs, in no order, some more than once, and perhaps others.

    Whatever looks like the name of an object is taken for one, wherever it stands: twenty times as fast as
    ``Image.objects``, for those who want to keep what is needed. Of the structure only the headers are
    checked; raises ``ErofsError``.
    """
    RawImage(data, name)
    return ObjectNames(algorithm).anywhere(data)


def _inodes(
    raw: RawImage, walk: Walk, check_directory: Callable[[Inode, list[tuple[bytes, int]]], None] | None = None
) -> Iterator[tuple[Inode, list[Xattr]]]:
    """Every inode that can be reached from the root, once, with its xattrs."""
    seen = {raw.root_nid}
    pending = [raw.root_nid]
    while pending:
        inode = walk.inode(pending.pop())
        yield inode, walk.xattrs(inode)
        if inode.is_directory:
            entries = list(walk.entries(inode))
            if check_directory is not None:
                check_directory(inode, entries)
            for name, nid in entries:
                if nid not in seen and name not in (b".", b".."):
                    seen.add(nid)
                    pending.append(nid)
        elif inode.nid == raw.root_nid:
            raise raw.error("has a root that is no directory")


def _is_whiteout(mode: int, where: int) -> bool:
    return st.S_ISCHR(mode) and not where
