"""Names and constants of the composefs EROFS image that writer and reader share.

Facts: EROFS on-disk format; composefs-rs 0.9, erofs format and writer.
"""

from __future__ import annotations

from enum import IntEnum


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
