"""Tar archives made byte by byte: also those that no tool would write."""

from __future__ import annotations

BLOCK = 512
USTAR = b"ustar\x0000"
GNU = b"ustar  \x00"
OLD = bytes(8)
END = bytes(2 * BLOCK)


def octal(value: int, width: int) -> bytes:
    """``value`` in octal, NUL at the end, as most tools write it."""
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """``value`` in the binary form of GNU tar; negative numbers as two's complement."""
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def header(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    magic: bytes = USTAR,
    device: tuple[int, int] | bytes = b"",
    prefix: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """One header block. Numbers given as bytes go in as they are."""

    def number(value: int | bytes, width: int) -> bytes:
        return (octal(value, width) if isinstance(value, int) else value).ljust(width, b"\0")

    if isinstance(device, tuple):
        device = octal(device[0], 8) + octal(device[1], 8)
    block = bytearray(
        name.ljust(100, b"\0")
        + number(mode, 8)
        + number(uid, 8)
        + number(gid, 8)
        + number(size, 12)
        + number(mtime, 12)
        + b" " * 8
        + kind
        + link.ljust(100, b"\0")
        + magic
        + bytes(64)
        + device.ljust(16, b"\0")
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    assert len(block) == BLOCK
    total = sum(block) if checksum is None else checksum
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(content: bytes, fill: bytes = b"\0") -> bytes:
    """``content`` filled up to whole blocks."""
    return content + fill * (-len(content) % BLOCK)


def file(name: bytes, content: bytes, fill: bytes = b"\0", **fields: object) -> bytes:
    """A regular file with its content."""
    return header(name, len(content), **fields) + padded(content, fill)  # type: ignore[arg-type]


def directory(name: bytes, mode: int = 0o755, **fields: object) -> bytes:
    """A directory."""
    return header(name, 0, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def pax_record(key: bytes, value: bytes) -> bytes:
    """One record, which counts its own length."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """An extended header with ``records``."""
    content = b"".join(pax_record(key, value) for key, value in records)
    return header(b"PaxHeader", len(content), kind) + padded(content)


def gnu_long(kind: bytes, text: bytes) -> bytes:
    """The header with which GNU tar carries a long name (``L``) or link target (``K``)."""
    content = text + b"\0"
    return header(b"././@LongLink", len(content), kind, magic=GNU) + padded(content)
