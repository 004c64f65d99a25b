"""Splitstreams: byte streams cut into inline data and references to objects, with a table of named streams.

The container of tar layers, configurations and manifests. ``Writer`` makes one, ``SplitStream`` reads one,
``cat`` gives the original bytes back. Facts: composefs-rs 0.9, splitstream. All integers little-endian; a
*range* is the file offset of the first byte and of the one after the last::

    0    header: magic, version 0, flags, algorithm, log2 of the block size, range of info
    32   info: ranges of stream refs, object refs, stream, named refs; content type; size of the whole stream
    112  stream refs: digests, each once, named refs point to them by index
         object refs: digests, each once, in the order of first use
         named refs:  zstd frame of "<index>:<name>\\0", sorted by name
         stream:      zstd frame of chunks: i64 -n and n inline bytes, or i64 index of an object ref

Readers go by the ranges. Where a stream is stored, and under which name, is the repository's business; what
is inside a tar, that of ``hostimaged.oci``.
"""

from __future__ import annotations

import os
import re
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

import zstandard

from hostimaged.composefs.fsverity import BLOCK
from hostimaged.composefs.spool import Spool, temporary_file
from hostimaged.errors import CorruptRepository, from_os_error, printable
from hostimaged.ids import ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.fsverity import Algorithm, Buffer

_MAGIC: Final = b"SplitStream"
_VERSION: Final = 0
_BLOCK_BITS: Final = BLOCK.bit_length() - 1
#: magic, version, flags, algorithm, log2 of the block size, range of info.
_HEADER: Final = struct.Struct("<11sBHBB2Q")
#: The same fields as bootc up to 1.15 wrote them, whose compiler had reordered the structure.
_OLD_HEADER: Final = struct.Struct("<2QH11sBBB")
#: Ranges of stream refs, object refs, stream and named refs, content type, size.
_INFO: Final = struct.Struct("<8Q2Q")
_CHUNK: Final = struct.Struct("<q")
_ZSTD_LEVEL: Final = 3  # stream ids are only the same as composefs-rs's at its level

#: Inline data gathered in memory before it goes to a temporary file: it is compressed only when its length is
#: known, and a tar may end with any amount of padding.
_PENDING_LIMIT: Final = 1 << 20
#: Compressed bytes kept in memory: layers of more than some 100,000 entries exceed it.
_COMPRESSED_LIMIT: Final = 4 << 20
_PIECE: Final = 1 << 20

#: Bytes of a reference table: a million objects of sha512, ten times the largest layer known.
_MAX_TABLE: Final = 64 << 20
#: Bytes of the named refs' text: a config names its layers and images, some 100 bytes each.
_MAX_NAMES: Final = 16 << 20
#: As composefs-rs's reader: the largest window that zstd decompresses without being told to.
_MAX_WINDOW: Final = 128 << 20
#: Compressed bytes given to zstd at a time. Each 4 of them can become 128 KiB: this bounds memory.
_FEED: Final = 1 << 10
_READ: Final = 1 << 16

_INDEX: Final = re.compile(r"\+?[0-9]{1,19}\Z", re.ASCII)


class SplitStreamError(CorruptRepository):
    """{detail}"""


class ContentType(IntEnum):
    """What is in a stream: eight ASCII characters as a number."""

    LAYER = int.from_bytes(b"ocilayer", "little")
    CONFIG = int.from_bytes(b"ociconfg", "little")
    MANIFEST = int.from_bytes(b"ocimanif", "little")
    BLOB = int.from_bytes(b"oci_blob", "little")


class _Table:
    """Digests, each once, numbered in the order they were first added."""

    __slots__ = ("_numbers", "_size")

    def __init__(self, algorithm: Algorithm) -> None:
        self._numbers: dict[ObjectId, int] = {}
        self._size = algorithm.digest_size

    def number(self, id_: ObjectId) -> int:
        if len(id_) != self._size:
            raise ValueError("a digest of another hash than the repository's")
        return self._numbers.setdefault(id_, len(self._numbers))

    def data(self) -> bytes:
        return b"".join(self._numbers)

    def __iter__(self) -> Iterator[ObjectId]:
        return iter(self._numbers)


class Writer:
    """Collects a stream; ``Repository.write_stream`` stores it and gives it its name.

    The result depends on nothing but what is written, not on how it was cut into calls. Memory is bounded by
    some MiB and the reference tables: the rest goes to temporary files, made by ``make_file`` as descriptors
    of their own. A context manager; leaving it drops what was not stored. One thread at a time.
    Raises ``NoSpace`` or ``StorageError`` when a temporary file cannot be written.
    """

    __slots__ = (
        "_algorithm",
        "_compressed",
        "_compressor",
        "_content_type",
        "_names",
        "_objects",
        "_pending",
        "_streams",
        "size",
        "stored_size",
    )

    def __init__(
        self, algorithm: Algorithm, content_type: int, make_file: Callable[[], int] = temporary_file
    ) -> None:
        self._algorithm = algorithm
        self._content_type = content_type
        self._pending = Spool(_PENDING_LIMIT, make_file)
        self._compressed = Spool(_COMPRESSED_LIMIT, make_file)
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
        self._objects = _Table(algorithm)
        self._streams = _Table(algorithm)
        self._names: dict[str, int] = {}
        #: Bytes of the stream so far, inline and external.
        self.size = 0
        #: Bytes of the finished file; 0 before ``finish``.
        self.stored_size = 0

    def inline(self, buffer: Buffer) -> None:
        """Append ``buffer`` itself. Neighbouring calls make one chunk."""
        self._pending.append(buffer)
        self.size += len(buffer)

    def external(self, id_: ObjectId, size: int) -> None:
        """Append the content, ``size`` bytes long, of an object of the repository."""
        self._flush()
        self._compress(_CHUNK.pack(self._objects.number(id_)))
        self.size += size

    def named_ref(self, name: str, id_: ObjectId) -> None:
        """Name another stream (or an image); the later of two equal names counts."""
        if "\0" in name:
            raise ValueError("a NUL character in a named reference")
        self._names[name] = self._streams.number(id_)

    @property
    def object_refs(self) -> tuple[ObjectId, ...]:
        """The objects appended so far, each once."""
        return tuple(self._objects)

    def finish(self) -> Iterator[Buffer]:
        """The bytes of the file, to be read once; sets ``stored_size``. Ends the writing."""
        self._flush()
        self._compressed.append(self._compressor.flush())
        # An empty frame differs from one that was begun and ended: both are as composefs-rs writes them.
        text = b"".join(
            b"%d:%s\0" % (number, name)
            for name, number in sorted((name.encode(), number) for name, number in self._names.items())
        )
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
        names = (compressor.compress(text) if text else b"") + compressor.flush()
        streams, objects = self._streams.data(), self._objects.data()
        ends = [_HEADER.size + _INFO.size]
        for length in (len(streams), len(objects), len(names), self._compressed.size):
            ends.append(ends[-1] + length)
        start, streams_end, objects_end, names_end, self.stored_size = ends
        head = _HEADER.pack(_MAGIC, _VERSION, 0, self._algorithm.kernel_id, _BLOCK_BITS, _HEADER.size, start)
        ranges = (start, streams_end, streams_end, objects_end, names_end, ends[-1], objects_end, names_end)
        info = _INFO.pack(*ranges, self._content_type, self.size)
        return self._parts(b"".join((head, info, streams, objects, names)))

    def _parts(self, first: bytes) -> Iterator[Buffer]:
        yield first
        yield from self._compressed.pieces()

    def _flush(self) -> None:
        """Write out the inline data gathered."""
        pending = self._pending
        if pending.size:
            self._compress(_CHUNK.pack(-pending.size))
            for piece in pending.pieces():
                self._compress(piece)
            pending.clear()

    def _compress(self, data: Buffer) -> None:
        if compressed := self._compressor.compress(data):
            self._compressed.append(compressed)

    def close(self) -> None:
        """Drop everything. Twice is harmless."""
        self._pending.close()
        self._compressed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SplitStream:
    """A stream opened for reading: its tables at once, its chunks when asked for.

    Takes over ``fd``, also when it raises. ``name`` names the stream in errors; ``expected`` is the content
    type that the caller wants. A context manager. Raises ``SplitStreamError`` for anything malformed, here
    and while reading chunks.
    """

    __slots__ = ("_algorithm", "_fd", "_name", "_range", "_size", "content_type", "named_refs",
                 "object_table", "size", "stream_refs")  # fmt: skip

    #: Eight bytes as a number: one of ``ContentType``, or another program's.
    content_type: int
    #: Length of the reassembled stream, as the writer counted it.
    size: int
    #: The streams that ``named_refs`` may point to.
    stream_refs: tuple[ObjectId, ...]
    #: The ids of the objects that the stream refers to, one after the other.
    object_table: bytes
    #: What the stream calls other streams.
    named_refs: Mapping[str, ObjectId]

    def __init__(
        self, fd: int, algorithm: Algorithm, *, name: str = "stream", expected: int | None = None
    ) -> None:
        self._fd = fd
        self._algorithm = algorithm
        self._name = name
        try:
            self._size = os.fstat(fd).st_size
            self._open(expected)
        except OSError as error:
            self.close()
            raise from_os_error(error, f"cannot read {printable(name)}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, expected: int | None) -> None:
        start, end = self._header()
        self._check_range("info", start, end)
        if end - start < _INFO.size:
            raise self._error("the info section is too short")
        # A future version may have a longer one.
        fields = _INFO.unpack(self._read(start, _INFO.size))
        self.content_type, self.size = fields[8:]
        if expected is not None and self.content_type != expected:
            raise self._error(f"holds {_shown(self.content_type)}, not {_shown(expected)}")
        self.stream_refs = self._split(self._table("stream references", *fields[0:2]))
        self.object_table = self._table("object references", *fields[2:4])
        self._range = (fields[4], fields[5])
        self._check_range("stream", *self._range)
        self.named_refs = self._names(*fields[6:8])

    def _error(self, detail: str) -> SplitStreamError:
        return SplitStreamError(f"{printable(self._name)} is damaged: {detail}")

    def _header(self) -> tuple[int, int]:
        """Check the header; the range of info."""
        raw = self._read(0, _HEADER.size)
        magic, version, _, algorithm, bits, start, end = _HEADER.unpack(raw)
        if magic != _MAGIC:
            start, end, _, magic, version, algorithm, bits = _OLD_HEADER.unpack(raw)
        if magic != _MAGIC:
            raise self._error("not a splitstream")
        if version != _VERSION:
            raise self._error(f"unknown version {version}")
        if algorithm != self._algorithm.kernel_id:
            raise self._error("made for another hash than the repository's")
        if bits != _BLOCK_BITS:
            raise self._error("made for another block size")
        return start, end

    def _read(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes of the file."""
        data = os.pread(self._fd, length, start)
        if len(data) != length:
            raise self._error("the file is too short")
        return data

    def _check_range(self, what: str, start: int, end: int) -> None:
        if not 0 <= start <= end <= self._size:
            raise self._error(f"{what} outside the file")

    @property
    def object_refs(self) -> tuple[ObjectId, ...]:
        """The objects that the stream refers to; made anew each time."""
        return self._split(self.object_table)

    def _split(self, table: bytes) -> tuple[ObjectId, ...]:
        size = self._algorithm.digest_size
        return tuple(ObjectId(table[at : at + size]) for at in range(0, len(table), size))

    def _table(self, what: str, start: int, end: int) -> bytes:
        size = self._algorithm.digest_size
        self._check_range(what, start, end)
        if end - start > _MAX_TABLE:
            raise self._error(f"the {what} are longer than {_MAX_TABLE} bytes")
        data = self._read(start, end - start)
        if len(data) % size:
            raise self._error(f"the {what} are not a whole number of digests")
        return data

    def _names(self, start: int, end: int) -> dict[str, ObjectId]:
        self._check_range("named references", start, end)
        text = _Plain(self, start, end).read(_MAX_NAMES + 1)
        if len(text) > _MAX_NAMES:
            raise self._error(f"the named references are longer than {_MAX_NAMES} bytes")
        *records, rest = text.split(b"\0")
        if rest:
            raise self._error("the named references end in the middle of one")
        names = {}
        for record in records:
            try:
                index, colon, name = record.decode().partition(":")
            except UnicodeDecodeError:
                raise self._error("a named reference is not UTF-8") from None
            if not colon or not _INDEX.match(index) or int(index) >= len(self.stream_refs):
                raise self._error("a named reference is malformed")
            names[name] = self.stream_refs[int(index)]
        return names

    def chunks(self) -> Iterator[bytes | ObjectId]:
        """The stream from its beginning: inline data, and for an external chunk the id of its object.

        Inline chunks of more than a MiB come in several pieces.
        """
        plain = _Plain(self, *self._range)
        objects = self.object_refs
        unpack = _CHUNK.unpack
        while head := plain.read(_CHUNK.size):
            if len(head) < _CHUNK.size:
                raise self._error("the stream ends in the middle of a chunk")
            (number,) = unpack(head)
            if number >= 0:
                if number >= len(objects):
                    raise self._error("a chunk refers to an object that is not in the table")
                yield objects[number]
                continue
            left = -number
            while left:
                piece = plain.read(min(left, _PIECE))
                if not piece:
                    raise self._error("the stream ends in the middle of a chunk")
                yield piece
                left -= len(piece)

    def close(self) -> None:
        """Close the file. Twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Plain:
    """The plain text of the zstd frames in a range of a stream's file."""

    __slots__ = ("_at", "_buffer", "_pieces")

    def __init__(self, stream: SplitStream, start: int, end: int) -> None:
        self._pieces = _decompressed(stream, start, end)
        self._buffer = b""
        self._at = 0

    def read(self, length: int) -> bytes:
        """The next ``length`` bytes; fewer only at the end."""
        at = self._at
        if len(self._buffer) - at < length:
            parts = [self._buffer[at:]]
            have = len(parts[0])
            while have < length and (piece := next(self._pieces, None)) is not None:
                parts.append(piece)
                have += len(piece)
            self._buffer = b"".join(parts)
            at = 0
        self._at = at + length
        return self._buffer[at : at + length]


def _decompressed(stream: SplitStream, start: int, end: int) -> Iterator[bytes]:
    """The plain text of a range, in pieces of 32 MiB at most. A frame that is cut off is an error."""
    context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    frame = context.decompressobj()
    whole = True
    while start < end:
        try:
            raw = stream._read(start, min(_READ, end - start))  # noqa: SLF001
        except OSError as error:
            raise from_os_error(error, "cannot read a stream") from error
        start += len(raw)
        for at in range(0, len(raw), _FEED):
            data = raw[at : at + _FEED]
            while data:
                if whole:
                    frame, whole = context.decompressobj(), False
                try:
                    piece = frame.decompress(data)
                except zstandard.ZstdError:
                    raise stream._error("the compression is damaged") from None  # noqa: SLF001
                if piece:
                    yield piece
                whole = frame.eof
                data = frame.unused_data if whole else b""
    if not whole:
        raise stream._error("the compression is cut off")  # noqa: SLF001


class ObjectOpener(Protocol):
    """Where ``cat`` finds objects: a ``Repository``."""

    def open_object(self, id_: ObjectId, /) -> int:
        """A descriptor of the object, the caller's to close."""


def cat(stream: SplitStream, repository: ObjectOpener, write: Callable[[Buffer], object]) -> None:
    """Give the reassembled stream to ``write``, piece by piece.

    Raises ``SplitStreamError``, what ``open_object`` raises, and what ``write`` raises. The bytes of a piece
    may be overwritten after ``write`` returns.
    """
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    for chunk in stream.chunks():
        if not isinstance(chunk, ObjectId):
            write(chunk)
            continue
        fd = repository.open_object(chunk)
        try:
            while count := _read_into(fd, buffer, chunk):
                write(view[:count])
        finally:
            os.close(fd)


def _read_into(fd: int, buffer: bytearray, id_: ObjectId) -> int:
    try:
        return os.readv(fd, [buffer])
    except OSError as error:
        raise from_os_error(error, f"cannot read object {id_.hex()}") from error


def _shown(content_type: int) -> str:
    try:
        return f"content type {ContentType(content_type).name}"
    except ValueError:
        return f"content type {content_type:#x}"
