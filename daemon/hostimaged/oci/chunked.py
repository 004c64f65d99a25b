"""Reading structured bytes out of a stream that comes in chunks of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer


class ChunkedInput:
    """A cursor over chunks. ``view`` is what was fetched and not consumed yet; advance it by slicing.

    ``what`` names the data in the error for a stream that ends too early.
    """

    __slots__ = ("_chunks", "view", "what")

    def __init__(self, chunks: Iterable[Buffer], what: str) -> None:
        self._chunks = iter(chunks)
        self.what = what
        self.view = memoryview(b"")

    def at_end(self) -> bool:
        """Whether everything was consumed; fetches the next chunk if ``view`` is empty."""
        while not self.view:
            chunk = next(self._chunks, None)
            if chunk is None:
                return True
            self.view = memoryview(chunk).cast("B")
        return False

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end. For small counts: it copies."""
        taken = b""
        while len(taken) < count and not self.at_end():
            part = self.view[: count - len(taken)]
            self.view = self.view[len(part) :]
            taken += part
        return taken

    def exactly(self, count: int) -> bytes:
        """The next ``count`` bytes; raises ``UnsupportedImage`` if there are fewer."""
        taken = self.take(count)
        if len(taken) < count:
            raise self.ends_early()
        return taken

    def parts(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes in place, in pieces; raises ``UnsupportedImage`` if there are fewer."""
        while count:
            if self.at_end():
                raise self.ends_early()
            part = self.view[:count]
            self.view = self.view[len(part) :]
            count -= len(part)
            yield part

    def ends_early(self) -> UnsupportedImage:
        """The error for a stream that ends before its structure does."""
        return UnsupportedImage(f"the {self.what} data ends early")
