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
#: Entries of layers just imported that are kept, of all layers together.
MAX_KEPT: Final = 100_000
#: Memory that these take, some 500 bytes each; but paths, attributes and contents may be large.
MAX_KEPT_SIZE: Final = 64 << 20
#: Bytes of memory that an entry takes besides its strings, and a string besides its bytes.
_ENTRY: Final = 200
_STRING: Final = 48
#: What a layer reserves at a time: entries, and bytes.
_STEP: Final = (1000, 1000 * 512)


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


def metadata_size(stat: Stat, item: Item) -> int:
    """Bytes of the attributes, the inline content and the target of a symbolic link of an entry."""
    size = 0
    if isinstance(item, Inline):
        size = len(item.data)
    elif isinstance(item, Symlink):
        size = len(item.target)
    if stat.xattrs:
        size += sum(len(name) + len(value) for name, value in stat.xattrs.items())
    return size


def _memory(entry: Entry) -> int:
    """Bytes of memory that an entry takes, roughly."""
    path, stat, item = entry
    strings = len(path) + 2 * len(stat.xattrs)
    size = _ENTRY + metadata_size(stat, item) + sum(map(len, path))
    if isinstance(item, HardLink):
        strings += len(item.target)
        size += sum(map(len, item.target))
    return size + _STRING * strings


def read_entries(chunks: Iterable[bytes | ObjectId]) -> Iterator[Entry]:
    """The entries in ``SplitStream.chunks()`` of a layer, in order, up to the end of the archive.

    Raises ``UnsupportedImage`` for what no layer should hold, ``CorruptRepository`` if the stream is no tar
    that was split by the rules.
    """
    source = _Chunks(chunks)
    headers = tar.HeaderReader(source.inline)
    while (header := headers.read()) is not None:
        yield _entry(header, _content(header, source))


class _Budget:
    """Entries, and bytes of memory, that may still be kept. Thread-safe."""

    def __init__(self, entries: int, size: int) -> None:
        self._lock = threading.Lock()
        self._entries = entries
        self._size = size

    def reserve(self, size: int) -> tuple[int, int]:
        """Take a step, or what is left if that is enough for an entry of ``size`` bytes; else (0, 0)."""
        with self._lock:
            if not self._entries or size > self._size:
                return 0, 0
            entries, size = min(_STEP[0], self._entries), min(max(_STEP[1], size), self._size)
            self._entries -= entries
            self._size -= size
            return entries, size

    def give_back(self, entries: int, size: int) -> None:
        """Of what was reserved."""
        with self._lock:
            self._entries += entries
            self._size += size


class LayerEntries:
    """Gathers the entries of a layer while it is imported, as ``read_entries`` would read them back.

    Gives up when the budget that it shares with other layers is used up. One thread at a time.
    """

    __slots__ = ("_budget", "_entries", "_external", "_ids", "_left", "_reserved")

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget
        # Both of entries and of bytes.
        self._reserved = self._left = (0, 0)
        self._entries: list[Entry] | None = []
        # Index and size of those whose content is an object, and these objects as far as they are known.
        self._external: list[tuple[int, int]] = []
        self._ids: list[ObjectId] = []

    def add(self, header: tar.TarHeader, content: Buffer) -> None:
        """Add the next entry; ``content`` is that of a file small enough to be inline."""
        entries = self._entries
        if entries is None:
            return
        entry = _entry(header, Inline(bytes(content)))
        if not self._spend(_memory(entry)):
            self.give_up()
            return
        if header.is_external:
            self._external.append((len(entries), header.size))
        entries.append(entry)

    def add_object(self, id_: ObjectId) -> None:
        """Add the next object of the layer: there is one for each content that is not inline, in order."""
        if self._entries is not None:
            self._ids.append(id_)

    def _spend(self, size: int) -> bool:
        """Whether there is room for another entry of ``size`` bytes, which is used then."""
        entries, left = self._left
        if not entries or left < size:
            more = self._budget.reserve(size)
            if not more[0]:
                return False
            self._reserved = self._reserved[0] + more[0], self._reserved[1] + more[1]
            entries, left = entries + more[0], left + more[1]
        self._left = entries - 1, left - size
        return True

    def give_up(self) -> None:
        """Drop all entries, and give back what was reserved for them."""
        self._entries = None
        self._external.clear()
        self._ids.clear()
        self._budget.give_back(*self._reserved)
        self._reserved = self._left = (0, 0)

    def finish(self) -> list[Entry] | None:
        """The entries; None if there was no room for them. What they do not need is given back."""
        entries = self._entries
        if entries is not None:
            for (at, size), id_ in zip(self._external, self._ids, strict=True):
                path, stat, _ = entries[at]
                entries[at] = Entry(path, stat, External(id_, size))
            self._budget.give_back(*self._left)
            self._reserved = self._reserved[0] - self._left[0], self._reserved[1] - self._left[1]
            self._left = (0, 0)
        return entries


class KeptEntries:
    """The entries of layers by stream id, for who needs them soon: see ``LayerEntries``.

    ``limit`` bounds the number, ``max_size`` the memory of all that are kept or being gathered. Thread-safe.
    """

    def __init__(self, limit: int = MAX_KEPT, max_size: int = MAX_KEPT_SIZE) -> None:
        self._lock = threading.Lock()
        self._budget = _Budget(limit, max_size)
        self._layers: dict[ObjectId, list[Entry]] = {}

    def gather(self) -> LayerEntries:
        """For a layer that is being imported."""
        return LayerEntries(self._budget)

    def keep(self, layer: ObjectId, gathered: LayerEntries) -> None:
        """Keep the entries of an imported layer, if there was room for them."""
        entries = gathered.finish()
        if entries is None:
            return
        with self._lock:
            if layer not in self._layers:
                self._layers[layer] = entries
                return
        gathered.give_up()

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
