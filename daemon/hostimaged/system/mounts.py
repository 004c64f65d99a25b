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

from hostimaged.system import mountcalls, syscalls

#: Flags of a mount that a remount must repeat, by their bit in statvfs (statvfs(3)) and in mount(2).
_KEPT_FLAGS: Final = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_MOUNT_TABLE: Final = Path("/proc/self/mountinfo")
#: The inode of the root of each subvolume of btrfs.
_SUBVOLUME: Final = 256


def make_writable(path: Path) -> None:
    """Make the mount that ``path`` lies on writable for this process and its children only.

    Does nothing if it is writable already, ``path`` does not exist, or an automount waits there. What the
    file system or its device forbids stays forbidden. Call it before the first thread. Raises ``OSError``,
    with EPERM for a lack of CAP_SYS_ADMIN.
    """
    try:
        fd = mountcalls.open_without_automount(path)
    except FileNotFoundError:
        return
    try:
        flags = os.fstatvfs(fd).f_flag
    finally:
        os.close(fd)
    if not flags & os.ST_RDONLY:
        return
    mount_point = _mount_point(path)
    syscalls.unshare_mounts()
    # A slave: what the host unmounts later goes away here too, and nothing of ours goes back.
    syscalls.mount("/", syscalls.MS_REC | syscalls.MS_SLAVE)
    kept = sum(bit for known, bit in _KEPT_FLAGS.items() if flags & known)
    syscalls.mount(mount_point, syscalls.MS_REMOUNT | syscalls.MS_BIND | kept)


def sources_at(table: Path | None, path: Path) -> list[str]:
    """What is mounted at exactly ``path``, by the names of the sources; the one that is seen is the last.

    ``table`` is the table of mounts of another process, None for our own. Raises ``OSError``.
    """
    wanted = os.fsencode(path.resolve())
    found = []
    for line in (table or _MOUNT_TABLE).read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        if _plain(before.split(b" ")[4]) == wanted:
            found.append(os.fsdecode(_plain(after.split(b" ")[1])))
    return found


def _plain(field: bytes) -> bytes:
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field)


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
        point = _plain(line.split(b" ")[4])
        inside = resolved == point or resolved.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= len(best):
            best = point
    return best


def is_elsewhere(parent: Path, name: str) -> bool:
    """Whether the directory ``name`` in ``parent`` has its place elsewhere: a link, or a directory that is
    bound there. A whole file system, or subvolume, that is mounted there has no other place.

    False for what is missing. Raises ``OSError``.
    """
    try:
        if (parent / name).is_symlink():
            return True
        inside, outside = (
            os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (parent / name, parent)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        mount = _mount_id(inside)
        if mount == _mount_id(outside) or os.fstat(inside).st_ino == _SUBVOLUME:
            return False
        lines = (line.split(b" ", 4) for line in _MOUNT_TABLE.read_bytes().splitlines())
        return any(int(fields[0]) == mount and fields[3] != b"/" for fields in lines)
    finally:
        os.close(inside)
        os.close(outside)


def _mount_id(fd: int) -> int:
    """The mount that the file open as ``fd`` lies on, as the table of mounts numbers it."""
    facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return next(int(line.split()[1]) for line in facts.splitlines() if line.startswith("mnt_id:"))
