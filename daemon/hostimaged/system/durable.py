"""Files that survive a crash: the only module that renames or calls fsync.

Two kinds of change are offered. A *replacement* (``replace_file``, ``replace_symlink``) shows either the old
or the new whole content under a name. A *new file* (``NewFile``) has no name until it is complete. Functions
raise ``OSError`` and leave nothing of theirs behind when they do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import string
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self, TypeAlias

    StrPath: TypeAlias = str | os.PathLike[str]
    Buffer: TypeAlias = bytes | bytearray | memoryview

_ALPHABET: Final = string.ascii_letters + string.digits
#: Length of the random part of a temporary name, as composefs-rs makes it: its clean-up knows ours by it.
_RANDOM_LENGTH: Final = 12
_NAME_TRIES: Final = 16

#: Directory entries of these are not whole before what they lead to is written.
_ENTRIES_HAVE_PLACES: Final = frozenset({syscalls.MSDOS_SUPER_MAGIC, syscalls.EXFAT_SUPER_MAGIC})
#: What an ``open`` with O_TMPFILE says where the file system (EOPNOTSUPP) or the kernel cannot.
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR})


def temporary_name(prefix: str) -> str:
    """``prefix`` and 12 random letters and digits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))


def write_all(fd: int, buffer: Buffer) -> None:
    """Write the whole ``buffer`` to ``fd``: a single ``write`` may be short, on a full disk for one."""
    written = os.write(fd, buffer)
    view = memoryview(buffer).cast("B")
    while written < len(view):
        written += os.write(fd, view[written:])


def sync_file(fd: int) -> None:
    """Write the file open as ``fd`` to its device."""
    os.fsync(fd)


def sync_directory(directory: int | StrPath) -> None:
    """Write the entries of a directory to its device, so that what was renamed is found there.

    On FAT an entry has where its file begins, which Linux writes with the file, not with the directory: after
    a rename a synced directory may lead to nothing yet, or to what is freed next. There all is written.
    """
    if not isinstance(directory, int):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_directory(fd)
        finally:
            os.close(fd)
    elif syscalls.filesystem_type(directory) in _ENTRIES_HAVE_PLACES:
        sync_filesystem(directory)
        # That leaves it in the cache of the disk, where the file system is one of these; fsync empties it.
        os.fsync(directory)
    else:
        os.fsync(directory)


def sync_filesystem(fd: int) -> None:
    """Write the whole file system that ``fd`` lies on to its device; raises if any write back failed."""
    syscalls.syncfs(fd)


def replace_file(path: StrPath, data: Buffer, mode: int = 0o644) -> None:
    """Give ``path`` the content ``data`` and the mode ``mode`` (umask ignored), durably when this returns."""
    path = Path(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with NewFile(directory, mode=mode, prefix=_replacement_prefix(path)) as new:
            os.fchmod(new.fd, mode)
            write_all(new.fd, data)
            sync_file(new.fd)
            new.publish(directory, path.name, replace=True)
        sync_directory(directory)
    finally:
        os.close(directory)


def remove_replacements(path: StrPath) -> None:
    """Remove what a crash in the middle of ``replace_file(path)`` left beside ``path``.

    For a caller who knows that nobody replaces it now. A missing directory is fine.
    """
    path = Path(path)
    ours = re.compile(re.escape(_replacement_prefix(path)) + f"[A-Za-z0-9]{{{_RANDOM_LENGTH}}}")
    try:
        left = [name for name in os.listdir(path.parent) if ours.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in left:
        os.unlink(path.parent / name)
    if left:
        sync_directory(path.parent)


def _replacement_prefix(path: Path) -> str:
    return f".{path.name[:200]}."


def replace_symlink(
    text: str, name: str, *, directory: int, temporary_directory: int, prefix: str = ".symlink-"
) -> bool:
    """Make ``name`` in ``directory`` a symbolic link with ``text``; says whether anything was changed.

    Replaces what is there in one step, through a temporary link in ``temporary_directory`` of the same file
    system. Not synced. A directory under that name stays, with ``OSError``.
    """
    try:
        os.symlink(text, name, dir_fd=directory)
    except FileExistsError:
        pass
    else:
        return True
    try:
        if os.readlink(name, dir_fd=directory) == text:
            return False
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:
            raise
    temporary = _with_temporary_name(prefix, lambda name: os.symlink(text, name, dir_fd=temporary_directory))
    try:
        os.rename(temporary, name, src_dir_fd=temporary_directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=temporary_directory)
        raise
    return True


def _with_temporary_name(prefix: str, make: Callable[[str], object]) -> str:
    """The temporary name for which ``make`` did not raise ``FileExistsError``."""
    for _ in range(_NAME_TRIES):
        name = temporary_name(prefix)
        try:
            make(name)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, "no free temporary name")


def write_new_file(directory: int, name: str, pieces: Iterable[Buffer], mode: int = 0o644) -> None:
    """Make the file ``name`` of ``pieces`` and sync it, but not its name; vfat, without modes, will do.

    Raises ``FileExistsError`` if the name is taken; a file that could not be written whole is removed.
    """
    fd = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory
    )
    try:
        for piece in pieces:
            write_all(fd, piece)
        sync_file(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def publish_name(directory: int, temporary: str, name: str, *, source: int | None = None) -> None:
    """Rename ``temporary`` (in ``source``, else in ``directory``) to ``name``, which is free; durably.

    Raises ``FileExistsError`` if ``name`` is taken.
    """
    source = directory if source is None else source
    try:
        syscalls.rename_noreplace(temporary, name, source_fd=source, target_fd=directory)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system without RENAME_NOREPLACE; the lock of the caller keeps others away.
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, "the name is taken") from None
        os.rename(temporary, name, src_dir_fd=source, dst_dir_fd=directory)
    sync_directory(directory)


def exchange_names(directory: int, one: str, other: str) -> None:
    """Exchange what two names in ``directory`` lead to, in one step, durably when this returns."""
    syscalls.rename_exchange(one, other, source_fd=directory, target_fd=directory)
    sync_directory(directory)


class NewFile:
    """A file being written that has no name, or a temporary one, until ``publish`` gives it its own.

    O_TMPFILE where that works, so that even a crash leaves nothing; else a name ``prefix`` + 12 characters in
    the directory. A context manager: leaving it closes the file, and removes it if it was not published.
    ``fd`` is open for reading and writing; after ``seal`` read-only. One thread at a time.
    """

    __slots__ = ("_directory", "_prefix", "_temporary", "fd")

    def __init__(
        self, directory: int, *, mode: int = 0o644, prefix: str = ".tmp-", existing: int = -1
    ) -> None:
        self._directory = directory
        self._prefix = prefix
        self._temporary: str | None = None
        self.fd = existing
        if existing >= 0:
            return
        try:
            self.fd = os.open(".", os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, mode, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._temporary = _with_temporary_name(prefix, lambda name: self._create(name, mode))

    @classmethod
    def linked(cls, fd: int, directory: int, *, prefix: str = ".tmp-") -> Self:
        """The file open as ``fd``, which has a name already, to be given another; ``fd`` stays the caller's.

        ``directory`` is where a temporary name would stand.
        """
        return cls(directory, prefix=prefix, existing=os.dup(fd))

    def _create(self, name: str, mode: int) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL
        self.fd = os.open(name, flags, mode, dir_fd=self._directory)

    def seal(self) -> None:
        """Exchange ``fd`` for a read-only one, as fs-verity demands."""
        writable, self.fd = self.fd, os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(writable)

    def publish(self, directory: int, name: str, *, replace: bool = False) -> None:
        """Give the file its name in ``directory``, which lies on the same file system. Not synced.

        Raises ``FileExistsError`` if the name is taken, unless it is to be replaced.
        """
        if self._temporary is None and not replace:
            syscalls.link_fd(self.fd, directory, name)
            return
        if self._temporary is None:
            # There is no linkat that replaces.
            self.name_temporarily()
        assert self._temporary is not None
        if replace:
            os.rename(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=directory)
        else:
            syscalls.rename_noreplace(self._temporary, name, source_fd=self._directory, target_fd=directory)
        self._temporary = None

    def name_temporarily(self) -> None:
        """Give a file without a temporary name one, until it is published or closed."""
        self._temporary = _with_temporary_name(
            self._prefix, lambda temporary: syscalls.link_fd(self.fd, self._directory, temporary)
        )

    def detach(self) -> int:
        """Hand over ``fd``, of a file without any name, as the caller's to close."""
        if self._temporary is not None:
            os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the file; one without its name is gone. Closing twice is harmless."""
        fd, self.fd = self.fd, -1
        temporary, self._temporary = self._temporary, None
        if fd >= 0:
            os.close(fd)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
