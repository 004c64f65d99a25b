"""Room for what an operation is about to write, looked at before it writes anything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hostimaged.errors import NoSpace, from_os_error

if TYPE_CHECKING:
    from pathlib import Path

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
