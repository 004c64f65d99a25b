"""Writes composefs images.

``build`` finds the inodes and their order (``inodes``), their xattrs (``xattrs``), gives each its place, and
fills one buffer. Facts: EROFS on-disk format; composefs-rs 0.9, erofs writer.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.bulk import no_gc
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
    FLAG_HAS_ACL,
    HEADER_VERSION,
    INODES_OFFSET,
    LAYOUT_CHUNKED,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    MAX_IMAGE,
    MODE_BITS,
    SLOT,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    V2_MAX_INLINE,
    V2_MAX_SYMLINK,
    FileType,
    Format,
    UnsupportedTree,
    up,
)
from hostimaged.composefs.erofs.inodes import Inode, collect
from hostimaged.composefs.erofs.xattrs import XattrTable
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Directory,
    External,
    ExternalNoVerity,
    Inline,
    Sparse,
    Symlink,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.composefs.fsverity import Algorithm

#: More bytes than this at the end of a file or directory get a block of their own.
_MAX_TAIL: Final = BLOCK // 2
_MAX_CHUNK_BITS: Final = 43
#: Chunk format of V2: always the largest chunk, whatever the file's size.
_V2_CHUNK_FORMAT: Final = 31
_CHUNKED: Final = (External, ExternalNoVerity, Sparse)
_DEVICES: Final = (CharDevice, BlockDevice)
_U64: Final = (1 << 64) - 1
_NULL_CHUNKS: Final = b"\xff" * BLOCK


def build(root: Directory, image_format: Format, algorithm: Algorithm) -> bytearray:
    """The composefs image of a tree.

    ``algorithm`` is the hash of the objects that the tree names; the id of the image is its fs-verity digest.
    Raises ``UnsupportedTree`` for what an image cannot hold.
    """
    try:
        with no_gc():
            return _Writer(root, image_format, algorithm).write()
    except struct.error:
        # Owners, times and device numbers come from outside and are only now seen to be out of range.
        raise UnsupportedTree("a number in the metadata of a file is out of range") from None


class _Writer:
    def __init__(self, root: Directory, image_format: Format, algorithm: Algorithm) -> None:
        self._format = image_format
        self._epoch1 = image_format is not Format.V2
        self._table = XattrTable(image_format, algorithm)
        self._inodes = collect(root, image_format, self._table)
        self._table.share()
        times = {(inode.stat.mtime, inode.stat.nsec) for inode in self._inodes}
        if not all(-(1 << 63) <= sec < 1 << 63 and 0 <= nsec < 1_000_000_000 for sec, nsec in times):
            raise UnsupportedTree("the modification time of a file is out of range")
        # As unsigned numbers: a time before 1970 counts as a very late one.
        self._oldest = min((sec & _U64, nsec) for sec, nsec in times)

    def write(self) -> bytearray:
        """Place everything, then write it."""
        position = INODES_OFFSET
        place = self._place_epoch1 if self._epoch1 else self._place_v2
        for inode in self._inodes:
            self._measure(inode)
            position = place(inode, position)
        shared = self._table.place(position)
        data_start = up(position + len(shared), BLOCK)
        end = data_start + BLOCK * sum([inode.blocks for inode in self._inodes])
        if end > MAX_IMAGE:
            raise UnsupportedTree("the image would be larger than 1 GiB")
        image = bytearray(end)
        self._write_headers(image, position)
        image[position : position + len(shared)] = shared
        block = data_start // BLOCK
        for inode in self._inodes:
            self._write_inode(image, inode, block)
            block += inode.blocks
        return image

    def _measure(self, inode: Inode) -> None:
        """Set what depends on the inode alone: size, layout, form of the header, data inside and outside."""
        inode.variant = self._table.variant(inode.group, inode.object_id)
        content = inode.content
        if inode.file_type is FileType.DIRECTORY:
            _measure_directory(inode)
        elif isinstance(content, _CHUNKED):
            inode.size = content.size
            inode.layout = LAYOUT_CHUNKED
            if not self._epoch1:
                inode.tail = 4 if isinstance(content, External) else 0
            elif content.size:
                inode.tail = 4 * -(-content.size // (1 << _chunk_bits(content.size)))
        elif isinstance(content, Inline):
            self._measure_inline(inode, len(content.data))
        elif isinstance(content, Symlink):
            inode.size = inode.tail = len(content.target)
            inode.layout = LAYOUT_INLINE
            if not self._epoch1 and inode.size > V2_MAX_SYMLINK:
                raise UnsupportedTree(f"a symbolic link is longer than {V2_MAX_SYMLINK} bytes")
            if not inode.size or inode.size > BLOCK:
                raise UnsupportedTree("the target of a symbolic link is empty or too long")
        inode.extended = not self._compact(inode)
        if self._epoch1 and inode.tail and content is not None:
            self._promote(inode)

    def _measure_inline(self, inode: Inode, size: int) -> None:
        inode.size = size
        if not self._epoch1:
            if size > V2_MAX_INLINE:
                raise UnsupportedTree(f"a file of more than {V2_MAX_INLINE} bytes without an object")
            inode.tail = size
        else:
            inode.blocks, inode.tail = divmod(size, BLOCK)
            if inode.tail > _MAX_TAIL:
                inode.blocks += 1
                inode.tail = 0
        inode.layout = LAYOUT_INLINE if inode.tail else LAYOUT_PLAIN

    def _compact(self, inode: Inode) -> bool:
        stat = inode.stat
        return (
            self._epoch1
            and (stat.mtime & _U64, stat.nsec) == self._oldest
            and inode.nlink <= 0xFFFF
            and stat.uid <= 0xFFFF
            and stat.gid <= 0xFFFF
            and inode.size <= 0xFFFFFFFF
        )

    def _promote(self, inode: Inode) -> None:
        """Move data that cannot stand behind the inode within one block to a block of its own."""
        xattr_size = inode.variant.size
        if inode.file_type is FileType.SYMLINK:
            if _header_size(inode) + xattr_size + inode.tail >= BLOCK:
                inode.blocks, inode.tail, inode.layout = 1, 0, LAYOUT_PLAIN
        elif inode.layout == LAYOUT_CHUNKED and inode.tail + xattr_size % SLOT > BLOCK:
            inode.blocks, inode.tail = 1, 0

    def _place_epoch1(self, inode: Inode, position: int) -> int:
        """Set the inode's offset, the first fit from ``position``, and return the end."""
        tail, layout = inode.tail, inode.layout
        head = (64 if inode.extended else 32) + inode.variant.size
        if inode.file_type is FileType.SYMLINK:
            last = position + head + inode.size - 1
            if layout == LAYOUT_PLAIN:
                crosses = position // BLOCK != last // BLOCK
            else:
                crosses = position % BLOCK + head + inode.size % BLOCK > BLOCK
            if crosses:
                position = up(position, BLOCK)
        elif tail:
            left = -(position + head) % BLOCK
            if left and left < tail:
                position += up(left, SLOT)
        elif layout == LAYOUT_CHUNKED and inode.blocks:
            position = up(position, BLOCK)
        inode.offset = position
        return up(position + head + tail, SLOT)

    def _place_v2(self, inode: Inode, position: int) -> int:
        head = EXTENDED_INODE.size + inode.variant.size
        if inode.layout == LAYOUT_INLINE:
            start = position + head
            # One byte further than needed, as in composefs-rs: data that ends on a boundary is moved too.
            if (start - 1) // BLOCK != (start + inode.tail) // BLOCK:
                position = up(position + BLOCK - (start - 1) % BLOCK, SLOT)
        inode.offset = position
        return up(position + head + inode.tail, SLOT)

    def _write_headers(self, image: bytearray, inodes_end: int) -> None:
        flags = FLAG_HAS_ACL if self._table.has_acl else 0
        COMPOSEFS_HEADER.pack_into(image, 0, COMPOSEFS_MAGIC, HEADER_VERSION, flags, self._format.value)
        build_time, build_time_nsec = self._oldest if self._epoch1 else (0, 0)
        SUPERBLOCK.pack_into(
            image,
            SUPERBLOCK_OFFSET,
            EROFS_MAGIC,
            0,
            COMPAT_MTIME | COMPAT_XATTR_FILTER,
            BLOCK_BITS,
            0,
            self._inodes[0].offset // SLOT & 0xFFFF,
            len(self._inodes),
            build_time,
            build_time_nsec,
            len(image) // BLOCK,
            0,
            inodes_end // BLOCK if self._epoch1 else 0,
            *(0,) * 8,
        )

    def _write_inode(self, image: bytearray, inode: Inode, block: int) -> None:
        stat = inode.stat
        offset = inode.offset
        variant = inode.variant
        mode = MODE_BITS[inode.file_type] | stat.mode & 0o7777
        where = self._where(inode, block)
        if inode.extended:
            number, nsec = (inode.index, stat.nsec) if self._epoch1 else (offset // SLOT, 0)
            EXTENDED_INODE.pack_into(
                image, offset, inode.layout + 1, variant.icount, mode, 0, inode.size, where, number, stat.uid,
                stat.gid, stat.mtime, nsec, inode.nlink,
            )  # fmt: skip
            at = offset + EXTENDED_INODE.size
        else:
            COMPACT_INODE.pack_into(
                image, offset, inode.layout, variant.icount, mode, inode.nlink, inode.size, 0, where,
                inode.index, stat.uid, stat.gid, 0,
            )  # fmt: skip
            at = offset + COMPACT_INODE.size
        if variant.size:
            image[at : at + variant.size] = variant.pack(self._table, inode.object_id)
            at += variant.size
        if inode.tail or inode.blocks:
            self._write_data(image, inode, at, block * BLOCK)

    def _where(self, inode: Inode, block: int) -> int:
        """The inode's field of many meanings: block address, device number, or chunk format."""
        content = inode.content
        if inode.layout == LAYOUT_CHUNKED:
            if not self._epoch1:
                return _V2_CHUNK_FORMAT
            chunks = _chunk_bits(inode.size) - BLOCK_BITS
            return block & 0xFFFF0000 | chunks if inode.blocks else chunks
        if isinstance(content, _DEVICES):
            return content.rdev
        return block if inode.blocks else 0

    def _write_data(self, image: bytearray, inode: Inode, tail_at: int, data_at: int) -> None:
        content = inode.content
        if inode.file_type is FileType.DIRECTORY:
            _write_directory(image, inode, tail_at, data_at)
        elif isinstance(content, Inline):
            data = content.data
            split = min(inode.blocks * BLOCK, len(data))
            image[data_at : data_at + split] = data[:split]
            image[tail_at : tail_at + inode.tail] = data[split:]
        elif isinstance(content, Symlink):
            at = data_at if inode.blocks else tail_at
            image[at : at + inode.size] = content.target
        elif inode.blocks:
            image[data_at : data_at + BLOCK] = _NULL_CHUNKS
        else:
            image[tail_at : tail_at + inode.tail] = _NULL_CHUNKS[: inode.tail]


def _header_size(inode: Inode) -> int:
    return EXTENDED_INODE.size if inode.extended else COMPACT_INODE.size


def _chunk_bits(size: int) -> int:
    return min(max((size - 1).bit_length() if size > 1 else 1, BLOCK_BITS), _MAX_CHUNK_BITS)


def _measure_directory(inode: Inode) -> None:
    length = DIRENT.size * len(inode.names) + sum(map(len, inode.names))
    blocks = 0
    if length > _MAX_TAIL:
        groups = _directory_blocks(inode.names)
        blocks = len(groups)
        first, last = groups[-1]
        length = DIRENT.size * (last - first) + sum(map(len, inode.names[first:last]))
        if length > _MAX_TAIL:
            length = 0
        else:
            blocks -= 1
    inode.blocks, inode.tail = blocks, length
    inode.size = blocks * BLOCK + length
    inode.layout = LAYOUT_INLINE if length else LAYOUT_PLAIN


def _directory_blocks(names: Sequence[bytes]) -> list[tuple[int, int]]:
    """Ranges of the entries that fill a block each, the last one perhaps not."""
    groups = []
    first, used = 0, 0
    for at, name in enumerate(names):
        cost = DIRENT.size + len(name)
        if used + cost > BLOCK:
            groups.append((first, at))
            first, used = at, 0
        used += cost
    groups.append((first, len(names)))
    return groups


def _write_directory(image: bytearray, inode: Inode, tail_at: int, data_at: int) -> None:
    names, children = inode.names, inode.children
    # Not needed any more, and without these cycles the inodes are freed with the writer.
    inode.children = ()
    groups = _directory_blocks(names) if inode.blocks else [(0, len(names))]
    pack_into = DIRENT.pack_into
    for number, (first, last) in enumerate(groups):
        at = data_at + number * BLOCK if number < inode.blocks else tail_at
        name_offset = DIRENT.size * (last - first)
        joined = b"".join(names[first:last])
        image[at + name_offset : at + name_offset + len(joined)] = joined
        for name, child in zip(names[first:last], children[first:last], strict=True):
            pack_into(image, at, child.offset // SLOT, name_offset, child.file_type)
            name_offset += len(name)
            at += DIRENT.size
