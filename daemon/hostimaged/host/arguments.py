"""The kernel arguments that a deployment is started with: in its boot entry, or within its UKI."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hostimaged.boot.cmdline import Cmdline
from hostimaged.boot.pe import read_cmdline
from hostimaged.errors import BootLoaderError

if TYPE_CHECKING:
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.host.entries import SetEntry
    from hostimaged.host.model import Deployment


def cmdline_of(dirs: BootDirs, row: Deployment) -> Cmdline:
    """The arguments of a deployment.

    Raises ``BootLoaderError`` if it has no entry or its UKI cannot be read, ``UnsupportedImage`` for a
    damaged UKI.
    """
    entry = row.entry
    if entry is None:
        raise BootLoaderError("it has no boot entry")
    return Cmdline.parse(_uki_cmdline(dirs, entry) if entry.is_uki else entry.options)


def _uki_cmdline(dirs: BootDirs, entry: SetEntry) -> str:
    path = dirs.uki_file(entry.files[0])
    if path is None:
        raise BootLoaderError("its UKI cannot be looked at")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BootLoaderError(f"its UKI cannot be read: {error.strerror}") from error
    try:
        return read_cmdline(fd, path.name)
    finally:
        os.close(fd)
