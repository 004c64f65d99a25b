"""The first steps into a repository: its directory and its ``meta.json``, read or made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository import metadata as meta
from hostimaged.composefs.repository.metadata import Metadata, Verity
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.composefs.repository.verity import VerityPolicy, probe
from hostimaged.errors import from_os_error
from hostimaged.system import durable

if TYPE_CHECKING:
    from pathlib import Path

_DIRECTORY_MODE: Final = 0o700
_METADATA_MODE: Final = 0o644
_PREFIX: Final = ".meta.json-"


def make_directory(path: Path) -> bool:
    """Make the directory of a repository, in one that exists; says whether it was missing."""
    try:
        path.mkdir(_DIRECTORY_MODE)
    except FileExistsError:
        return False
    except OSError as error:
        raise from_os_error(error, f"cannot make a repository at {path}") from error
    return True


def open_directory(path: Path) -> int:
    """A descriptor of the directory that can be locked. Raises ``RepositoryMissing``."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise meta.RepositoryMissing(path=path) from None
    except OSError as error:
        raise from_os_error(error, f"cannot open the repository at {path}") from error


def read_metadata(directory: int, path: Path) -> tuple[Metadata, VerityPolicy]:
    """The parsed file, checked, and the policy that its own fs-verity stands for.

    Raises ``RepositoryMissing``, ``OldRepository``, ``MetadataError`` or ``IncompatibleRepository``.
    """
    try:
        fd = os.open(meta.FILE_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        if has_objects(directory):
            raise meta.OldRepository(path=path) from None
        raise meta.RepositoryMissing(path=path) from None
    except OSError as error:
        raise from_os_error(error, f"cannot read the metadata of the repository at {path}") from error
    try:
        # One byte more than is accepted, so that a longer file is noticed.
        metadata = Metadata.parse(os.pread(fd, meta.MAX_SIZE + 1, 0))
        metadata.check()
        secure, unsupported = probe(fd, metadata.algorithm)
    except OSError as error:
        raise from_os_error(error, f"cannot read the metadata of the repository at {path}") from error
    finally:
        os.close(fd)
    return metadata, VerityPolicy(metadata.algorithm, secure=secure, unsupported=unsupported)


def write_metadata(path: Path, metadata: Metadata, verity: Verity) -> bool:
    """Make the file, durably, unless there is one; says whether it was made.

    Raises ``OldRepository`` where there are objects without it, and ``VerityUnavailable``.
    """
    directory = open_directory(path)
    try:
        if has_metadata(directory):
            return False
        if has_objects(directory):
            raise meta.OldRepository(path=path)
        return publish_metadata(directory, metadata, verity)
    except OSError as error:
        raise from_os_error(error, f"cannot make a repository at {path}") from error
    finally:
        os.close(directory)


def publish_metadata(directory: int, metadata: Metadata, verity: Verity | None) -> bool:
    """Write the file, durably; False if there is one by now. With ``verity`` None it gets no fs-verity,
    wherever it is, and the repository is an insecure one.

    Raises ``VerityUnavailable`` or ``OSError``.
    """
    data = metadata.render()
    algorithm = metadata.algorithm

    def make_file() -> durable.NewFile:
        return durable.NewFile(directory, mode=_METADATA_MODE, prefix=_PREFIX)

    new = make_file()
    try:
        durable.write_all(new.fd, data)
        durable.sync_file(new.fd)
        if verity is not None:
            policy = VerityPolicy(algorithm, secure=verity is Verity.REQUIRE)
            new = policy.protect(new, fsverity.digest(algorithm, data), make_file)
        try:
            new.publish(directory, meta.FILE_NAME)
        except FileExistsError:
            return False
    finally:
        new.close()
    durable.sync_directory(directory)
    return True


def has_metadata(directory: int) -> bool:
    """Whether there is a meta.json in the directory open as ``directory``."""
    return _exists(meta.FILE_NAME, directory)


def has_objects(directory: int) -> bool:
    """Whether there are objects in the directory open as ``directory``."""
    return _exists(OBJECTS, directory)


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True
