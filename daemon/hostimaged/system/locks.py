"""Advisory locks with a bounded wait, and who holds them.

Locks are ``flock`` locks, save for ``lock_record``: they belong to an open file, end when its last descriptor
is closed, and are shared by children that inherit it. Nothing here decides in which order locks are taken.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.errors import LockTimeout, from_os_error, printable
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

#: Seconds between two tries, growing: a short job is not waited for longer than need be, a long one costs
#: no CPU. The kernel has no flock with a time-out, and a thread blocked in one could not be cancelled.
_FIRST_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.1
#: What /proc/locks calls the kinds of locks. Of OFDLCK, record locks too, it does not tell who holds them.
_FLOCK: Final = "FLOCK"
_RECORD: Final = "POSIX"
#: Holders named in an error.
_NAMED: Final = 3


def lock(
    fd: int,
    *,
    exclusive: bool,
    timeout: float,
    what: str,
    check: Callable[[], None] | None = None,
) -> None:
    """Take the flock of ``fd``, waiting ``timeout`` seconds at most (0: not at all).

    ``what`` names the locked thing in errors. ``check`` is called before each wait and may raise to give up.
    A lock of the other kind held through ``fd`` is dropped first. Raises ``LockTimeout``, naming pid and
    command of the holders, or ``StorageError``.
    """
    _wait_for(lambda: syscalls.try_flock(fd, exclusive=exclusive), fd, timeout, what, check, _FLOCK)


def lock_record(fd: int, *, timeout: float, what: str, check: Callable[[], None] | None = None) -> None:
    """Take a shared record lock (fcntl(2)) on the whole file of ``fd``, as ``lock`` takes a flock.

    It ends when the file is closed. The two kinds know nothing of each other.
    """
    _wait_for(lambda: syscalls.try_record_lock(fd), fd, timeout, what, check, _RECORD)


def _wait_for(
    locked: Callable[[], bool],
    fd: int,
    timeout: float,
    what: str,
    check: Callable[[], None] | None,
    kind: str,
) -> None:
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    try:
        while not locked():
            if check is not None:
                check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockTimeout(what=what, holder=describe_holders(fd, kind))
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)
    except OSError as error:
        raise from_os_error(error, f"cannot lock {what}") from error


def unlock(fd: int) -> None:
    """Give up the flock of ``fd``, for children that share it too."""
    syscalls.unlock(fd)


def describe_holders(fd: int, kind: str = _FLOCK) -> str:
    """Who holds a lock on the file that ``fd`` has open, for people: ``pid 12 (cfsctl), pid 15``."""
    try:
        pids = _holders(fd, Path("/proc/locks").read_text(), kind)
    except OSError:
        pids = []
    if not pids:
        # Ended in the meantime, or seen from another pid namespace.
        return "another process"
    named = [_describe(pid) for pid in pids[:_NAMED]]
    if len(pids) > _NAMED:
        named.append(f"{len(pids) - _NAMED} more")
    return ", ".join(named)


def _describe(pid: int) -> str:
    if pid <= 0:
        return "a process of another pid namespace"
    try:
        command = Path(f"/proc/{pid}/comm").read_text(errors="backslashreplace").strip()
    except OSError:
        return f"pid {pid}"
    return f"pid {pid} ({printable(command)})"


def _holders(fd: int, table: str, kind: str = _FLOCK) -> list[int]:
    """The pids in ``table``, the text of /proc/locks, that hold a lock on the file of ``fd``."""
    status = os.fstat(fd)
    devices = {(os.major(status.st_dev), os.minor(status.st_dev)), _mount_device(fd)}
    pids: list[int] = []
    for line in table.splitlines():
        fields = line.split()
        # "1: FLOCK ADVISORY WRITE 1234 08:01:131085 0 EOF"; one who waits has "->" as second field.
        if len(fields) < 6 or fields[1] != kind:
            continue
        try:
            major, minor, inode = fields[5].split(":")
            device = int(major, 16), int(minor, 16)
            if int(inode) == status.st_ino and device in devices:
                pids.append(int(fields[4]))
        except ValueError:
            continue
    return pids


def _mount_device(fd: int) -> tuple[int, int] | None:
    """The device of the mount that ``fd`` lies on: on btrfs it is not the one that ``stat`` tells."""
    try:
        facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
        mount = next(line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:"))
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            fields = line.split(" ", 3)
            if fields[0] == mount:
                major, minor = fields[2].split(":")
                return int(major), int(minor)
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return None


class FileLock:
    """A lock file held while the context lasts; it is made if missing, and never removed.

    The descriptor (``fileno``) may be passed to children, which then hold the lock too. ``what`` names the
    lock in errors. Entering raises ``LockTimeout`` or ``StorageError``.
    """

    __slots__ = ("_check", "_exclusive", "_fd", "_path", "_timeout", "_what")

    def __init__(
        self,
        path: Path,
        *,
        exclusive: bool = True,
        timeout: float,
        what: str,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._exclusive = exclusive
        self._timeout = timeout
        self._what = what
        self._check = check
        self._fd = -1

    def acquire(self) -> None:
        """Open and lock the file."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise from_os_error(error, f"cannot lock {self._what}") from error
        try:
            lock(
                self._fd,
                exclusive=self._exclusive,
                timeout=self._timeout,
                what=self._what,
                check=self._check,
            )
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Close the file; the lock ends unless a child still has it. Twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def fileno(self) -> int:
        """The descriptor that holds the lock."""
        return self._fd

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
