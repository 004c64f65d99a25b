"""What writing on a boot file system (vfat, ext4) has in common: temporary names, removal, typed errors."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError, from_os_error
from hostimaged.system import durable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: What our temporary names on boot file systems begin with; recovery removes them.
TEMPORARY: Final = ".hostimaged-"


@contextlib.contextmanager
def told(doing: str) -> Iterator[None]:
    """Turn ``OSError`` into the typed error that says what failed."""
    try:
        yield
    except HostimageError:
        raise
    except OSError as error:
        raise from_os_error(error, doing) from error


@contextlib.contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory ``path``."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_directory(parent: int, name: str) -> Iterator[int]:
    """A descriptor of the new directory ``name`` in ``parent``; its content is synced at the end."""
    os.mkdir(name, 0o755, dir_fd=parent)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield fd
        durable.sync_directory(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory with all above it, durably: what is synced in it must not hang in the air."""
    if path.is_dir():
        return
    path.mkdir(parents=True, exist_ok=True)
    with directory(path) as fd:
        durable.sync_filesystem(fd)


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a directory; 0 for what is gone."""
    try:
        return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))
    except OSError:
        return 0


def exists(path: Path) -> bool:
    """Whether there is anything under the name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_name(parent: Path, name: str) -> bool:
    """Remove ``name`` from ``parent``, durably; says whether it was there.

    First under a name of ours: what is gone by halves cannot be taken for a whole one.
    """
    if not exists(parent / name):
        return False
    with directory(parent) as fd:
        temporary = durable.temporary_name(TEMPORARY)
        durable.publish_name(fd, name, temporary)
        remove_tree(parent / temporary)
        durable.sync_directory(fd)
    return True


def put_in_place(parent: Path, fd: int, temporary: str, name: str) -> None:
    """Give what is under ``temporary`` the name ``name``, durably; what has that name now is removed.

    ``fd`` is a descriptor of ``parent``. There is no moment at which the name leads to nothing.
    """
    if exists(parent / name):
        durable.exchange_names(fd, temporary, name)
        remove_tree(parent / temporary)
    else:
        durable.publish_name(fd, temporary, name)


def remove_temporary(parent: Path) -> None:
    """Remove what a crash left in ``parent`` under temporary names; a missing ``parent`` is fine."""
    with told(f"cannot clean up {parent}"):
        try:
            names = [name for name in os.listdir(parent) if name.startswith(TEMPORARY)]
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            remove_tree(parent / name)
        if names:
            durable.sync_directory(parent)
