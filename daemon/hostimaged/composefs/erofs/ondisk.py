"""Access to the structures of a composefs image: superblock, inodes, directory entries, xattrs, data.

Nothing here trusts a length, count or address of the image: every access is bounded by the buffer, and a
``Walk`` bounds the work of one traversal by the size of the image. Facts: EROFS on-disk format; composefs-rs
0.9, erofs reader.
"""

from __future__ import annotations

import stat as st
from typing import TYPE_CHECKING, Final, NamedTuple

from hostimaged.composefs.erofs.format import (
    BLOCK,
    BLOCK_BITS,
    COMPACT_INODE,
    COMPAT_MTIME,
    COMPAT_XATTR_FILTER,
    COMPOSEFS_HEADER,
    COMPOSEFS_MAGIC,
    DIRENT,
    EROFS_MAGIC,
    EXTENDED_INODE,
    HEADER_VERSION,
    LAYOUT_CHUNKED,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    MAX_IMAGE,
    MAX_NAME,
    SLOT,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_PREFIXES,
    ErofsError,
    Format,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.fsverity import Buffer

_COMPAT_KNOWN: Final = 1 | COMPAT_MTIME | COMPAT_XATTR_FILTER
_INCOMPAT_CHUNKED: Final = 4
#: Ours: some fifty times the entries of a large OS.
MAX_ENTRIES: Final = 1 << 22
_WORD: Final = 4


class Inode(NamedTuple):
    """An inode as found in the image. ``xattrs_at`` and ``tail_at`` are offsets in the image."""

    nid: int
    layout: int
    mode: int
    nlink: int
    size: int
    #: Block address, device number or chunk format.
    where: int
    uid: int
    gid: int
    #: Seconds and nanoseconds; None if it is the build time of the image.
    mtime: tuple[int, int] | None
    xattrs_at: int
    xattrs_size: int
    tail_at: int

    @property
    def is_directory(self) -> bool:
        """Whether the mode says directory."""
        return st.S_ISDIR(self.mode)

    @property
    def is_whiteout(self) -> bool:
        """Whether it is the character device 0:0."""
        return st.S_ISCHR(self.mode) and not self.where


class Xattr(NamedTuple):
    """An xattr as stored: number of the prefix, rest of the name, value."""

    prefix: int
    suffix: bytes
    value: bytes

    @property
    def name(self) -> bytes:
        """The whole name."""
        return XATTR_PREFIXES[self.prefix] + self.suffix


class RawImage:
    """An image that was checked to be a composefs image, and its parts. Raises ``ErofsError``."""

    def __init__(self, data: Buffer, name: str) -> None:
        self._data = memoryview(data).cast("B")
        self._name = name
        if len(self._data) > MAX_IMAGE:
            raise self.error("is larger than 1 GiB")
        if len(self._data) < SUPERBLOCK_OFFSET + SUPERBLOCK.size:
            raise self.error("is too short for a composefs image")
        self._read_header()
        self._read_superblock()

    def error(self, detail: str) -> ErofsError:
        """The error that says what is wrong with this image."""
        return ErofsError(f"{self._name} {detail}")

    def __len__(self) -> int:
        return len(self._data)

    def _read_header(self) -> None:
        magic, header_version, _, version = COMPOSEFS_HEADER.unpack_from(self._data)
        if magic != COMPOSEFS_MAGIC:
            raise self.error("is not a composefs image")
        if header_version != HEADER_VERSION or version not in iter(Format):
            raise self.error(f"has an unknown format (versions {header_version} and {version})")
        #: Which format the header names.
        self.format = Format(version)

    def _read_superblock(self) -> None:
        (
            magic, _, compat, block_bits, extension_slots, root_nid, _, build_time, build_time_nsec, _,
            meta_block, xattr_block, incompat, compression, devices, _, _, prefixes, _, packed_nid,
        ) = SUPERBLOCK.unpack_from(self._data, SUPERBLOCK_OFFSET)  # fmt: skip
        if magic != EROFS_MAGIC:
            raise self.error("has no EROFS superblock")
        for unwanted, what in (
            (block_bits != BLOCK_BITS, "another block size than 4096"),
            (compat & ~_COMPAT_KNOWN, "unknown compatible features"),
            (incompat & ~_INCOMPAT_CHUNKED, "unknown incompatible features"),
            (compression, "compression"),
            (devices, "extra devices"),
            (extension_slots, "superblock extensions"),
            (packed_nid, "a packed inode"),
            (meta_block, "inodes in another block than the first"),
            (prefixes, "long xattr prefixes"),
        ):
            if unwanted:
                raise self.error(f"has {what}, which a composefs image never has")
        self.root_nid: int = root_nid
        self.build_time = (build_time - (1 << 64) if build_time >> 63 else build_time, build_time_nsec)
        self._xattr_table: int = xattr_block * BLOCK

    def inode(self, nid: int) -> Inode:
        """The inode with number ``nid``."""
        data, offset = self._data, nid * SLOT
        if offset + COMPACT_INODE.size > len(data):
            raise self.error(f"has no inode {nid}")
        mtime: tuple[int, int] | None
        if data[offset] & 1:
            if offset + EXTENDED_INODE.size > len(data):
                raise self.error(f"has no inode {nid}")
            form, icount, mode, _, size, where, _, uid, gid, sec, nsec, nlink = EXTENDED_INODE.unpack_from(
                data, offset
            )
            layout, mtime, at = form - 1, (sec, nsec), offset + EXTENDED_INODE.size
        else:
            layout, icount, mode, nlink, size, _, where, _, uid, gid, _ = COMPACT_INODE.unpack_from(
                data, offset
            )
            mtime, at = None, offset + COMPACT_INODE.size
        xattrs_size = XATTR_HEADER.size + (icount - 1) * _WORD if icount else 0
        tail_at = at + xattrs_size
        if layout not in (LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNKED):
            raise self.error(f"has an inode {nid} of an unknown layout")
        if layout != LAYOUT_CHUNKED and size > len(data):
            raise self.error(f"has an inode {nid} that is larger than the image")
        if tail_at + (size % BLOCK if layout == LAYOUT_INLINE else 0) > len(data):
            raise self.error(f"ends inside inode {nid}")
        return Inode(nid, layout, mode, nlink, size, where, uid, gid, mtime, at, xattrs_size, tail_at)

    def mode_and_where(self, nid: int) -> tuple[int, int]:
        """Two fields of an inode, cheaper than ``inode``: they have the same place in both forms."""
        offset = nid * SLOT
        if offset + COMPACT_INODE.size > len(self._data):
            raise self.error(f"has no inode {nid}")
        fields = COMPACT_INODE.unpack_from(self._data, offset)
        return fields[2], fields[6]

    def pieces(self, inode: Inode) -> Iterator[memoryview]:
        """The data of a directory, symbolic link or inline file: its blocks, then what is in the inode."""
        if inode.layout == LAYOUT_CHUNKED:
            raise self.error(f"has no data for inode {inode.nid}")
        blocks = inode.size // BLOCK
        tail = inode.size % BLOCK
        if tail and inode.layout == LAYOUT_PLAIN:
            blocks += 1
        start = inode.where * BLOCK
        if blocks and start + blocks * BLOCK > len(self._data):
            raise self.error(f"ends before the data of inode {inode.nid}")
        for at in range(start, start + blocks * BLOCK, BLOCK):
            yield self._data[at : at + BLOCK]
        if tail and inode.layout == LAYOUT_INLINE:
            yield self._data[inode.tail_at : inode.tail_at + tail]

    def content(self, inode: Inode) -> bytes:
        """The data of a symbolic link or inline file."""
        return b"".join(self.pieces(inode))[: inode.size]

    def entries(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """Name and nid of each entry of a directory, ``.`` and ``..`` among them."""
        for piece in self.pieces(inode):
            first = DIRENT.unpack_from(piece)[1] if len(piece) >= DIRENT.size else 0
            if not first or first % DIRENT.size or first > len(piece):
                raise self.error(f"has a damaged directory, inode {inode.nid}")
            block = bytes(piece)
            headers = list(DIRENT.iter_unpack(block[:first]))
            end = block.find(b"\0", headers[-1][1])
            ends = [start for _, start, _ in headers[1:]]
            ends.append(end if end >= 0 else len(block))
            for (nid, start, _), end in zip(headers, ends, strict=True):
                name = block[start:end]
                # An empty slice also stands for names that overlap or lie outside.
                if not name or len(name) > MAX_NAME or b"/" in name or b"\0" in name:
                    raise self.error(f"has a damaged name in a directory, inode {inode.nid}")
                yield name, nid

    def local_xattrs(self, inode: Inode) -> Iterator[Xattr]:
        """The xattrs stored in an inode."""
        at = inode.xattrs_at + XATTR_HEADER.size + _WORD * self._reference_count(inode)
        end = inode.xattrs_at + inode.xattrs_size
        if inode.xattrs_size and at > end:
            raise self.error(f"has damaged xattrs in inode {inode.nid}")
        while at < end:
            xattr, at = self._xattr(at, end)
            yield xattr

    def references(self, inode: Inode) -> list[int]:
        """Offsets of the shared xattrs of an inode."""
        count = self._reference_count(inode)
        if not count:
            return []
        at = inode.xattrs_at + XATTR_HEADER.size
        if at + _WORD * count > inode.xattrs_at + inode.xattrs_size:
            raise self.error(f"has damaged xattrs in inode {inode.nid}")
        words = bytes(self._data[at : at + _WORD * count])
        return [
            self._xattr_table + _WORD * int.from_bytes(words[i : i + _WORD], "little")
            for i in range(0, len(words), _WORD)
        ]

    def shared_xattr(self, offset: int) -> Xattr:
        """The shared xattr at ``offset``."""
        return self._xattr(offset, len(self._data))[0]

    def _reference_count(self, inode: Inode) -> int:
        if not inode.xattrs_size:
            return 0
        return int(XATTR_HEADER.unpack_from(self._data, inode.xattrs_at)[1])

    def _xattr(self, at: int, end: int) -> tuple[Xattr, int]:
        if at + XATTR_ENTRY.size > end:
            raise self.error("has a damaged xattr")
        name_length, prefix, value_length = XATTR_ENTRY.unpack_from(self._data, at)
        start = at + XATTR_ENTRY.size
        middle = start + name_length
        last = middle + value_length
        after = last + -last % _WORD
        if after > end or prefix >= len(XATTR_PREFIXES):
            raise self.error("has a damaged xattr")
        return Xattr(prefix, bytes(self._data[start:middle]), bytes(self._data[middle:last])), after


class Walk:
    """Bounds one traversal of an image.

    In an image that a writer made no two inodes, data blocks or shared xattrs overlap, so all that a
    traversal reads once has no more bytes than the image. One that exceeds this was made to keep readers
    busy.
    """

    def __init__(self, raw: RawImage) -> None:
        self._raw = raw
        self._bytes_left = len(raw)
        self._entries_left = MAX_ENTRIES
        self._shared: dict[int, Xattr] = {}

    def inode(self, nid: int) -> Inode:
        """An inode, which the traversal reads for the first and only time."""
        inode = self._raw.inode(nid)
        size = inode.tail_at - nid * SLOT
        if inode.layout != LAYOUT_CHUNKED:
            size += inode.size
        self._charge(size)
        return inode

    def _charge(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise self._raw.error("has inodes that overlap")

    def xattrs(self, inode: Inode) -> list[Xattr]:
        """All xattrs of an inode, the shared ones first."""
        if not inode.xattrs_size:
            return []
        found = []
        for offset in self._raw.references(inode):
            xattr = self._shared.get(offset)
            if xattr is None:
                xattr = self._shared[offset] = self._raw.shared_xattr(offset)
                self._charge(XATTR_ENTRY.size + len(xattr.suffix) + len(xattr.value))
            found.append(xattr)
        found.extend(self._raw.local_xattrs(inode))
        return found

    def entries(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """The entries of a directory."""
        for entry in self._raw.entries(inode):
            self._entries_left -= 1
            if self._entries_left < 0:
                raise self._raw.error("has too many directory entries")
            yield entry
