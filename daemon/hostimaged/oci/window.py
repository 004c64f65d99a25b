"""A cursor over the bytes of a tar that lie in buffers: in place, copied only where they straddle two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.composefs.fsverity import Buffer


class Window:
    """Takes bytes from the buffers that ``fetch`` gives until it gives None.

    Bytes are taken either as part of the stream (``inline``), which hands them to ``keep`` too, or as content
    that goes elsewhere. ``keep`` gets neighbouring inline bytes in as few calls as possible, and none late:
    everything before content is handed over before the content is returned.
    """

    __slots__ = ("_at", "_fetch", "_keep", "_run", "_view")

    def __init__(self, fetch: Callable[[], Buffer | None], keep: Callable[[Buffer], object]) -> None:
        self._fetch = fetch
        self._keep = keep
        self._view = memoryview(b"")
        self._at = 0
        # Start of the inline bytes before ``_at`` that were not handed over yet.
        self._run = 0

    def inline(self, count: int) -> Buffer:
        """The next ``count`` bytes, kept inline; nothing if the data is at its end.

        Raises ``UnsupportedImage`` if it ends within them.
        """
        end = self._at + count
        if end > len(self._view) and self._at == len(self._view) and self._refill():
            end = count
        if end <= len(self._view):
            taken: Buffer = self._view[self._at : end]
            self._at = end
            return taken
        self._flush()
        taken = self._straddling(count)
        if taken:
            self._keep(taken)
        return taken

    def content(self, count: int) -> Buffer:
        """The next ``count`` bytes in one piece, not kept. For counts that may well be held in memory."""
        self._flush()
        if self._at == len(self._view):
            self._refill()
        end = self._at + count
        if end <= len(self._view):
            taken: Buffer = self._view[self._at : end]
            self._at = self._run = end
            return taken
        taken = self._straddling(count)
        if len(taken) < count:
            raise ends_early()
        return taken

    def content_parts(self, count: int) -> Iterator[Buffer]:
        """The next ``count`` bytes in pieces, not kept. To be exhausted before anything else is taken."""
        self._flush()
        while count:
            if self._at == len(self._view) and not self._refill():
                raise ends_early()
            part = self._view[self._at : self._at + count]
            self._at = self._run = self._at + len(part)
            count -= len(part)
            yield part

    def settle(self) -> bool:
        """Hand over everything taken; says whether nothing is left of the current buffer."""
        self._flush()
        return self._at == len(self._view)

    def inline_rest(self) -> int:
        """Keep everything up to the end inline; how many bytes that was."""
        count = 0
        while self._at < len(self._view) or self._refill():
            count += len(self._view) - self._at
            self._at = len(self._view)
        self._flush()
        return count

    def _flush(self) -> None:
        if self._run < self._at:
            self._keep(self._view[self._run : self._at])
            self._run = self._at

    def _refill(self) -> bool:
        """Go on to the next buffer that is not empty; all of the current one was taken."""
        self._flush()
        while (buffer := self._fetch()) is not None:
            if buffer:
                self._view = memoryview(buffer).cast("B")
                self._at = self._run = 0
                return True
        return False

    def _straddling(self, count: int) -> Buffer:
        """A copy of the next ``count`` bytes, taken but kept by nobody; empty at the end of the data."""
        taken = bytearray(self._view[self._at :])
        self._at = self._run = len(self._view)
        while len(taken) < count:
            if not self._refill():
                if taken:
                    raise ends_early()
                break
            part = self._view[: count - len(taken)]
            self._at = self._run = len(part)
            taken += part
        return taken


def ends_early() -> UnsupportedImage:
    """The error for an archive that ends where it must not."""
    return UnsupportedImage("the archive ends inside an entry")
