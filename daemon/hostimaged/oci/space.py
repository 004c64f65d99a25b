"""Whether there is room for what an image brings, looked at before any of it is fetched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hostimaged.errors import NoSpace, from_os_error

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.oci.reference import ImageReference


def require_space(reference: ImageReference, path: Path, needed: int, minimum_free: int) -> None:
    """Raise ``NoSpace`` unless ``needed`` bytes fit at ``path`` and ``minimum_free`` stay free then.

    ``path`` exists. 0 bytes always fit.
    """
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise from_os_error(error, f"cannot look at {path}") from error
    free = status.f_bavail * status.f_frsize
    if needed and needed + minimum_free > free:
        rest = f", and {minimum_free} are to stay so (minimum-free)" if minimum_free else ""
        raise NoSpace(
            f"{reference} needs at least {needed} bytes more in {path}, where {free} are free{rest}"
        )
