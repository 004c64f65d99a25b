"""Objects that also lie on the host as plain files: kernels of the boot loader, and ``/etc`` of deployments.

Both were copied out of images. What of them is still as it was has the content, and so the id, of an object
of the repository, and serves to repair that one: nothing has to be fetched for it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository import Sharing
from hostimaged.errors import StorageError
from hostimaged.host.statedirs import state_directory
from hostimaged.oci.tar import INLINE_MAX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.model import HostState
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Files that are read: a deployment has some 2,000 in its /etc.
MAX_FILES: Final = 100_000
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def restore_from_files(
    paths: HostPaths,
    repository: Repository,
    state: HostState,
    wanted: Collection[ObjectId],
    reporter: Reporter,
) -> int:
    """Store those of ``wanted`` again that are the content of a file; how many they were.

    Point of ``reporter``: ``repair.copy``. What cannot be read is passed over. Raises ``Cancelled``,
    ``NoSpace`` and ``ReadOnly``.
    """
    left = set(wanted)
    for number, path in enumerate(_files(paths, state)):
        if not left or number >= MAX_FILES:
            break
        reporter.at("repair.copy")
        try:
            fd = os.open(path, _FLAGS)
        except OSError:
            continue
        try:
            if (id_ := _try(repository, fd, left)) is not None:
                left.discard(id_)
        finally:
            os.close(fd)
    return len(wanted) - len(left)


def _try(repository: Repository, fd: int, wanted: Collection[ObjectId]) -> ObjectId | None:
    """Store a file if it is one of ``wanted``; which."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= INLINE_MAX:
            return None
        id_ = fsverity.digest_fd(repository.algorithm, fd)
        if id_ not in wanted:
            return None
        # A copy: the file goes on being written to.
        stored = repository.store_file(fd, status.st_size, Sharing.COPY)
    except (OSError, StorageError):
        return None
    return id_ if stored.id == id_ else None


def _files(paths: HostPaths, state: HostState) -> Iterator[Path]:
    tops = [top for top in (state.dirs.kernels, state.dirs.ukis) if top is not None]
    tops += [state_directory(paths, row.id) / "etc" for row in state.deployments]
    for top in dict.fromkeys(tops):
        for directory, names, files in os.walk(top):
            names.sort()
            yield from (Path(directory, name) for name in sorted(files))
