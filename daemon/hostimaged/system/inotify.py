"""Watching directories for changes by anybody (inotify(7)): watches, and events of a few kinds.

Nothing here waits: the descriptor is non-blocking, and readable when there are events. A watch does not keep
the file system of its directory busy.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from hostimaged.system import syscalls

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

#: Bytes taken by one ``read``: some thousand events, so that a storm of them is taken in bounded steps.
READ_SIZE: Final = 64 << 10
#: watch, mask, cookie, length of the name.
_HEADER: Final = struct.Struct("=iIII")


class Mask(IntFlag):
    """Kinds of events, as numbered in ``linux/inotify.h``; more than one may be told at once."""

    CLOSE_WRITE = 0x8
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    #: The watched directory itself is gone, or has another name.
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    #: Its file system was unmounted, which ends the watch.
    UNMOUNT = 0x2000
    #: Events were lost; of no watch.
    OVERFLOW = 0x4000
    #: The watch has ended.
    IGNORED = 0x8000
    IS_DIRECTORY = 0x40000000


#: What a watch tells of: names that come and go, and files that were written to in place.
_WATCHED: Final = (
    Mask.CLOSE_WRITE
    | Mask.MOVED_FROM
    | Mask.MOVED_TO
    | Mask.CREATE
    | Mask.DELETE
    | Mask.DELETE_SELF
    | Mask.MOVE_SELF
)


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the entry ``name`` of the directory of ``watch``, or to the directory itself.

    ``watch`` is -1 for an overflow; ``name`` is empty where the directory itself is meant.
    """

    watch: int
    mask: Mask
    name: bytes = b""


class Inotify:
    """Watches directories; a context manager. Methods raise ``OSError``; one thread at a time."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = syscalls.inotify_init()

    def fileno(self) -> int:
        """The descriptor, readable when there are events."""
        return self._fd

    def watch(self, directory: int) -> int:
        """Watch the directory open as ``directory``, be it with O_PATH; the number of its watch.

        A directory has one watch, however often it is asked for. By descriptor, so that nothing is looked up
        on the way, and no automount is triggered. The descriptor stays the caller's, to be closed. Raises
        ``OSError`` with ENOSPC if the user has too many watches. Needs /proc.
        """
        return syscalls.inotify_add_watch(self._fd, f"/proc/self/fd/{directory}", _WATCHED)

    def remove(self, watch: int) -> None:
        """End a watch; one that has ended already is fine. What it told before is still to be read."""
        with contextlib.suppress(OSError):
            syscalls.inotify_remove_watch(self._fd, watch)

    def read(self) -> list[Event]:
        """The next events, none if there are none yet."""
        try:
            return parse_events(os.read(self._fd, READ_SIZE))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """End all watches. Twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_events(data: bytes) -> list[Event]:
    """The events in what was read from an inotify descriptor. Raises ``ValueError`` for half an event."""
    events = []
    at = 0
    while at < len(data):
        start = at + _HEADER.size
        if start > len(data):
            raise ValueError("half an event of inotify")
        watch, mask, _, length = _HEADER.unpack_from(data, at)
        at = start + length
        if at > len(data):
            raise ValueError("half an event of inotify")
        events.append(Event(watch, Mask(mask), data[start:at].rstrip(b"\0")))
    return events
