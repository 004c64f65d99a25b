"""Random streams of members and frames, cut anywhere; damage and truncation never pass silently."""

from __future__ import annotations

import gzip
import struct
import zlib
from itertools import pairwise

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.gunzip import gunzip
from hostimaged.oci.unzstd import unzstd

PARTS = st.lists(st.binary(max_size=3000) | st.integers(0, 300_000).map(bytes), min_size=1, max_size=5)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(at % (len(data) + 1) for at in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def gzip_member(data: bytes, flags: int) -> bytes:
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff"
    head += struct.pack("<H", 5) + b"extra" if flags & 4 else b""
    head += b"name\0" if flags & 8 else b""
    head += b"comment\0" if flags & 16 else b""
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF) if flags & 2 else b""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return head + deflate.compress(data) + deflate.flush() + struct.pack("<II", zlib.crc32(data), len(data))


@given(
    PARTS,
    st.lists(st.integers(0, 31).map(lambda n: n & 30), min_size=5, max_size=5),
    st.lists(st.integers(0)),
)
def test_gzip_members(parts: list[bytes], flags: list[int], places: list[int]) -> None:
    data = b"".join(gzip_member(part, flag) for part, flag in zip(parts, flags, strict=False))
    assert b"".join(gunzip(cut(data, places))) == b"".join(parts)


def zstd_frame(data: bytes, kind: int) -> bytes:
    if kind == 0:
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
    stream = zstandard.ZstdCompressor(level=1, write_checksum=kind == 1).compressobj()
    middle = len(data) // 2
    first = stream.compress(data[:middle]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    frame = first + stream.compress(data[middle:]) + stream.flush()
    skippable = struct.pack("<II", 0x184D2A50 + kind, len(data) % 99) + bytes(len(data) % 99)
    return skippable + frame if kind == 2 else frame + skippable


@given(PARTS, st.lists(st.integers(0, 3), min_size=5, max_size=5), st.lists(st.integers(0)))
def test_zstd_frames(parts: list[bytes], kinds: list[int], places: list[int]) -> None:
    data = b"".join(zstd_frame(part, kind) for part, kind in zip(parts, kinds, strict=False))
    assert b"".join(unzstd(cut(data, places))) == b"".join(parts)


@settings(max_examples=200)
@given(st.binary(min_size=100, max_size=2000), st.booleans(), st.data())
def test_damage_is_noticed(content: bytes, use_zstd: bool, draw: st.DataObject) -> None:
    compressed = zstd_frame(content, 0) if use_zstd else gzip.compress(content)
    data = bytearray(compressed)
    if draw.draw(st.booleans()):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    else:
        del data[draw.draw(st.integers(0, len(data) - 1)) :]
    try:
        result = b"".join((unzstd if use_zstd else gunzip)([bytes(data)]))
    except UnsupportedImage:
        return
    assert result == content
