"""Mounts of this process alone: making a read-only mount writable without the rest of the host seeing it.

On a booted host the physical root is a read-only mount of a writable file system (composefs-rs 0.9, boot
initramfs; bootc does the same before it writes).
"""

from __future__ import annotations

import os
import re
import select
from pathlib import Path
from typing import Final

from hostimaged.system import syscalls

#: Flags of a mount that a remount must repeat, by their bit in statvfs (statvfs(3)) and in mount(2).
_KEPT_FLAGS: Final = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_MOUNT_TABLE: Final = Path("/proc/self/mountinfo")


def make_writable(path: Path) -> None:
    """Make the mount that ``path`` lies on writable for this process and its children only.

    Does nothing if it is writable already or ``path`` does not exist. What the file system or its device
    forbids stays forbidden. Call it before the first thread. Raises ``OSError``, with EPERM for a lack of
    CAP_SYS_ADMIN.
    """
    try:
        flags = os.statvfs(path).f_flag
    except FileNotFoundError:
        return
    if not flags & os.ST_RDONLY:
        return
    mount_point = _mount_point(path)
    syscalls.unshare_mounts()
    # A slave: what the host unmounts later goes away here too, and nothing of ours goes back.
    syscalls.mount("/", syscalls.MS_REC | syscalls.MS_SLAVE)
    kept = sum(bit for known, bit in _KEPT_FLAGS.items() if flags & known)
    syscalls.mount(mount_point, syscalls.MS_REMOUNT | syscalls.MS_BIND | kept)


class MountChanges:
    """Tells when mounts come or go: ``fileno`` is readable then, once for a change (proc_pid_mounts(5)).

    Raises ``OSError``.
    """

    __slots__ = ("_epoll", "_table")

    def __init__(self) -> None:
        self._table = _MOUNT_TABLE.open("rb", buffering=0)
        try:
            # The file itself always counts as readable; that it changed is news of another kind, for which
            # event loops do not ask.
            self._epoll = select.epoll()
            self._epoll.register(self._table, select.EPOLLPRI)
        except BaseException:
            self._table.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._epoll.fileno()

    def take(self) -> None:
        """The change was noticed: the descriptor is readable again after the next one."""
        self._epoll.poll(0)

    def close(self) -> None:
        """Look no longer. Twice is harmless."""
        self._epoll.close()
        self._table.close()


def _mount_point(path: Path) -> bytes:
    """Where the mount that ``path`` lies on is mounted; the last line of the table covers earlier ones."""
    resolved = os.fsencode(path.resolve())
    best = b"/"
    for line in _MOUNT_TABLE.read_bytes().splitlines():
        point = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), line.split(b" ")[4])
        inside = resolved == point or resolved.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= len(best):
            best = point
    return best
