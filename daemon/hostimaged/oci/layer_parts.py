"""A layer's tar taken apart: what stays in the stream, and contents, in their order."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.tar import HeaderReader, padding
from hostimaged.oci.window import Window, ends_early

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.composefs.fsverity import Buffer

#: Entries of a layer: a million take some 500 MB as a tree; the largest OS images known have 200,000.
MAX_ENTRIES: Final = 1_000_000
#: Contents up to this size come in one buffer, larger ones in pieces.
_SMALL: Final = 1 << 20
#: A batch ends when it has so many bytes or parts: large enough that passing it to another thread costs
#: nothing, small enough that memory is bounded by a few of them.
_BATCH_BYTES: Final = 1 << 19
_BATCH_PARTS: Final = 256


class Part(IntEnum):
    """What to do with a buffer."""

    #: It belongs to the stream itself.
    INLINE = 0
    #: It is a whole content.
    CONTENT = 1
    #: It is the next piece of a large content.
    PIECE = 2
    #: It is the last piece of a large content.
    LAST_PIECE = 3


class Batch:
    """Successive parts of a layer; its length is that of their bytes."""

    __slots__ = ("_size", "parts")

    def __init__(self) -> None:
        self.parts: list[tuple[Part, Buffer]] = []
        self._size = 0

    def append(self, part: Part, buffer: Buffer) -> None:
        """Add a part."""
        self.parts.append((part, buffer))
        self._size += len(buffer)

    @property
    def is_full(self) -> bool:
        """Whether it should be passed on."""
        return self._size >= _BATCH_BYTES or len(self.parts) >= _BATCH_PARTS

    def __len__(self) -> int:
        return self._size


class LayerSplitter:
    """Splits a tar by the rules of composefs-rs 0.9 (splitstream): contents of over 64 bytes are taken out.

    ``fetch`` gives the tar in buffers, None at its end; ``emit`` gets it in batches of parts. Nothing is
    dropped: all parts together are the tar, with padding and whatever follows the end marker.
    """

    def __init__(self, fetch: Callable[[], Buffer | None], emit: Callable[[Batch], object]) -> None:
        self._emit = emit
        self._batch = Batch()
        self._window = Window(fetch, lambda buffer: self._append(Part.INLINE, buffer))

    def run(self) -> int:
        """Split everything; the number of entries. Raises ``UnsupportedImage``."""
        window = self._window
        headers = HeaderReader(window.inline)
        while (header := headers.read()) is not None:
            if headers.count > MAX_ENTRIES:
                raise UnsupportedImage(f"over {MAX_ENTRIES} entries")
            rest = header.size + padding(header.size)
            if header.is_external:
                self._content(header.size)
                rest -= header.size
            if rest and not window.inline(rest):
                raise ends_early()
        window.inline_rest()
        self._emit(self._batch)
        return headers.count

    def _content(self, size: int) -> None:
        if size <= _SMALL:
            self._append(Part.CONTENT, self._window.content(size))
            return
        for buffer in self._window.content_parts(size):
            size -= len(buffer)
            self._append(Part.PIECE if size else Part.LAST_PIECE, buffer)

    def _append(self, part: Part, buffer: Buffer) -> None:
        batch = self._batch
        batch.append(part, buffer)
        if batch.is_full:
            self._batch = Batch()
            self._emit(batch)
