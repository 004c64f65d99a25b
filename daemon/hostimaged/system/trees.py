"""Files and directories copied with all their metadata, or removed, beneath directory descriptors.

No symbolic link is followed, whoever may write to the directories meanwhile. Names are bytes. Nothing is
synced here, see ``durable``. Functions raise ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat as st
from typing import TYPE_CHECKING, Final, NamedTuple

from hostimaged.system.durable import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: Levels of directories that are copied. Each takes up to four descriptors, of which a process has 1024.
MAX_DEPTH: Final = 128

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: O_NONBLOCK: a fifo put in the place of a file must not hang us.
_SOURCE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 1 << 20
#: What copy_file_range says where it cannot: between file systems, on some of them, in a sandbox.
_NO_RANGE: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
#: Attributes that bind an inode to its number: a copy cannot have them, the kernel makes its own.
_OF_THE_INODE: Final = frozenset({b"security.evm"})
_NO_XATTRS: Final = frozenset({errno.EOPNOTSUPP, errno.ENODATA})
#: Too many links, or too long a path to the first of them: then the next one is a file of its own.
_NO_LINK: Final = frozenset({errno.EMLINK, errno.ENAMETOOLONG})


class Metadata(NamedTuple):
    """What an inode has besides its content. ``mode`` has the 12 permission bits, ``mtime`` nanoseconds."""

    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: Mapping[bytes, bytes]


class Changed(OSError):
    """A name is no longer what it was a moment ago."""


class TooDeep(OSError):
    """Directories are nested deeper than ``MAX_DEPTH``."""

    def __init__(self) -> None:
        super().__init__(errno.ENAMETOOLONG, f"directories are nested more than {MAX_DEPTH} deep")


# --- looking -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_directory(name: bytes | str, parent: int) -> Iterator[int]:
    """A descriptor of the directory ``name`` in ``parent``; raises ``Changed`` if it is none."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        raise _changed(error) from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_file(name: bytes, parent: int) -> Iterator[int]:
    """A descriptor of the regular file ``name`` in ``parent``; raises ``Changed`` if it is none."""
    try:
        fd = os.open(name, _SOURCE, dir_fd=parent)
    except OSError as error:
        raise _changed(error) from error
    try:
        if not st.S_ISREG(os.fstat(fd).st_mode):
            raise Changed(errno.ESTALE, "a file was replaced")
        yield fd
    finally:
        os.close(fd)


def _changed(error: OSError) -> OSError:
    # ENXIO: a socket, or a device without a driver.
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV}:
        return Changed(error.errno, error.strerror)
    return error


def entries(directory: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """Names in the directory open as ``directory`` and what they are, in the order of the bytes.

    Names that vanish meanwhile are left out.
    """
    for name in sorted(map(os.fsencode, os.listdir(directory))):
        with contextlib.suppress(FileNotFoundError):
            yield name, os.stat(name, dir_fd=directory, follow_symlinks=False)


def status(name: bytes, parent: int) -> os.stat_result:
    """What ``name`` in ``parent`` is; raises ``Changed`` if it is gone."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        raise _changed(error) from error


def link_text(name: bytes, parent: int) -> bytes:
    """The text of a symbolic link; raises ``Changed`` if it is none."""
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ENOENT}:
            raise Changed(error.errno, error.strerror) from error
        raise


def read_xattrs(name: bytes, parent: int) -> dict[bytes, bytes]:
    """Extended attributes of ``name`` in ``parent``, of whatever kind it is.

    Without those that belong to one inode only, and, as the kernel has it, without ``trusted.*`` for a
    process that lacks CAP_SYS_ADMIN.
    """
    return _read_xattrs(_below(name, parent), follow=False)


def read_xattrs_of(fd: int) -> dict[bytes, bytes]:
    """Extended attributes of an open file or directory, as ``read_xattrs``."""
    return _read_xattrs(fd, follow=True)


def _read_xattrs(path: bytes | int, *, follow: bool) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return found
        raise _changed(error) from error
    for text in names:
        name = os.fsencode(text)
        if name in _OF_THE_INODE:
            continue
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise _changed(error) from error
    return found


def _below(name: bytes, parent: int) -> bytes:
    """A path for calls that take no descriptor of a directory; its last part is not followed if so asked."""
    return b"/proc/self/fd/%d/%s" % (parent, name)


# --- making ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(name: bytes, parent: int, metadata: Metadata) -> Iterator[int]:
    """Make the file ``name``; the block writes its content, then it gets its ``metadata``."""
    fd = os.open(name, _NEW, 0o600, dir_fd=parent)
    try:
        yield fd
        _set_metadata(fd, metadata)
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_directory(name: bytes, parent: int, metadata: Metadata) -> Iterator[int]:
    """Make the directory ``name``; the block fills it, then it gets its ``metadata``.

    In this order its default ACL, if any, does not get into what the block makes.
    """
    os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        yield fd
        _set_metadata(fd, metadata)
    finally:
        os.close(fd)


def new_symlink(name: bytes, parent: int, text: bytes, metadata: Metadata) -> None:
    """Make the symbolic link ``name``. Its mode is the kernel's."""
    os.symlink(text, name, dir_fd=parent)
    _set_metadata_of_name(name, parent, metadata)


def new_special(name: bytes, parent: int, mode: int, device: int, metadata: Metadata) -> None:
    """Make a device, fifo or socket; ``mode`` says which."""
    os.mknod(name, st.S_IFMT(mode) | 0o600, device, dir_fd=parent)
    _set_metadata_of_name(name, parent, metadata)
    # It was made by us a moment ago, where nobody else writes: no link that could be followed.
    os.chmod(name, metadata.mode, dir_fd=parent)


def link(path: bytes, root: int, name: bytes, parent: int) -> bool:
    """Make ``name`` another name of the file at ``path`` beneath ``root``; says whether that was possible."""
    try:
        os.link(path, name, src_dir_fd=root, dst_dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _set_metadata(fd: int, metadata: Metadata) -> None:
    # Changing the owner drops capabilities and the set-id bits, so it comes first.
    os.fchown(fd, metadata.uid, metadata.gid)
    for name, value in metadata.xattrs.items():
        os.setxattr(fd, name, value)
    os.fchmod(fd, metadata.mode)
    os.utime(fd, ns=(metadata.mtime, metadata.mtime))


def _set_metadata_of_name(name: bytes, parent: int, metadata: Metadata) -> None:
    os.chown(name, metadata.uid, metadata.gid, dir_fd=parent, follow_symlinks=False)
    for attribute, value in metadata.xattrs.items():
        os.setxattr(_below(name, parent), attribute, value, follow_symlinks=False)
    os.utime(name, ns=(metadata.mtime, metadata.mtime), dir_fd=parent, follow_symlinks=False)


def forget_acl(directory: int) -> None:
    """Remove the ACL that a new directory took over from its parent's default ACL."""
    for name in (b"system.posix_acl_default", b"system.posix_acl_access"):
        try:
            os.removexattr(directory, name)
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise


# --- copying and removing ----------------------------------------------------------------------------------


def metadata_of(name: bytes, parent: int, found: os.stat_result) -> Metadata:
    """The metadata of ``name``, of which ``found`` is the status."""
    return _metadata(found, read_xattrs(name, parent))


def metadata_of_fd(fd: int) -> Metadata:
    """The metadata of an open file or directory."""
    return _metadata(os.fstat(fd), read_xattrs_of(fd))


def _metadata(found: os.stat_result, xattrs: dict[bytes, bytes]) -> Metadata:
    return Metadata(st.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns, xattrs)


def copy_content(source: int, target: int, size: int) -> None:
    """Append to ``target`` what follows in ``source``, ``size`` bytes or as many as there are.

    Shares the blocks where the file system can. Memory is bounded.
    """
    left = size
    try:
        while left > 0 and (count := os.copy_file_range(source, target, left)):
            left -= count
    except OSError as error:
        if error.errno not in _NO_RANGE:
            raise
    # What the call could not copy, and what came meanwhile.
    while data := os.read(source, _PIECE):
        write_all(target, data)


class Copier:
    """Copies into the tree beneath the directory open as ``root``, whatever lies on any file system.

    Owner, mode, time, extended attributes and hard links (between what one copier copies) are kept. ``tick``
    is called once per inode, and may raise. Extended attributes whose names begin with one of ``without``
    stay behind. A source that changes is ``Changed``; what was made stays.
    """

    __slots__ = ("_made", "_root", "_tick", "_without")

    def __init__(self, root: int, tick: Callable[[], None], *, without: tuple[bytes, ...] = ()) -> None:
        self._root = root
        self._tick = tick
        self._without = without
        #: Where the first name of a file with several was put, from the root.
        self._made: dict[tuple[int, int], bytes] = {}

    def copy(self, name: bytes, source: int, target: int, path: bytes) -> None:
        """Copy ``name`` of the directory ``source``, whatever it is, with all below it, to ``target``.

        ``path`` is the name from the root that it gets.
        """
        self.copy_found(name, status(name, source), source, target, path)

    def copy_found(
        self, name: bytes, found: os.stat_result, source: int, target: int, path: bytes, depth: int = 0
    ) -> None:
        """As ``copy``, of a name whose status is known."""
        self._tick()
        if not st.S_ISDIR(found.st_mode):
            self._copy_leaf(name, found, source, target, path)
            return
        if depth >= MAX_DEPTH:
            raise TooDeep
        with (
            opened_directory(name, source) as old,
            new_directory(name, target, self._kept(metadata_of_fd(old))) as new,
        ):
            for below, status_below in entries(old):
                self.copy_found(below, status_below, old, new, path + b"/" + below, depth + 1)

    def _copy_leaf(self, name: bytes, found: os.stat_result, source: int, target: int, path: bytes) -> None:
        inode = (found.st_dev, found.st_ino)
        made = self._made.get(inode) if found.st_nlink > 1 else None
        if made is not None and link(made, self._root, name, target):
            return
        if st.S_ISREG(found.st_mode):
            with (
                opened_file(name, source) as old,
                new_file(name, target, self._kept(metadata_of_fd(old))) as new,
            ):
                copy_content(old, new, os.fstat(old).st_size)
        elif st.S_ISLNK(found.st_mode):
            metadata = self._kept(metadata_of(name, source, found))
            new_symlink(name, target, link_text(name, source), metadata)
        else:
            metadata = self._kept(metadata_of(name, source, found))
            new_special(name, target, found.st_mode, found.st_rdev, metadata)
        if found.st_nlink > 1:
            self._made[inode] = path

    def _kept(self, metadata: Metadata) -> Metadata:
        if not self._without or not metadata.xattrs:
            return metadata
        xattrs = {n: value for n, value in metadata.xattrs.items() if not n.startswith(self._without)}
        return metadata._replace(xattrs=xattrs)


def remove_tree(name: bytes | str, parent: int) -> None:
    """Remove ``name`` of ``parent`` with all below it, whatever it is; nothing is done if it is not there."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if st.S_ISDIR(found.st_mode):
        shutil.rmtree(os.fsdecode(name), dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)
