"""The names of a repository: symbolic links below ``streams`` and ``images``.

Facts: composefs-rs 0.9, repository layout. Whether what a name stands for is stored is the caller's business.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from hostimaged.errors import CorruptRepository, InvalidArgs, from_os_error, printable
from hostimaged.system import durable, syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

REFS: Final = "refs"
_DIRECTORY_MODE: Final = 0o755
#: Longest file name, and longest path, of Linux.
_NAME_MAX: Final = 255
_PATH_MAX: Final = 4000
#: Depth of directories below ``refs`` that is walked into: OCI tags need two.
_MAX_DEPTH: Final = 64


def check_name(name: str) -> str:
    """``name`` if it can be a single entry of a directory; raises ``InvalidArgs``."""
    if not 0 < len(os.fsencode(name)) <= _NAME_MAX or "/" in name or "\0" in name or name in {".", ".."}:
        raise InvalidArgs(f"{printable(name)!r} cannot be a name in a repository")
    return name


def check_reference(reference: str) -> str:
    """``reference`` if it can be the path of a named reference; raises ``InvalidArgs``."""
    if len(os.fsencode(reference)) > _PATH_MAX:
        raise InvalidArgs("the name of a reference is too long")
    for part in reference.split("/"):
        check_name(part)
    return reference


def link_text(link: str, target: str) -> str:
    """What a link at ``link`` must say to lead to ``target``, both paths in the repository.

    The leading components that the parent of ``link`` and ``target`` have in common are left out of the way.
    """
    parent = link.split("/")[:-1]
    way = target.split("/")
    while parent and way and parent[0] == way[0]:
        del parent[0], way[0]
    return "/".join([".."] * len(parent) + way)


class NameTable:
    """Makes, reads and lists the links below the directory open as ``root``, which stays the caller's.

    Methods raise ``NoSpace``, ``ReadOnly`` or ``StorageError``. Thread-safe.
    """

    __slots__ = ("_root",)

    def __init__(self, root: int) -> None:
        self._root = root

    def set(self, link: str, target: str) -> None:
        """Let ``link`` lead to ``target``, replacing another link in one step. Missing directories are made.

        Both are paths in the repository. Not synced.
        """
        *parents, name = link.split("/")
        try:
            directory = self._make_directories(parents)
            try:
                durable.replace_symlink(
                    link_text(link, target), name, directory=directory, temporary_directory=self._root
                )
            finally:
                os.close(directory)
        except OSError as error:
            raise from_os_error(error, f"cannot set {printable(link)} in the repository") from error

    def _make_directories(self, parts: list[str]) -> int:
        """A descriptor of the directory ``parts``, made if need be."""
        path = "/".join(parts)
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            return syscalls.open_beneath(self._root, path, flags)
        except FileNotFoundError:
            pass
        for end in range(1, len(parts) + 1):
            try:
                os.mkdir("/".join(parts[:end]), _DIRECTORY_MODE, dir_fd=self._root)
            except FileExistsError:
                continue
        return syscalls.open_beneath(self._root, path, flags)

    def read(self, link: str) -> str | None:
        """The text of ``link``, None if there is none. Anything but a link raises ``CorruptRepository``."""
        try:
            return os.readlink(link, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            # EINVAL is how readlink says that it is something else.
            raise CorruptRepository(f"{printable(link)} in the repository is not a link") from error

    def open(self, link: str) -> int | None:
        """A descriptor of the file that ``link`` leads to, None if that is missing.

        Links are followed inside the repository only; raises ``CorruptRepository`` for other than a file.
        """
        try:
            # O_NONBLOCK: a fifo put there must not hang us.
            fd = syscalls.open_beneath(self._root, link, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise from_os_error(error, f"cannot open {printable(link)} of the repository") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CorruptRepository(f"{printable(link)} in the repository is not a file")
        return fd

    def leads_somewhere(self, link: str) -> bool:
        """Whether what ``link`` leads to is there."""
        fd = self.open(link)
        if fd is None:
            return False
        os.close(fd)
        return True

    def remove(self, link: str) -> bool:
        """Remove ``link``; says whether it was there. Directories that become empty stay. Not synced."""
        try:
            os.unlink(link, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise from_os_error(error, f"cannot remove {printable(link)} from the repository") from error
        return True

    def modified(self, link: str) -> float | None:
        """When ``link`` itself was made, in seconds since the epoch; None if it is missing."""
        try:
            return os.stat(link, dir_fd=self._root, follow_symlinks=False).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise from_os_error(error, f"cannot read {printable(link)} of the repository") from error

    def entries(self, directory: str) -> list[str]:
        """The names of the links in ``directory``, sorted; [] if it is missing."""
        return sorted(name for name, kind in self._scan(directory) if kind == stat.S_IFLNK)

    def references(self, directory: str) -> dict[str, str]:
        """All links below ``directory``: path from there to the last component of the text, sorted by path.

        Reads without a lock: what vanishes meanwhile is left out, as is anything but links and directories.
        """
        found: dict[str, str] = {}
        pending = [(directory, "", 0)]
        while pending:
            path, prefix, depth = pending.pop()
            for name, kind in self._scan(path):
                if kind == stat.S_IFDIR and depth < _MAX_DEPTH:
                    pending.append((f"{path}/{name}", f"{prefix}{name}/", depth + 1))
                elif kind == stat.S_IFLNK:
                    try:
                        text = self.read(f"{path}/{name}")
                    except CorruptRepository:
                        continue
                    if text is not None:
                        found[prefix + name] = text.rpartition("/")[2]
        return dict(sorted(found.items()))

    def _scan(self, directory: str) -> Iterator[tuple[str, int]]:
        """Names and types of the entries of ``directory``; those that are not UTF-8 are no one's."""
        try:
            fd = syscalls.open_beneath(self._root, directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with os.scandir(fd) as entries:
                    found = [(entry.name, _kind(entry)) for entry in entries]
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise from_os_error(error, f"cannot list {printable(directory)} of the repository") from error
        for name, kind in found:
            try:
                name.encode()
            except UnicodeEncodeError:
                continue
            yield name, kind


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else 0
