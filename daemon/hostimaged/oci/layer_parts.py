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
    from hostimaged.oci.tar import TarHeader

#: Entries of a layer: a million take some 500 MB as a tree; the largest OS images known have 200,000.
MAX_ENTRIES: Final = 1_000_000
#: Contents up to this size come in one buffer, larger ones in pieces.
SMALL: Final = 1 << 20


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


class LayerSplitter:
    """Splits a tar by the rules of composefs-rs 0.9 (splitstream): contents of over 64 bytes are taken out.

    ``fetch`` gives the tar in buffers, None at its end; ``emit`` gets its parts, one after the other. Nothing
    is dropped: all parts together are the tar, with padding and whatever follows the end marker. Buffers must
    not change after they were given. With ``take``, contents of over 64 bytes are not among the buffers: it
    is called with their size where one is due.
    """

    def __init__(
        self,
        fetch: Callable[[], Buffer | None],
        emit: Callable[[Part, Buffer], object],
        take: Callable[[int], object] | None = None,
    ) -> None:
        self._emit = emit
        self._take = take
        self._window = Window(fetch, lambda buffer: emit(Part.INLINE, buffer))

    def run(self, notice: Callable[[TarHeader, Buffer], object] | None = None) -> int:
        """Split everything; the number of entries. Raises ``UnsupportedImage``.

        ``notice`` is told of each entry after its parts: the header, and the content if that stays.
        """
        window = self._window
        headers = HeaderReader(window.inline)
        while (header := headers.read()) is not None:
            if headers.count > MAX_ENTRIES:
                raise UnsupportedImage(f"over {MAX_ENTRIES} entries")
            size = header.size
            rest = padding(size)
            if header.is_external:
                self._content(size)
            else:
                rest += size
            content = window.inline(rest) if rest else b""
            if rest and not content:
                raise ends_early()
            if notice is not None:
                notice(header, b"" if header.is_external else content[:size])
        window.inline_rest()
        return headers.count

    def _content(self, size: int) -> None:
        if self._take is not None:
            if not self._window.settle():
                raise UnsupportedImage("a content is where it should not be")
            self._take(size)
            return
        if size <= SMALL:
            self._emit(Part.CONTENT, self._window.content(size))
            return
        for buffer in self._window.content_parts(size):
            size -= len(buffer)
            self._emit(Part.PIECE if size else Part.LAST_PIECE, buffer)
