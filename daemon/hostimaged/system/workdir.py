"""Private directories of running jobs, and the removal of what killed jobs left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.errors import LockTimeout, from_os_error
from hostimaged.system import locks

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODE: Final = 0o700


@contextlib.contextmanager
def private_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory, 0700, beneath ``parent`` (made if missing), removed with its content at the end.

    It is locked while it is in use. Directories beneath ``parent`` that nobody holds were left by jobs that
    were killed, and are removed first. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    try:
        parent.mkdir(_MODE, parents=True, exist_ok=True)
        _remove_abandoned(parent)
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"cannot make a directory for temporary files in {parent}") from error
    try:
        locks.lock(fd, exclusive=True, timeout=1, what=f"the directory {directory}")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(fd)


def used_bytes(directory: Path) -> int:
    """Bytes of the files below ``directory`` as they grow; what goes meanwhile does not count."""
    total = 0
    for parent, _directories, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _remove_abandoned(parent: Path) -> None:
    for path in parent.iterdir():
        with contextlib.suppress(OSError, LockTimeout):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                locks.lock(fd, exclusive=True, timeout=0, what=f"the directory {path}")
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
