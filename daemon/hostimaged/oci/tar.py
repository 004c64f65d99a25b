"""Tar headers: what an entry of a layer is, from the 512-byte blocks before its content.

Accepts what composefs-rs 0.9 (tar-core 0.1) accepts, in the same meaning, so that both see the same files in
the same bytes; old (v7), ustar, GNU and pax headers. Where readers of tar are known to disagree about what
follows, the entry is refused instead: a lone block of zeros, an extension header before the end, content
after anything but a regular file, sizes of more than 64 bits. Sparse files are refused, as composefs-rs does.
No I/O, no content.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import adler32

from hostimaged.errors import UnsupportedImage
from hostimaged.oci import pax
from hostimaged.oci.paths import MAX_PATH, check_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.composefs.fsverity import Buffer

BLOCK: Final = 512

#: Contents of up to so many bytes stay in the splitstream, larger ones become objects. Part of the format:
#: never to be changed (composefs-rs 0.9, ``INLINE_CONTENT_MAX_V0``).
INLINE_MAX: Final = 64

#: Contents of the extension headers of one entry together; composefs-rs has the same limit. Held in memory.
MAX_EXTENSIONS: Final = 1 << 20
#: Largest file offset.
MAX_SIZE: Final = (1 << 63) - 1

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO, CONTIGUOUS = b"01234567"
_LONG_NAME, _LONG_LINK, _GNU_SPARSE, _PAX, _PAX_GLOBAL = b"LKSxg"
_KINDS: Final = frozenset(b"01234567")
_EXTENSIONS: Final = frozenset(b"LKxg")

_ZEROS: Final = bytes(BLOCK)
_USTAR: Final = b"ustar\x0000"
_GNU: Final = b"ustar  \x00"
_WORD: Final = (1 << 64) - 1
#: What ``str::trim`` of Rust takes as white space in ASCII.
_SPACE: Final = b" \t\n\v\f\r"
#: What ``u64::from_str_radix`` of Rust takes.
_OCTAL: Final = re.compile(rb"\+?[0-7]+\Z")
_NO_XATTRS: Final[dict[bytes, bytes]] = {}


class TarHeader(NamedTuple):
    """One entry, all extensions applied.

    ``kind`` is the type byte, ``REGULAR`` for the NUL of old archives. ``path`` and ``link`` are as the
    archive has them; ``path``, and ``link`` of a hard link, passed ``check_path``. ``mtime`` is in seconds
    and may be negative. ``device`` is (major, minor), None in old headers. ``xattrs`` must not be changed.
    """

    kind: int
    path: bytes
    link: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    nsec: int
    xattrs: dict[bytes, bytes]
    device: tuple[int, int] | None

    @property
    def is_external(self) -> bool:
        """Whether the content is an object of its own rather than part of the stream."""
        return self.size > INLINE_MAX


class HeaderReader:
    """Reads the headers of an archive, one entry after the other.

    ``take(count)`` gives the next ``count`` bytes of the archive; nothing at all if it is at its end, and
    raises if it ends within them. Content is the caller's to skip between two calls of ``read``.
    """

    __slots__ = ("_empty", "_take", "count")

    def __init__(self, take: Callable[[int], Buffer]) -> None:
        self._take = take
        # Whether nothing followed the header of the last entry so far.
        self._empty = False
        #: Entries read so far.
        self.count = 0

    def read(self) -> TarHeader | None:
        """The next entry; None at the end, be it the end marker (which is consumed) or that of the data.

        Raises ``UnsupportedImage``.
        """
        try:
            header = self._read()
        except UnsupportedImage as error:
            raise UnsupportedImage(f"tar entry {self.count + 1}: {error.message}") from error
        if header is not None:
            self.count += 1
            self._empty = not header.size
        return header

    def _read(self) -> TarHeader | None:
        extensions: dict[int, bytes] = {}
        length = 0
        while True:
            block = bytes(self._take(BLOCK))
            if not block or block == _ZEROS:
                self._check_end(block, extensions)
                return None
            kind, extended = _check(block)
            if kind not in _EXTENSIONS or not (extended or kind == _PAX_GLOBAL):
                return _entry(block, kind, extensions, extended=extended)
            size = _size(block)
            if kind == _PAX_GLOBAL:
                # Without effect, and a pax header before it is forgotten: so do composefs-rs and Go.
                self._content(size, 0)
                self._empty = False
                extensions, length = {}, 0
                continue
            if kind in extensions:
                raise UnsupportedImage("two extension headers of one type")
            extensions[kind] = self._content(size, length)
            length += size

    def _check_end(self, block: bytes, extensions: dict[int, bytes]) -> None:
        if extensions:
            raise UnsupportedImage("the archive ends after an extension header")
        if not block and self._empty:
            # composefs-rs takes such an archive, but cannot read it back from its splitstream.
            raise UnsupportedImage("the archive ends without an end marker, after an entry without content")
        if block and bytes(self._take(BLOCK)) != _ZEROS:
            raise UnsupportedImage("a lone block of zeros")

    def _content(self, size: int, before: int) -> bytes:
        if before + size > MAX_EXTENSIONS:
            raise UnsupportedImage(f"extension headers of over {MAX_EXTENSIONS} bytes")
        if not size:
            return b""
        content = bytes(self._take(size + padding(size)))
        if not content:
            raise UnsupportedImage("the archive ends inside an extension header")
        return content[:size]


def padding(size: int) -> int:
    """Bytes that fill a content of ``size`` bytes up to whole blocks."""
    return -size % BLOCK


def _check(block: bytes) -> tuple[int, bool]:
    """Verify the checksum; the type byte, and whether the header is of a format that has extensions."""
    # adler32 sums bytes modulo 65521, in C: 256 bytes stay below that. It begins with 1.
    total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    field = block[148:156]
    if _octal(field) != total - sum(field) + 8 * 0x20:
        raise UnsupportedImage("wrong checksum")
    return block[156] or REGULAR, block[257:265] in (_USTAR, _GNU)


@lru_cache(maxsize=1024)
def _octal(field: bytes) -> int:
    text = field.partition(b"\0")[0].strip(_SPACE)
    if not text:
        return 0
    if not _OCTAL.match(text):
        raise UnsupportedImage(f"invalid number {field!r}")
    value = int(text, 8)
    if value > _WORD:
        raise UnsupportedImage(f"invalid number {field!r}")
    return value


def _number(field: bytes) -> int:
    """A field in octal or in the base-256 form of GNU tar; 64 bits, a negative one as two's complement."""
    if field[0] & 0x80:
        return (int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))) & _WORD
    return _octal(field)


@lru_cache(maxsize=4096)
def _owner(field: bytes) -> tuple[int, int, int]:
    """Mode, uid and gid from bytes 100 to 124 of a header: most entries of an image share a few values."""
    return _number(field[:8]) & 0xFFFFFFFF, _number(field[8:16]), _number(field[16:24])


@lru_cache(maxsize=1024)
def _device(field: bytes) -> tuple[int, int]:
    """Major and minor from bytes 329 to 345 of a header; always octal."""
    return _octal(field[:8]) & 0xFFFFFFFF, _octal(field[8:]) & 0xFFFFFFFF


def _size(block: bytes) -> int:
    field = block[124:136]
    if field[0] & 0x80 and (field[0] & 0x7F or field[1:4] != b"\0\0\0"):
        raise UnsupportedImage("invalid size")
    return _number(field)


def _entry(block: bytes, kind: int, extensions: dict[int, bytes], *, extended: bool) -> TarHeader:
    if kind not in _KINDS:
        raise _unsupported_type(kind)
    mode, uid, gid = _owner(block[100:124])
    header = TarHeader(
        kind=kind,
        path=extensions[_LONG_NAME].removesuffix(b"\0") if _LONG_NAME in extensions else _name(block),
        link=extensions[_LONG_LINK].removesuffix(b"\0") if _LONG_LINK in extensions else _cut(block[157:257]),
        size=_size(block),
        mode=mode,
        uid=uid & 0xFFFFFFFF,
        gid=gid & 0xFFFFFFFF,
        mtime=pax.signed(_number(block[136:148])),
        nsec=0,
        xattrs=_NO_XATTRS,
        device=_device(block[329:345]) if extended else None,
    )
    if _PAX in extensions:
        header = header._replace(**pax.overrides(extensions[_PAX]))
    _check_entry(header)
    return header


def _unsupported_type(kind: int) -> UnsupportedImage:
    if kind == _GNU_SPARSE:
        return UnsupportedImage("sparse files in layers are not supported")
    return UnsupportedImage(f"entries of type {bytes([kind])!r} are not supported")


def _cut(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _name(block: bytes) -> bytes:
    name = _cut(block[:100])
    if block[345] and block[257:265] == _USTAR:
        return _cut(block[345:500]) + b"/" + name
    return name


def _check_entry(header: TarHeader) -> None:
    kind, path, link = header.kind, header.path, header.link
    check_path(path)
    if header.size > MAX_SIZE:
        raise UnsupportedImage("invalid size")
    if header.size and kind != REGULAR and kind != CONTIGUOUS:
        raise UnsupportedImage(f"{path!r} is no regular file and has content")
    if kind == HARD_LINK:
        check_path(link)
    elif kind == SYMLINK and (not 0 < len(link) < MAX_PATH or b"\0" in link):
        raise UnsupportedImage(f"{path!r} has an invalid link target")
    elif kind in (CHAR, BLOCK_DEVICE) and header.device is None:
        raise UnsupportedImage(f"{path!r} is a device without a number")
