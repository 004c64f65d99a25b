"""Changes to inputs that get past what protects a format: checksums, compression, tables of offsets.

A mutator takes an input, ``change`` (which changes any bytes at random, up to a length), the longest result
and a source of random numbers. What it does not understand it leaves to ``change``.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

Change = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, Change, int, random.Random], bytes]

_BLOCK = 512
_HEADER = struct.Struct("<11sBHBB2Q")
_INFO = struct.Struct("<10Q")
_PLAIN_LIMIT = 1 << 20


def tar(data: bytes, change: Change, limit: int, rng: random.Random) -> bytes:
    """Headers of a tar get right checksums; sometimes whole blocks are moved about."""
    if rng.random() < 0.2 and len(data) >= _BLOCK:
        blocks = [data[at : at + _BLOCK] for at in range(0, len(data), _BLOCK)]
        picked = rng.choice(blocks)
        blocks.insert(rng.randrange(len(blocks) + 1), picked)
        if rng.random() < 0.5:
            del blocks[rng.randrange(len(blocks))]
        changed = bytearray(b"".join(blocks)[:limit])
    elif rng.random() < 0.5 and len(data) >= _BLOCK:
        # One block in place: what follows keeps its alignment.
        at = rng.randrange(len(data) // _BLOCK) * _BLOCK
        block = change(data[at : at + _BLOCK], _BLOCK).ljust(_BLOCK, b"\0")[:_BLOCK]
        changed = bytearray(data[:at] + block + data[at + _BLOCK :])
    else:
        changed = bytearray(change(data, limit))
    if rng.random() < 0.9:
        for at in range(0, len(changed) - _BLOCK + 1, _BLOCK):
            block = changed[at : at + _BLOCK]
            # Old headers have no magic; one that had a checksum is one.
            if block[257:262] == b"ustar" or block[148:156].strip(b"01234567") in (b"\0 ", b" \0"):
                block[148:156] = b" " * 8
                changed[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(changed)


def gzip(data: bytes, change: Change, limit: int, rng: random.Random) -> bytes:
    """The data inside, with a right trailer, or the bytes as they are, with the trailer made right."""
    if rng.random() < 0.3:
        return change(data, limit)
    if not data:
        return change(data, limit)
    try:
        member = zlib.decompressobj(31)
        plain, rest = member.decompress(data, _PLAIN_LIMIT), member.unused_data
    except zlib.error:
        return change(data, limit)
    if rng.random() < 0.5:
        deflate = zlib.compressobj(rng.choice([0, 1, 9]), zlib.DEFLATED, -15)
        plain = change(plain, limit)
        body = deflate.compress(plain) + deflate.flush()
        head = b"\x1f\x8b\x08" + bytes(7) if data[3:4] != b"\0" else data[:10]
        return (head + body + _gzip_trailer(plain) + rest)[:limit]
    changed = change(data, limit)
    try:
        inflate = zlib.decompressobj(-15)
        plain = inflate.decompress(changed[10:], _PLAIN_LIMIT)
    except zlib.error:
        return changed
    end = len(changed) - len(inflate.unused_data)
    return changed[:end] + _gzip_trailer(plain) + changed[end + 8 :]


def _gzip_trailer(plain: bytes) -> bytes:
    return struct.pack("<II", zlib.crc32(plain), len(plain))


def zstd(data: bytes, change: Change, limit: int, rng: random.Random) -> bytes:
    """The data inside, compressed anew by any level."""
    if rng.random() < 0.6:
        return change(data, limit)
    plain = _unzstd(data)
    if plain is None:
        return change(data, limit)
    options = zstandard.ZstdCompressionParameters.from_level(
        rng.choice([1, 3, 19]), window_log=rng.randrange(10, 28), write_checksum=rng.random() < 0.5
    )
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    frame = compressor.compress(change(plain, limit)) + compressor.flush()
    return (frame + (data if rng.random() < 0.3 else b""))[:limit]


def _unzstd(data: bytes) -> bytes | None:
    try:
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj().decompress(data[:4096])
    except zstandard.ZstdError:
        return None


def stream(data: bytes, change: Change, limit: int, rng: random.Random) -> bytes:
    """A section of a splitstream, with the offsets of the others made right."""
    parts = None if rng.random() < 0.3 else _sections(data)
    if parts is None:
        return change(data, limit)
    which = rng.randrange(len(parts))
    if which >= 2 and rng.random() < 0.8:
        plain = _unzstd(parts[which])
        if plain is not None:
            parts[which] = zstandard.ZstdCompressor(level=3).compress(change(plain, limit))
            return joined(data[:32], data[96:112], parts)
    parts[which] = change(parts[which], limit)
    return joined(data[:32], data[96:112], parts)


def _sections(data: bytes) -> list[bytes] | None:
    if len(data) < _HEADER.size + _INFO.size:
        return None
    info = _INFO.unpack_from(data, _HEADER.size)
    places = (info[0:2], info[2:4], info[6:8], info[4:6])
    return [data[start:end] for start, end in places]


def joined(header: bytes, tail: bytes, parts: list[bytes]) -> bytes:
    """A splitstream of its stream refs, object refs, named refs and stream."""
    ends = [_HEADER.size + _INFO.size]
    for part in parts:
        ends.append(ends[-1] + len(part))
    a, b, c, d, e = ends
    head = header[:16] + struct.pack("<2Q", _HEADER.size, a)
    return head + struct.pack("<8Q", a, b, b, c, d, e, c, d) + tail.ljust(16, b"\0") + b"".join(parts)


def proxy(data: bytes, change: Change, limit: int, rng: random.Random) -> bytes:
    """One text of a script of replies, with its length made right; or the order of the replies."""
    replies = _replies(data)
    if not replies or rng.random() < 0.2:
        return change(data, limit)
    at = rng.randrange(len(replies))
    flags, *texts = replies[at]
    kind = rng.random()
    if kind < 0.1:
        replies.insert(rng.randrange(len(replies)), replies[at])
    elif kind < 0.2:
        del replies[at]
    elif kind < 0.3:
        flags ^= 1 << rng.randrange(6)
        replies[at] = (flags, texts[0], texts[-1] if len(texts) > 1 else b"")[: 3 if flags & 1 else 2]
    else:
        which = rng.randrange(len(texts))
        texts[which] = change(texts[which], 4096)
        replies[at] = (flags, *texts)
    return b"".join(_reply(*reply) for reply in replies)[:limit]


def _replies(data: bytes) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    at = 0
    while at < len(data):
        flags, texts = data[at], []
        at += 1
        for _ in range(2 if flags & 1 else 1):
            end = at + 2 + int.from_bytes(data[at : at + 2], "little")
            texts.append(data[at + 2 : end])
            at = end
        found.append((flags, *texts))
    return found


def _reply(flags: int, *texts: bytes) -> bytes:
    return bytes([flags]) + b"".join(struct.pack("<H", len(text)) + text for text in texts)


MUTATORS: dict[str, Mutator] = {
    "tar": tar,
    "layer": tar,
    "gzip": gzip,
    "zstd": zstd,
    "stream": stream,
    "proxy": proxy,
}
