"""A queue from one thread to another, bounded by the bytes in it."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sized

_T = TypeVar("_T", bound="Sized")


class Pipe(Generic[_T]):
    """One thread writes, one reads; either may end it at any time, and the other notices at its next call.

    Holds items whose lengths add up to ``capacity``, and one item more, so that any item fits. Items are
    passed on as they are: the writer must not change them afterwards.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[_T] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._abandoned = False

    def put(self, item: _T) -> bool:
        """Pass on ``item``, waiting for room; False when the reader has gone."""
        with self._changed:
            while self._held >= self._capacity and not self._abandoned:
                self._changed.wait()
            if not self._abandoned:
                self._items.append(item)
                self._held += len(item)
                self._changed.notify()
            return not self._abandoned

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes: the reader meets the end, or ``error``, after what was written."""
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify()

    def get(self) -> _T | None:
        """The next item, waiting for it; None at the end. Raises the error the writer ended with."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            if self._items:
                item = self._items.popleft()
                self._held -= len(item)
                self._changed.notify()
                return item
            if self._error is not None:
                raise self._error
            return None

    def abandon(self) -> None:
        """The reader goes: what is in the pipe is dropped, and the writer told."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._held = 0
            self._changed.notify()
