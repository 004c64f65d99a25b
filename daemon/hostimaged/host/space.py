"""Room for what an operation is about to write, looked at before it writes anything; and what is told when
there was none all the same."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from hostimaged.errors import NoSpace, ReadOnly, from_os_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hostimaged.errors import HostimageError
    from hostimaged.system.paths import HostPaths

#: Bytes for directories, entries and the slack of the last block of each file.
_SLACK: Final = 256 << 10


def require(path: Path, needed: int, what: str) -> None:
    """Raise ``NoSpace`` unless ``needed`` more bytes fit on the file system of ``path``.

    ``path`` may not exist yet; ``what`` says in the message what they are for. 0 bytes or less always fit.
    """
    if needed <= 0:
        return
    probe = path
    while not probe.exists() and probe != probe.parent:
        probe = probe.parent
    try:
        status = os.statvfs(probe)
    except OSError as error:
        raise from_os_error(error, f"cannot look at {path}") from error
    free = status.f_bavail * status.f_frsize
    if needed + _SLACK > free:
        raise NoSpace(f"{what} needs {needed + _SLACK} bytes in {path}, where {free} are free")


def with_places(error: NoSpace | ReadOnly, paths: HostPaths) -> HostimageError:
    """``error``, saying as well which file system of the host may be meant.

    Who writes knows what it wrote, and not always where that is mounted.
    """
    if isinstance(error, NoSpace):
        found = [f"{free} bytes are free in {path}" for path, free in _free(paths)]
        return NoSpace("; ".join([error.message, ", ".join(found)]))
    found = [f"{path} is read-only" for path in _filesystems(paths) if _is_read_only(path)]
    return ReadOnly("; ".join([error.message, *found]))


def _filesystems(paths: HostPaths) -> list[Path]:
    """Where the file systems that operations write to are mounted, each once."""
    devices: dict[int, Path] = {}
    esp = [] if paths.esp is None else [paths.esp]
    for path in (paths.physical_root, *esp, *paths.boot_mounts, paths.run_dir):
        try:
            devices.setdefault(path.stat().st_dev, path)
        except OSError:
            continue
    return list(devices.values())


def _free(paths: HostPaths) -> Iterator[tuple[Path, int]]:
    for path in _filesystems(paths):
        try:
            status = os.statvfs(path)
        except OSError:
            continue
        # Files need more than bytes on most file systems; others have no number of inodes.
        has_inodes = status.f_favail > 0 or not status.f_files
        yield path, status.f_bavail * status.f_frsize if has_inodes else 0


def _is_read_only(path: Path) -> bool:
    """Whether nothing can be made there: after an error of the disk the flags of the mount do not tell."""
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return error.errno == errno.EROFS
    return False
