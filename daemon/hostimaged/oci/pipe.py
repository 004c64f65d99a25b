"""A queue of buffers from one thread to another, bounded by the bytes in it."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostimaged.composefs.fsverity import Buffer


class Pipe:
    """One thread writes, one reads; either may end it at any time, and the other notices at its next call.

    Holds up to ``capacity`` bytes and one buffer more, so that any buffer fits. Buffers are passed on as they
    are: the writer must not change them afterwards.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: deque[Buffer] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._abandoned = False

    def put(self, buffer: Buffer) -> bool:
        """Pass on ``buffer``, waiting for room; False when the reader has gone."""
        with self._changed:
            while self._held >= self._capacity and not self._abandoned:
                self._changed.wait()
            if not self._abandoned:
                self._buffers.append(buffer)
                self._held += len(buffer)
                self._changed.notify()
            return not self._abandoned

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes: the reader meets the end, or ``error``, after what was written."""
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify()

    def get(self) -> Buffer | None:
        """The next buffer, waiting for it; None at the end. Raises the error the writer ended with."""
        with self._changed:
            while not self._buffers and not self._ended:
                self._changed.wait()
            if self._buffers:
                buffer = self._buffers.popleft()
                self._held -= len(buffer)
                self._changed.notify()
                return buffer
            if self._error is not None:
                raise self._error
            return None

    def abandon(self) -> None:
        """The reader goes: what is in the pipe is dropped, and the writer told."""
        with self._changed:
            self._abandoned = True
            self._buffers.clear()
            self._held = 0
            self._changed.notify()
