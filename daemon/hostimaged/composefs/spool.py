"""A place for bytes on their way: memory for few, an unlinked temporary file for many."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Final

from hostimaged.errors import StorageError, from_os_error
from hostimaged.system.durable import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.composefs.fsverity import Buffer

#: Bytes read back at a time.
PIECE: Final = 1 << 20


def temporary_file() -> int:
    """A descriptor of an unnamed file in the directory for temporary files, read and write."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Spool:
    """Bytes appended, then read back: in memory up to ``limit`` bytes, beyond it in a file.

    ``make_file`` makes that file when it is needed, as a descriptor of its own. One thread at a time. Methods
    raise ``NoSpace`` or ``StorageError``.
    """

    __slots__ = ("_fd", "_file_size", "_limit", "_make_file", "_memory")

    def __init__(self, limit: int, make_file: Callable[[], int]) -> None:
        self._limit = limit
        self._make_file = make_file
        self._memory = bytearray()
        self._fd = -1
        self._file_size = 0

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self._file_size + len(self._memory)

    def append(self, data: Buffer) -> None:
        """Add ``data`` at the end."""
        self._memory += data
        if len(self._memory) > self._limit:
            self._spill()

    def _spill(self) -> None:
        try:
            if self._fd < 0:
                self._fd = self._make_file()
            os.lseek(self._fd, self._file_size, os.SEEK_SET)
            write_all(self._fd, self._memory)
        except OSError as error:
            raise from_os_error(error, "cannot write a temporary file") from error
        self._file_size += len(self._memory)
        self._memory.clear()

    def pieces(self) -> Iterator[Buffer]:
        """Everything appended, in pieces of about a MiB; nothing may be appended meanwhile."""
        at = 0
        while at < self._file_size:
            try:
                piece = os.pread(self._fd, min(PIECE, self._file_size - at), at)
            except OSError as error:
                raise from_os_error(error, "cannot read a temporary file") from error
            if not piece:
                raise StorageError("a temporary file became shorter")
            yield piece
            at += len(piece)
        if self._memory:
            yield self._memory

    def clear(self) -> None:
        """Forget the content; the file is kept for the next."""
        self._memory.clear()
        self._file_size = 0

    def close(self) -> None:
        """Forget the content and close the file. Twice is harmless."""
        self.clear()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
