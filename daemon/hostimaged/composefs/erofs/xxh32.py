"""XXH32, the hash of the xattr name filter.

Fact: xxHash specification, XXH32. Only short names are hashed, each once per image, so plain Python will do.
"""

from __future__ import annotations

import struct
from typing import Final

_P1: Final = 2654435761
_P2: Final = 2246822519
_P3: Final = 3266489917
_P4: Final = 668265263
_P5: Final = 374761393
_MASK: Final = 0xFFFFFFFF


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _MASK


def xxh32(data: bytes, seed: int) -> int:
    """The 32-bit hash of ``data``."""
    at = 0
    if len(data) >= 16:
        lanes = [(seed + _P1 + _P2) & _MASK, (seed + _P2) & _MASK, seed & _MASK, (seed - _P1) & _MASK]
        while at + 16 <= len(data):
            for lane, word in enumerate(struct.unpack_from("<4I", data, at)):
                lanes[lane] = _rotate((lanes[lane] + word * _P2) & _MASK, 13) * _P1 & _MASK
            at += 16
        value = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
    else:
        value = seed + _P5
    value = (value + len(data)) & _MASK
    while at + 4 <= len(data):
        (word,) = struct.unpack_from("<I", data, at)
        value = _rotate((value + word * _P3) & _MASK, 17) * _P4 & _MASK
        at += 4
    for byte in data[at:]:
        value = _rotate((value + byte * _P5) & _MASK, 11) * _P1 & _MASK
    value = (value ^ value >> 15) * _P2 & _MASK
    value = (value ^ value >> 13) * _P3 & _MASK
    return value ^ value >> 16
