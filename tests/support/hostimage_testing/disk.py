"""A disk that fails at any chosen change of the file system that this process makes, in whatever thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hostimaged.errors import HostimageError, NoSpace, ReadOnly, StorageError
from hostimaged.system import syscalls

#: What each failure is to be told as.
EXPECTED: dict[int, type[HostimageError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EROFS: ReadOnly,
    errno.EIO: StorageError,
}

_CHANGES = ("write", "mkdir", "symlink", "link", "rename", "unlink", "fsync", "fchmod")
_OTHER_CHANGES = ("syncfs", "rename_noreplace", "rename_exchange")
#: Only trees with metadata need these: /etc, and what is removed as a whole.
_CHANGES_OF_TREES = (
    "fchown",
    "chown",
    "chmod",
    "setxattr",
    "removexattr",
    "utime",
    "mknod",
    "rmdir",
    "copy_file_range",
    "ftruncate",
)


class Crash(BaseException):
    """The machine stopped."""


class Disk:
    """Fails the change number ``at`` of the file system, counted from 0, with ``code``; or crashes there.

    ``trees``: changes of metadata, and removed directories, count too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tmpfile: bool = True, trees: bool = False) -> None:
        self._tmpfile = tmpfile
        self._names = _CHANGES + (_CHANGES_OF_TREES if trees else ())
        self.at = -1
        self.code = 0
        self.count = 0
        self._lock = threading.Lock()
        self._patch = monkeypatch
        self._open, self._write, self._unlink, self._mkdir = os.open, os.write, os.unlink, os.mkdir

    def install(self) -> None:
        for module, names in ((os, self._names), (syscalls, _OTHER_CHANGES)):
            for name in names:
                self._patch.setattr(module, name, self._failing(getattr(module, name)))
        self._patch.setattr(os, "write", self._short_write)
        self._patch.setattr(os, "open", self._creating_open)

    def plan(self, at: int, code: int) -> None:
        self.at, self.code, self.count = at, code, 0

    def _step(self) -> None:
        with self._lock:
            count, self.count = self.count, self.count + 1
        if self.at < 0 or count < self.at:
            return
        if not self.code:
            raise Crash
        if count == self.at:
            raise OSError(self.code, os.strerror(self.code))

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Cleaning up after an error is done as far as it goes: a failure there is not told.
            cleaning = self.code and real is self._unlink and str(args[0]).startswith(".")
            # What is there already is told before anything else, on every file system.
            there = real is self._mkdir and _exists(args[0], kwargs.get("dir_fd"))
            if not cleaning and not there:
                self._step()
            return real(*args, **kwargs)

        return call

    def _short_write(self, fd: int, data: bytes) -> int:
        """A full disk takes the first bytes."""
        try:
            self._step()
        except BaseException:
            self._write(fd, bytes(data)[: len(data) // 2])
            raise
        return self._write(fd, data)

    def _creating_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            if not self._tmpfile:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            self._step()
        elif flags & os.O_CREAT:
            self._step()
        return self._open(path, flags, mode, dir_fd=dir_fd)


def _exists(path: Any, directory: int | None) -> bool:
    try:
        os.stat(path, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
