"""zstd, frame by frame, in pieces of bounded size (RFC 8878).

Frames and blocks are walked here and only then fed to the library, for two reasons. A block expands to at
most 128 KiB, so counting blocks bounds the output, which the library returns whole however large it is. And
the library does not report a stream that ends inside a frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zstandard

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.chunked import ChunkedInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer

#: Memory a frame may ask for; the limit of the zstd library, and so of composefs-rs, for streams.
MAX_WINDOW: Final = 128 << 20
#: Blocks fed at once; with at most 128 KiB of output each, a piece has about 1 MiB.
_BLOCKS: Final = 8

_MAGIC: Final = 0xFD2FB528
_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
_RLE: Final = 1
_COMPRESSED: Final = 2


def unzstd(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The data of all zstd frames in ``chunks``, skippable frames left out; pieces may be empty.

    Pieces have at most about 1 MiB. Raises ``UnsupportedImage`` for damage, for a stream that ends inside a
    frame or holds none, for a window over 128 MiB, for a dictionary, and for bytes that are no frame.
    """
    source = ChunkedInput(chunks, "zstd")
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    first = True
    while first or not source.at_end():
        field = source.exactly(4)
        magic = int.from_bytes(field, "little")
        if magic == _MAGIC:
            yield from _frame(source, decompressor)
        elif magic in _SKIPPABLE:
            for _ in source.parts(int.from_bytes(source.exactly(4), "little")):
                yield b""
        else:
            unknown = "not zstd data" if first else "bytes after the last zstd frame are no frame"
            raise UnsupportedImage(unknown)
        first = False


def _frame(source: ChunkedInput, decompressor: zstandard.ZstdDecompressor) -> Iterator[Buffer]:
    header, has_checksum, declared = _frame_header(source)
    size = 0
    for piece in _blocks(source, decompressor, header, has_checksum):
        size += len(piece)
        yield piece
    # The library compares the two only in some of the ways in which it can be fed.
    if declared is not None and size != declared:
        raise UnsupportedImage("the zstd data is damaged: a frame is not as long as it says")


def _blocks(
    source: ChunkedInput, decompressor: zstandard.ZstdDecompressor, header: bytes, has_checksum: bool
) -> Iterator[bytes]:
    """The data of a frame after its header."""
    frame = decompressor.decompressobj()
    try:
        frame.decompress(header)
        last = False
        while not last:
            last, feed = _whole_blocks(source)
            if feed:
                yield frame.decompress(feed)
            else:
                last, header, size = _block_header(source)
                yield frame.decompress(header)
                for part in source.parts(size):
                    yield frame.decompress(part)
        if has_checksum:
            yield frame.decompress(source.exactly(4))
    except zstandard.ZstdError as error:
        raise UnsupportedImage("the zstd data is damaged") from error
    if not frame.eof:
        raise UnsupportedImage("the zstd data is damaged")


def _frame_header(source: ChunkedInput) -> tuple[bytes, bool, int | None]:
    """The whole header, whether a checksum ends the frame, and the length of its data if it is said."""
    descriptor = source.exactly(1)
    flags = descriptor[0]
    single_segment, has_checksum = bool(flags & 0x20), bool(flags & 0x04)
    if flags & 0x08:
        raise UnsupportedImage("a zstd frame has unknown flags")
    if flags & 0x03:
        raise UnsupportedImage("a zstd frame needs a dictionary")
    size_bytes = (int(single_segment), 2, 4, 8)[flags >> 6]
    fields = source.exactly((not single_segment) + size_bytes)
    declared = None
    if size_bytes:
        declared = int.from_bytes(fields[not single_segment :], "little") + (256 if size_bytes == 2 else 0)
    if single_segment:
        window = declared or 0
    else:
        base = 1 << (10 + (fields[0] >> 3))
        window = base + (base >> 3) * (fields[0] & 7)
    if window > MAX_WINDOW:
        raise UnsupportedImage(f"a zstd frame asks for a window of {window} bytes, the limit is {MAX_WINDOW}")
    return _MAGIC.to_bytes(4, "little") + descriptor + fields, has_checksum, declared


def _block_size(header: int) -> int:
    """Bytes that follow a block's header of 3 bytes; the library judges the block itself."""
    kind, size = (header >> 1) & 3, header >> 3
    if kind == _COMPRESSED and not size:
        # Not even the headers inside it. The library takes it or not, as the input happens to be cut.
        raise UnsupportedImage("the zstd data is damaged: a compressed block has no bytes")
    return 1 if kind == _RLE else size


def _whole_blocks(source: ChunkedInput) -> tuple[bool, memoryview]:
    """As many blocks as lie wholly in what was fetched, at most 8; and whether the frame's last is there."""
    view = source.view
    at, count, last = 0, 0, False
    while count < _BLOCKS and at + 3 <= len(view) and not last:
        header = view[at] | view[at + 1] << 8 | view[at + 2] << 16
        end = at + 3 + _block_size(header)
        if end > len(view):
            break
        at, count, last = end, count + 1, bool(header & 1)
    source.view = view[at:]
    return last, view[:at]


def _block_header(source: ChunkedInput) -> tuple[bool, bytes, int]:
    field = source.exactly(3)
    header = int.from_bytes(field, "little")
    return bool(header & 1), field, _block_size(header)
