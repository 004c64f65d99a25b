"""gzip, member by member, in pieces of bounded size (RFC 1952).

The framing is parsed here and only the deflate data goes to the library: isal 1.9 misreads a member whose
header straddles two inputs, and zlib stops after the first member without saying so. isal is used where it
is installed (twice as fast), zlib otherwise.

What zlib takes isal takes, with the same result. isal also takes members whose sets of Huffman codes are
incomplete, which zlib refuses; their trailers are checked all the same, and a layer has to match its diff_id.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.chunked import ChunkedInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer

try:
    from isal import isal_zlib

    _library: Any = isal_zlib
except ImportError:
    _library = zlib

#: Most bytes in one piece of output: what a queue of pieces holds is counted in these.
PIECE: Final = 1 << 20
#: A header has a few bytes; of the optional fields that can make it longer only name and comment have no
#: bound of their own in the format. Bounds what is kept while looking for their end.
MAX_NAME: Final = 1 << 16
#: Bytes handed to the library at once: few at the start of a member, since what follows its end comes back as
#: a copy, and a stream may be all tiny members.
_FIRST_FEED: Final = 1 << 14
_FEED: Final = 1 << 18

_MAGIC: Final = b"\x1f\x8b"
_METHOD_DEFLATE: Final = 8
_HEADER_CRC, _EXTRA, _NAME, _COMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0
_TRAILER: Final = struct.Struct("<II")


def gunzip(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The data of all gzip members in ``chunks``, as pieces of at most 1 MiB; pieces may be empty.

    Raises ``UnsupportedImage`` for damage, for a stream that ends inside a member or holds none, and for
    bytes after the last member that are no member.
    """
    source = ChunkedInput(chunks, "gzip")
    first = True
    while first or not source.at_end():
        _skip_header(source, first=first)
        yield from _member(source)
        first = False


def _skip_header(source: ChunkedInput, *, first: bool) -> None:
    header = source.take(len(_MAGIC))
    if header != _MAGIC[: len(header)]:
        raise UnsupportedImage("not gzip data" if first else "bytes after the last gzip member are no member")
    header += source.exactly(10 - len(header))
    flags = header[3]
    if header[2] != _METHOD_DEFLATE or flags & _RESERVED:
        raise UnsupportedImage("a gzip member has an unknown compression method or unknown flags")
    if flags & _EXTRA:
        length = source.exactly(2)
        header += length + source.exactly(int.from_bytes(length, "little"))
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            header += _terminated(source)
    if flags & _HEADER_CRC:
        stored = int.from_bytes(source.exactly(2), "little")
        if stored != zlib.crc32(header) & 0xFFFF:
            raise UnsupportedImage("the header of a gzip member is damaged")


def _terminated(source: ChunkedInput) -> bytes:
    """A string of the header, with the NUL that ends it."""
    text = bytearray()
    while len(text) <= MAX_NAME:
        if source.at_end():
            raise source.ends_early()
        window = bytes(source.view[:4096])
        end = window.find(b"\0") + 1
        text += source.take(end or len(window))
        if end:
            return bytes(text)
    raise UnsupportedImage(f"a gzip member has a name or comment of over {MAX_NAME} bytes")


def _member(source: ChunkedInput) -> Iterator[Buffer]:
    """The data of one member; its trailer is checked."""
    inflate = _library.decompressobj(-zlib.MAX_WBITS)
    checksum, size, feed = 0, 0, _FIRST_FEED
    while not inflate.eof:
        if source.at_end():
            raise source.ends_early()
        whole, data = source.view, source.view[:feed]
        end, feed = len(data), min(feed * 4, _FEED)
        more = True
        while more:
            try:
                piece: bytes = inflate.decompress(data, PIECE)
            except (zlib.error, _library.error) as error:
                raise UnsupportedImage("the gzip data is damaged") from error
            checksum = _library.crc32(piece, checksum)
            size += len(piece)
            yield piece
            data = inflate.unconsumed_tail
            # A full piece may have left output inside the library.
            more = not inflate.eof and (bool(data) or len(piece) == PIECE)
        source.view = whole[end - len(inflate.unused_data) :]
    if _TRAILER.unpack(source.exactly(8)) != (checksum, size & 0xFFFFFFFF):
        raise UnsupportedImage("the gzip data is damaged: wrong checksum or size")
