"""Reads composefs images: which objects one names, the tree it was made from, whether its structure is sound.

Facts: composefs-rs 0.9, erofs reader.
"""

from __future__ import annotations

import stat as st
from typing import TYPE_CHECKING

from hostimaged.composefs.bulk import no_gc
from hostimaged.composefs.erofs.format import BLOCK, LAYOUT_INLINE, PREFIX_TRUSTED, SLOT, STUB_NAMES, Format
from hostimaged.composefs.erofs.ondisk import Inode, RawImage, Walk, Xattr
from hostimaged.composefs.erofs.restore import ObjectNames, Restorer, is_escaped_whiteout
from hostimaged.composefs.erofs.xattrs import METACOPY, REDIRECT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.fsverity import Algorithm, Buffer
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

    def _checked_inodes(self) -> Iterator[tuple[Inode, list[Xattr]]]:
        """Every inode with its xattrs, once, each checked."""
        raw, walk = self._raw, Walk(self._raw)
        epoch1 = raw.format is not Format.V2
        seen = {raw.root_nid}
        pending = [raw.root_nid]
        while pending:
            inode = walk.inode(pending.pop())
            xattrs = walk.xattrs(inode)
            self._check_inode(inode, xattrs, epoch1)
            yield inode, xattrs
            if inode.nid == raw.root_nid and not inode.is_directory:
                raise raw.error("has a root that is no directory")
            if not inode.is_directory:
                continue
            names = set()
            for name, nid in walk.entries(inode):
                if name in (b".", b".."):
                    continue
                if epoch1:
                    if inode.nid == raw.root_nid:
                        names.add(name)
                    elif _is_whiteout(*raw.mode_and_where(nid)):
                        raise raw.error("has a whiteout outside the root")
                if nid not in seen:
                    seen.add(nid)
                    pending.append(nid)
            if epoch1 and inode.nid == raw.root_nid and not names >= STUB_NAMES:
                raise raw.error("lacks some of the 256 whiteouts in the root")

    def _check_inode(self, inode: Inode, xattrs: list[Xattr], epoch1: bool) -> None:
        if epoch1:
            if st.S_ISLNK(inode.mode) and inode.layout == LAYOUT_INLINE:
                tail = inode.size % BLOCK
                head = inode.tail_at - inode.nid * SLOT
                if tail and inode.nid * SLOT % BLOCK + head + tail > BLOCK:
                    raise self._raw.error("has a symbolic link across a block boundary")
        elif is_escaped_whiteout(inode, xattrs):
            raise self._raw.error("is of format V2 and has an escaped whiteout")


def _is_whiteout(mode: int, where: int) -> bool:
    return st.S_ISCHR(mode) and not where
