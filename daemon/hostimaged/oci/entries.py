"""The entries of a layer: read back from its splitstream (composefs-rs 0.9), or kept from its import."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Content,
    External,
    Fifo,
    Inline,
    Stat,
    Symlink,
    makedev,
)
from hostimaged.errors import CorruptRepository, UnsupportedImage
from hostimaged.ids import ObjectId
from hostimaged.oci import tar
from hostimaged.oci.paths import split_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer

_NO_XATTRS: Final[dict[bytes, bytes]] = {}
#: Entries of layers just imported that are kept: each takes about 500 bytes of memory.
MAX_KEPT: Final = 100_000


class HardLink(NamedTuple):
    """Another name for what ``target`` names at this point of the layers."""

    target: tuple[bytes, ...]


#: What an entry puts in its place; None is a directory.
Item: TypeAlias = Content | HardLink | None


class Entry(NamedTuple):
    """One entry: the names in its path (none: the root), its metadata, what it is."""

    path: tuple[bytes, ...]
    stat: Stat
    item: Item


def read_entries(chunks: Iterable[bytes | ObjectId]) -> Iterator[Entry]:
    """The entries in ``SplitStream.chunks()`` of a layer, in order, up to the end of the archive.

    Raises ``UnsupportedImage`` for what no layer should hold, ``CorruptRepository`` if the stream is no tar
    that was split by the rules.
    """
    source = _Chunks(chunks)
    headers = tar.HeaderReader(source.inline)
    while (header := headers.read()) is not None:
        yield _entry(header, _content(header, source))


class LayerEntries:
    """Gathers the entries of a layer while it is imported, as ``read_entries`` would read them back.

    Gives up beyond ``limit`` entries. One thread at a time.
    """

    __slots__ = ("_entries", "_external", "_limit", "ids")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: list[Entry] | None = []
        # Index and size of those whose content is an object.
        self._external: list[tuple[int, int]] = []
        #: The objects of the layer in order, one for each such content: for the importer to fill.
        self.ids: list[ObjectId] = []

    def add(self, header: tar.TarHeader, content: Buffer) -> None:
        """Add the next entry; ``content`` is that of a file small enough to be inline."""
        entries = self._entries
        if entries is None:
            return
        if len(entries) == self._limit:
            self._entries = None
            return
        if header.is_external:
            self._external.append((len(entries), header.size))
        entries.append(_entry(header, Inline(bytes(content))))

    def finish(self) -> list[Entry] | None:
        """The entries; None if there were too many."""
        entries = self._entries
        if entries is not None:
            for (at, size), id_ in zip(self._external, self.ids, strict=True):
                path, stat, _ = entries[at]
                entries[at] = Entry(path, stat, External(id_, size))
        return entries


class KeptEntries:
    """The entries of layers by stream id, for who needs them soon: see ``LayerEntries``.

    ``limit`` bounds their number. Thread-safe.
    """

    def __init__(self, limit: int = MAX_KEPT) -> None:
        self._lock = threading.Lock()
        self._left = limit
        self._layers: dict[ObjectId, list[Entry]] = {}

    def gather(self) -> LayerEntries:
        """For a layer that is being imported."""
        return LayerEntries(self._left)

    def keep(self, layer: ObjectId, gathered: LayerEntries) -> None:
        """Keep the entries of an imported layer, if there is room."""
        entries = gathered.finish()
        with self._lock:
            if entries is not None and len(entries) <= self._left and layer not in self._layers:
                self._left -= len(entries)
                self._layers[layer] = entries

    def take(self, layer: ObjectId) -> Iterator[Entry] | None:
        """The entries of a layer if they were kept; each is dropped as it is given."""
        with self._lock:
            entries = self._layers.pop(layer, None)
        return _consumed(entries) if entries is not None else None


def _consumed(entries: list[Entry]) -> Iterator[Entry]:
    entries.reverse()
    while entries:
        yield entries.pop()


@lru_cache(maxsize=1024)
def _plain_stat(mode: int, uid: int, gid: int, mtime: int, nsec: int) -> Stat:
    """One for all that are alike: the files of a package often are, and there are very many."""
    return Stat(mode, uid, gid, mtime, nsec, _NO_XATTRS)


def _entry(header: tar.TarHeader, content: Content) -> Entry:
    """The entry; ``content`` counts for files only."""
    item = _item(header, content)
    plain = header.mode, header.uid, header.gid, header.mtime, header.nsec
    stat = Stat(*plain, header.xattrs) if header.xattrs else _plain_stat(*plain)
    return Entry(tuple(split_path(header.path)), stat, item)


def _item(header: tar.TarHeader, content: Content) -> Item:
    match header.kind:
        case tar.REGULAR | tar.CONTIGUOUS:
            return content
        case tar.DIRECTORY:
            return None
        case tar.HARD_LINK:
            return HardLink(tuple(split_path(header.link)))
        case tar.SYMLINK:
            return Symlink(header.link)
        case tar.CHAR:
            return CharDevice(_rdev(header))
        case tar.BLOCK_DEVICE:
            return BlockDevice(_rdev(header))
        case tar.FIFO:
            return Fifo()
        case kind:
            raise UnsupportedImage(f"entries of type {bytes([kind])!r} are not supported")


def _rdev(header: tar.TarHeader) -> int:
    return makedev(*header.device) if header.device else 0


def _content(header: tar.TarHeader, source: _Chunks) -> Content:
    size = header.size
    if header.is_external:
        id_ = source.external()
        source.exactly(tar.padding(size))
        return External(id_, size)
    return Inline(bytes(source.exactly(size + tar.padding(size))[:size]))


class _Chunks:
    """A cursor over the chunks of a stream."""

    __slots__ = ("_at", "_buffer", "_chunks")

    def __init__(self, chunks: Iterable[bytes | ObjectId]) -> None:
        self._chunks = iter(chunks)
        self._buffer: bytes = b""
        self._at = 0

    def inline(self, count: int) -> Buffer:
        """The next ``count`` bytes, which must be inline; nothing at the end of the stream."""
        at, end = self._at, self._at + count
        if end > len(self._buffer):
            at, end = 0, self._fill(count)
        self._at = end
        return self._buffer[at:end]

    def _fill(self, count: int) -> int:
        """Join chunks until ``count`` bytes are in the buffer, from its start; how many to take."""
        rest = self._buffer[self._at :]
        parts, have = [rest] if rest else [], len(rest)
        while have < count:
            chunk = next(self._chunks, None)
            if isinstance(chunk, ObjectId) or (chunk is None and have):
                raise CorruptRepository("the stream of a layer has a header that is not whole")
            if chunk is None:
                break
            parts.append(chunk)
            have += len(chunk)
        self._buffer = parts[0] if len(parts) == 1 else b"".join(parts)
        return min(count, have)

    def exactly(self, count: int) -> Buffer:
        """The next ``count`` bytes, which must be there and inline."""
        taken = self.inline(count)
        if len(taken) < count:
            raise CorruptRepository("the stream of a layer ends inside an entry")
        return taken

    def external(self) -> ObjectId:
        """The next chunk, which must be an object."""
        chunk = next(self._chunks, None) if self._at == len(self._buffer) else None
        if not isinstance(chunk, ObjectId):
            raise CorruptRepository("the stream of a layer has a large content inline")
        return chunk
