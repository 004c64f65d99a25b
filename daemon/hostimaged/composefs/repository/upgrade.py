"""Repositories without ``meta.json``, made before composefs-rs 0.7 wrote one: what to write, and writing it.

Which hash it is, the names of the objects tell; whether it is secure, their fs-verity. All of them are looked
at, where composefs-rs goes by the first it meets: a secure repository could not open an object without
fs-verity, and one of two hashes cannot be opened at all. What is in the repository is not changed; EROFS
images in its formats are ``hostimaged.oci.upgrade``'s business.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import opening
from hostimaged.composefs.repository.metadata import Metadata, RepositoryMissing, Verity
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.errors import PreconditionFailed, from_os_error
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hostimaged.composefs.repository.metadata import FormatSet

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: O_NONBLOCK: a fifo in the place of an object must not hang us.
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_HEX: Final = re.compile(r"[0-9a-fA-F]+\Z")


@dataclass(slots=True)
class _Found:
    """What the objects of a repository are like; an example of each kind, by its path."""

    algorithm: Algorithm | None = None
    protected: str = ""
    unprotected: str = ""


def add_metadata(directory: int, path: Path, formats: FormatSet, verity: Verity | None) -> bool:
    """Give the repository open as ``directory`` its meta.json, durably; False if it has one.

    A crash leaves it without or with the whole file. ``path`` is for messages, ``verity`` as in
    ``Repository.upgrade``. Raises ``RepositoryMissing``, ``PreconditionFailed`` where the objects do not
    agree or there are none, ``NoSpace``, ``ReadOnly``, ``StorageError``.
    """
    try:
        if opening.has_metadata(directory):
            return False
        if not opening.has_objects(directory):
            raise RepositoryMissing(path=path)
        found = _survey(directory, path)
        if found.algorithm is None:
            raise PreconditionFailed(
                f"the repository at {path} has no objects that tell its hash: remove its empty directory "
                "'objects', and make it anew"
            )
        metadata = Metadata.new(found.algorithm, formats)
        return opening.publish_metadata(directory, metadata, verity=_wanted(found, verity, path))
    except OSError as error:
        raise from_os_error(error, f"cannot upgrade the repository at {path}") from error


def _wanted(found: _Found, verity: Verity | None, path: Path) -> Verity | None:
    """What meta.json is to have, which decides whether the repository is secure."""
    if not found.unprotected:
        return Verity.REQUIRE
    if verity is Verity.REQUIRE or (verity is None and found.protected):
        some = f"and object {found.protected} has it" if found.protected else "as none of its objects has"
        raise PreconditionFailed(
            f"the repository at {path} cannot be a secure one: object {found.unprotected} has no fs-verity, "
            f"{some}"
        )
    return None


def _survey(directory: int, path: Path) -> _Found:
    found = _Found()
    supported = True
    for fd, name, where in _objects(directory):
        algorithm = _algorithm(name)
        if algorithm is None:
            continue
        if found.algorithm not in (None, algorithm):
            raise PreconditionFailed(
                f"the repository at {path} has objects of sha256 and of sha512: its hash cannot be told"
            )
        found.algorithm = algorithm
        if supported:
            protected = _is_protected(fd, name, algorithm)
            supported = protected is not None
        else:
            protected = False
        if protected:
            found.protected = found.protected or where
        else:
            found.unprotected = found.unprotected or where
    return found


def _objects(directory: int) -> Iterator[tuple[int, str, str]]:
    """Each file of ``objects/00`` to ``ff``: a descriptor of its directory, its name there, and its path."""
    for prefix in (f"{byte:02x}" for byte in range(256)):
        try:
            fd = os.open(f"{OBJECTS}/{prefix}", _DIRECTORY_FLAGS, dir_fd=directory)
        except FileNotFoundError:
            continue
        try:
            for name in sorted(os.listdir(fd)):
                yield fd, name, f"{prefix}/{name}"
        finally:
            os.close(fd)


def _algorithm(name: str) -> Algorithm | None:
    """The hash whose digest ``name`` can be, but for the first byte; None if it is no object's name."""
    for algorithm in Algorithm:
        if len(name) == algorithm.hex_length - 2 and _HEX.match(name):
            return algorithm
    return None


def _is_protected(directory: int, name: str, algorithm: Algorithm) -> bool | None:
    """Whether an object has fs-verity of its hash; None if the file system does not support it."""
    fd = os.open(name, _FILE_FLAGS, dir_fd=directory)
    try:
        syscalls.measure_verity(fd, algorithm.kernel_id, algorithm.digest_size)
    except syscalls.VerityUnsupported:
        # Only files tell what the file system can do.
        return None if stat.S_ISREG(os.fstat(fd).st_mode) else False
    except (syscalls.VerityMissing, ValueError):
        return False
    finally:
        os.close(fd)
    return True
