"""Files of an image, read the same way from its tree in a repository and from a directory on disk.

Paths are absolute within the image and symbolic links are followed within it: nothing outside is reached.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from hostimaged.composefs.tree import (
    Directory,
    External,
    ExternalNoVerity,
    Inline,
    Leaf,
    Sparse,
    Symlink,
)
from hostimaged.errors import UnsupportedImage, from_os_error, printable
from hostimaged.system.syscalls import open_beneath

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Node

#: Symbolic links followed for one path, as in the kernel.
MAX_LINKS: Final = 40
#: Names of one directory that ``names`` gives. Entries of boot loaders and drop-ins are a handful.
MAX_NAMES: Final = 100_000


class ImageFiles(Protocol):
    """Read access to the files of an image. All methods raise ``UnsupportedImage`` naming the path."""

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        """Content of the regular file at ``path``, None if there is nothing.

        Raises for more than ``limit`` bytes and for anything but a regular file. Without ``follow`` also for
        a symbolic link or a file on the way.
        """

    def names(self, path: str) -> list[bytes]:
        """Names in the directory ``path``, sorted by their bytes; none if it is absent."""

    def open(self, path: str) -> int | None:
        """A descriptor to read the regular file at ``path`` from, the caller's to close; None if absent."""


class TreeFiles:
    """Files of a tree whose contents are in ``repository``; objects are verified as the repository does."""

    def __init__(self, root: Directory, repository: Repository) -> None:
        self._root = root
        self._repository = repository

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        """See ``ImageFiles``."""
        leaf = self._file(path, follow=follow)
        if leaf is None:
            return None
        if content_size(leaf) > limit:
            _refuse(path, f"larger than {limit} bytes")
        if isinstance(leaf.content, External | ExternalNoVerity):
            return self._repository.read_object(leaf.content.id, limit)
        return leaf.content.data if isinstance(leaf.content, Inline) else bytes(content_size(leaf))

    def names(self, path: str) -> list[bytes]:
        """See ``ImageFiles``."""
        return sorted(self.entries(path))

    def entries(self, path: str) -> Mapping[bytes, Node]:
        """What is in the directory ``path``, symbolic links as such; nothing if it is absent."""
        node = self._lookup(path, follow=True)
        if node is None:
            return {}
        if not isinstance(node, Directory):
            _refuse(path, "not a directory")
        return node.entries

    def open(self, path: str) -> int | None:
        """See ``ImageFiles``."""
        leaf = self._file(path, follow=True)
        return None if leaf is None else open_content(leaf, self._repository)

    def _file(self, path: str, *, follow: bool) -> Leaf | None:
        node = self._lookup(path, follow=follow)
        if node is None:
            return None
        if not is_regular(node):
            _refuse(path, "not a regular file")
        return node if isinstance(node, Leaf) else None

    def _lookup(self, path: str, *, follow: bool) -> Node | None:
        """The node at ``path``; links lead on from where they are, and ``..`` of the root is the root."""
        pending = list(reversed(os.fsencode(path).split(b"/")))
        above: list[Directory] = []
        node: Node = self._root
        links = 0
        while pending:
            name = pending.pop()
            if name in (b"", b"."):
                continue
            if not isinstance(node, Directory):
                if not follow:
                    _refuse(path, "a file in place of a directory")
                return None
            if name == b"..":
                node = above.pop() if above else self._root
                continue
            child = node.entries.get(name)
            if child is None:
                return None
            if isinstance(child, Leaf) and isinstance(child.content, Symlink):
                links += 1
                if not follow or links > MAX_LINKS:
                    _refuse(path, "too many symbolic links" if follow else "a symbolic link")
                target = child.content.target
                if target.startswith(b"/"):
                    above, node = [], self._root
                pending.extend(reversed(target.split(b"/")))
                continue
            if isinstance(child, Directory):
                above.append(node)
            node = child
        return node


class DirectoryFiles:
    """Files below ``root``, a directory on disk that is taken for the root directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        """See ``ImageFiles``; on a mounted image links are always followed, as composefs-rs does."""
        fd = self.open(path)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            try:
                data = file.read(limit + 1)
            except OSError as error:
                raise from_os_error(error, f"cannot read {path} of the image") from error
        if len(data) > limit:
            _refuse(path, f"larger than {limit} bytes")
        return data

    def names(self, path: str) -> list[bytes]:
        """See ``ImageFiles``."""
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        if fd is None:
            return []
        try:
            found = sorted(os.fsencode(name) for name in os.listdir(fd))
        except OSError as error:
            raise from_os_error(error, f"cannot read {path} of the image") from error
        finally:
            os.close(fd)
        if len(found) > MAX_NAMES:
            _refuse(path, f"more than {MAX_NAMES} names")
        return found

    def open(self, path: str) -> int | None:
        """See ``ImageFiles``."""
        # Not to hang on a pipe, which is refused below like everything else that is no file.
        fd = self._open(path, os.O_RDONLY | os.O_NONBLOCK)
        if fd is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            _refuse(path, "not a regular file")
        return fd

    def _open(self, path: str, flags: int) -> int | None:
        try:
            return open_beneath(self._root, path, flags)
        except OSError as error:
            if error.errno == errno.ENOENT or (error.errno == errno.ENOTDIR and not flags & os.O_DIRECTORY):
                return None
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                _refuse(path, (error.strerror or "").lower())
            raise from_os_error(error, f"cannot open {path} of the image") from error


def is_regular(node: Node) -> bool:
    """Whether this is a regular file, whatever holds its content."""
    return isinstance(node, Leaf) and isinstance(node.content, Inline | External | ExternalNoVerity | Sparse)


def content_size(leaf: Leaf) -> int:
    """Bytes of a regular file."""
    content = leaf.content
    if isinstance(content, Inline):
        return len(content.data)
    return content.size if isinstance(content, External | ExternalNoVerity | Sparse) else 0


def open_content(leaf: Leaf, repository: Repository) -> int:
    """A descriptor at the start of a regular file's content, the caller's to close.

    The object itself where there is one, so nothing is copied; else memory. Raises ``ObjectMissing`` and
    ``VerityMismatch``.
    """
    content = leaf.content
    if isinstance(content, External | ExternalNoVerity):
        return repository.open_object(content.id)
    fd = os.memfd_create("image-file", os.MFD_CLOEXEC)
    try:
        if isinstance(content, Inline):
            os.pwrite(fd, content.data, 0)
        else:
            os.ftruncate(fd, content_size(leaf))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse(path: str, why: str) -> NoReturn:
    raise UnsupportedImage(f"{printable(path)} of the image: {why}")
