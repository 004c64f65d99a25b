"""What lies in an ``/etc``: that of an image, read from the image and not from a mount, and one on disk.

Here are the views through which a merge looks at trees, and the comparison of a name on disk with a node of
an image. Nothing is written. Functions that look at the disk raise ``OSError``, ``trees.Changed`` among them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat as st
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Protocol

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import Image
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.tree import (
    PERMISSION_MASK,
    Directory,
    External,
    ExternalNoVerity,
    Inline,
    Leaf,
    Sparse,
    Symlink,
)
from hostimaged.errors import CorruptRepository, UnsupportedImage, from_os_error
from hostimaged.system import trees

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Node, Stat
    from hostimaged.ids import DeploymentId, ObjectId

#: systemd's stamp that ``/etc`` was brought up to date. A new deployment has none, so that the services which
#: do that run on its first boot; it is of no concern to a merge.
STAMP: Final = b".updated"

#: The label. An inode without one in a tree tells nothing: labels are never removed.
SELINUX: Final = b"security.selinux"

_PIECE: Final = 1 << 18
_USER: Final = b"user."
_ALGORITHMS: Final = {algorithm.digest_size: algorithm for algorithm in Algorithm}


# --- views -------------------------------------------------------------------------------------------------


class Kind(Enum):
    """What a name is, as far as it matters to a merge."""

    ABSENT = auto()
    DIRECTORY = auto()
    #: A regular file or a symbolic link.
    FILE = auto()
    #: A device, fifo or socket: not merged, as in bootc.
    SPECIAL = auto()


def kind_of_mode(mode: int) -> Kind:
    """The kind of a file with this ``st_mode``."""
    if st.S_ISDIR(mode):
        return Kind.DIRECTORY
    return Kind.FILE if st.S_ISREG(mode) or st.S_ISLNK(mode) else Kind.SPECIAL


def kind_of_node(node: Node | None) -> Kind:
    """The kind of a node of an image."""
    if node is None:
        return Kind.ABSENT
    if isinstance(node, Directory):
        return Kind.DIRECTORY
    merged = isinstance(node.content, Inline | External | ExternalNoVerity | Sparse | Symlink)
    return Kind.FILE if merged else Kind.SPECIAL


class View(Protocol):
    """A directory of the new ``/etc``, of which only the kinds of names matter."""

    def kind(self, name: bytes) -> Kind:
        """What ``name`` is."""

    def enter(self, name: bytes) -> AbstractContextManager[View]:
        """The directory ``name``; one without any names if that is no directory."""


class ImageView:
    """A directory of an image, or none."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Directory | None) -> None:
        self._directory = directory

    def kind(self, name: bytes) -> Kind:
        """What ``name`` is."""
        return Kind.ABSENT if self._directory is None else kind_of_node(self._directory.entries.get(name))

    def enter(self, name: bytes) -> AbstractContextManager[View]:
        """The directory ``name``; one without any names if that is no directory."""
        node = None if self._directory is None else self._directory.entries.get(name)
        return contextlib.nullcontext(ImageView(node if isinstance(node, Directory) else None))


class DiskView:
    """The directory open as ``fd``, which stays the caller's."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def kind(self, name: bytes) -> Kind:
        """What ``name`` is."""
        try:
            return kind_of_mode(trees.status(name, self._fd).st_mode)
        except trees.Changed:
            return Kind.ABSENT

    @contextlib.contextmanager
    def enter(self, name: bytes) -> Iterator[View]:
        """The directory ``name``; one without any names if that is no directory."""
        if self.kind(name) is not Kind.DIRECTORY:
            yield ImageView(None)
            return
        with trees.opened_directory(name, self._fd) as fd:
            yield DiskView(fd)


# --- the image ---------------------------------------------------------------------------------------------


def read_image(repository: Repository, deployment: DeploymentId) -> Directory:
    """The root of the tree of the image that ``deployment`` boots.

    Raises ``ImageNotFound``, ``CorruptRepository`` or ``StorageError``.
    """
    return _open_image(repository, deployment).tree()


def open_image_tree(repository: Repository, deployment: DeploymentId) -> Directory:
    """The same for looking up single files: directories are read when they are entered.

    Raises as ``read_image``, and ``ErofsError`` later.
    """
    return _open_image(repository, deployment).lazy_tree()


def _open_image(repository: Repository, deployment: DeploymentId) -> Image:
    """The image in memory as long as it is used."""
    fd = repository.open_image(str(deployment))
    try:
        if not os.fstat(fd).st_size:
            raise CorruptRepository(f"image {deployment} is empty")
        data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        return Image(memoryview(data), repository.algorithm, name=f"image {deployment}")
    except OSError as error:
        raise from_os_error(error, f"cannot read image {deployment}") from error
    finally:
        os.close(fd)


def subdirectory(root: Directory, name: bytes) -> Directory:
    """``/etc`` or ``/var`` of an image; raises ``UnsupportedImage`` if it is no directory there."""
    found = root.entries.get(name)
    if not isinstance(found, Directory):
        raise UnsupportedImage(f"the image has no directory /{name.decode()}")
    return found


# --- comparing ---------------------------------------------------------------------------------------------


def comparable_xattrs(xattrs: Mapping[bytes, bytes], *, mode: int) -> dict[bytes, bytes]:
    """Extended attributes in a form that compares, of an inode with the type in ``mode``.

    A label read from a kernel with SELinux ends with a NUL, in an image it does not. The kernel has
    ``user.*`` for files and directories only, an image may name it for others.
    """
    with_user = st.S_ISREG(mode) or st.S_ISDIR(mode)
    return {
        name: value.removesuffix(b"\0") if name == SELINUX else value
        for name, value in xattrs.items()
        if with_user or not name.startswith(_USER)
    }


def same_metadata(stat: Stat, found: os.stat_result, xattrs: Mapping[bytes, bytes]) -> bool:
    """Whether mode, owner and extended attributes agree; times do not matter, nor the mode of a link."""
    mode = found.st_mode
    if stat.uid != found.st_uid or stat.gid != found.st_gid:
        return False
    if not st.S_ISLNK(mode) and stat.mode & PERMISSION_MASK != st.S_IMODE(mode):
        return False
    if not stat.xattrs and not xattrs:
        return True
    return comparable_xattrs(stat.xattrs, mode=mode) == comparable_xattrs(xattrs, mode=mode)


def same_leaf(leaf: Leaf, name: bytes, parent: int, found: os.stat_result) -> bool:
    """Whether ``name`` in ``parent``, of status ``found``, is still as the image has it.

    The content is compared piece by piece; that of an object by its digest, so that no object is read.
    """
    content = leaf.content
    if isinstance(content, Symlink) != st.S_ISLNK(found.st_mode):
        return False
    if isinstance(content, Symlink):
        if found.st_size != len(content.target) or trees.link_text(name, parent) != content.target:
            return False
    elif _size(content) != found.st_size:
        return False
    if not same_metadata(leaf.stat, found, trees.read_xattrs(name, parent)):
        return False
    if isinstance(content, Symlink):
        return True
    with trees.opened_file(name, parent) as fd:
        return _same_content(content, fd)


def _size(content: object) -> int:
    if isinstance(content, Inline):
        return len(content.data)
    assert isinstance(content, External | ExternalNoVerity | Sparse)
    return content.size


def _same_content(content: object, fd: int) -> bool:
    if isinstance(content, Inline):
        return os.pread(fd, len(content.data) + 1, 0) == content.data
    if isinstance(content, Sparse):
        return _is_zero(fd, content.size)
    assert isinstance(content, External | ExternalNoVerity)
    return digest_of(fd, content.id) == content.id


def _is_zero(fd: int, size: int) -> bool:
    at = 0
    while data := os.pread(fd, _PIECE, at):
        if data.count(0) != len(data):
            return False
        at += len(data)
    return at == size


def digest_of(fd: int, like: ObjectId) -> ObjectId:
    """The digest of an open file, of the kind that ``like`` is."""
    return fsverity.digest_fd(_ALGORITHMS[len(like)], fd)
