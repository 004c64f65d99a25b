"""Names and constants of the composefs EROFS image that writer and reader share.

Facts: EROFS on-disk format (kernel, erofs_fs.h); composefs-rs 0.9, erofs format. All integers are
little-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from hostimaged.errors import CorruptRepository, UnsupportedImage

BLOCK: Final = 4096
BLOCK_BITS: Final = 12
#: Inodes start at multiples of this; a nid is an offset in slots.
SLOT: Final = 32
#: Largest image that composefs-rs 0.9 opens.
MAX_IMAGE: Final = 1 << 30
#: Longest name of a directory entry (``EROFS_NAME_LEN``).
MAX_NAME: Final = 255

COMPOSEFS_MAGIC: Final = 0xD078629A
#: Magic, version of the header, flags, version of the format.
COMPOSEFS_HEADER: Final = struct.Struct("<IIII16x")
HEADER_VERSION: Final = 1
FLAG_HAS_ACL: Final = 1

SUPERBLOCK_OFFSET: Final = 1024
EROFS_MAGIC: Final = 0xE0F5E1E2
#: Magic, checksum, feature_compat, blkszbits, extslots, root_nid, inos, build_time, build_time_nsec, blocks,
#: meta_blkaddr, xattr_blkaddr, uuid and volume name, feature_incompat, compression algorithms, extra devices,
#: devt_slotoff, dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid.
SUPERBLOCK: Final = struct.Struct("<IIIBBHQQIIII32xIHHHBBIQ24x")
COMPAT_MTIME: Final = 2
COMPAT_XATTR_FILTER: Final = 4
INODES_OFFSET: Final = SUPERBLOCK_OFFSET + SUPERBLOCK.size

#: Layout, icount, mode, nlink, size, reserved, u, ino, uid, gid, reserved.
COMPACT_INODE: Final = struct.Struct("<HHHHIIIIHHI")
#: Layout + 1, icount, mode, reserved, size, u, ino, uid, gid, mtime, nanoseconds, nlink.
EXTENDED_INODE: Final = struct.Struct("<HHHHQIIIIqII16x")
LAYOUT_PLAIN: Final = 0
LAYOUT_INLINE: Final = 4
LAYOUT_CHUNKED: Final = 8

#: Deepest nesting of directories, the root being 0 (composefs-rs 0.9 reads no more).
MAX_DEPTH: Final = 2047

#: Names of the whiteouts that V0 and V1 put into the root.
STUB_NAMES: Final = frozenset(b"%02x" % i for i in range(256))

#: nid, offset of the name, type.
DIRENT: Final = struct.Struct("<QHBx")

#: Inverted name filter, number of shared references.
XATTR_HEADER: Final = struct.Struct("<IB7x")
#: Length of the suffix, number of the prefix, length of the value.
XATTR_ENTRY: Final = struct.Struct("<BBH")
#: Prefixes of names of xattrs by number.
XATTR_PREFIXES: Final = (
    b"",
    b"user.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
    b"trusted.",
    b"lustre.",
    b"security.",
)
PREFIX_TRUSTED: Final = 4

# Limits of format V2 (composefs-rs 0.9 refuses to read more).
V2_MAX_INLINE: Final = 512
V2_MAX_SYMLINK: Final = 1024


class ErofsError(CorruptRepository):
    """{detail}"""


class UnsupportedTree(UnsupportedImage):
    """{detail}"""


class Format(IntEnum):
    """The format of a composefs image; the value is ``composefs_version`` in its header.

    V0 and V1 are those of C composefs (compact inodes, breadth first, 256 stub whiteouts in the root); V2 is
    that of older composefs-rs (extended inodes, depth first).
    """

    V0 = 0
    V1 = 1
    V2 = 2

    @property
    def label(self) -> str:
        """``v0``, ``v1`` or ``v2``."""
        return f"v{self.value}"


class FileType(IntEnum):
    """Type of a directory entry (``EROFS_FT_*``)."""

    REGULAR = 1
    DIRECTORY = 2
    CHAR = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


#: Type bits of ``st_mode`` by ``FileType``.
MODE_BITS: Final = (0, 0o100000, 0o040000, 0o020000, 0o060000, 0o010000, 0o140000, 0o120000)


def up(value: int, alignment: int) -> int:
    """``value`` rounded up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment
