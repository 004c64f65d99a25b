"""Image references as the user writes them."""

from __future__ import annotations

import os
from typing import Final

from hostimagectl.failure import Failure

#: Transports that name a file or directory; a colon ends the path (containers-transports(5)).
PATH_TRANSPORTS: Final = ("oci", "oci-archive", "docker-archive", "dir")


def absolute(image: str) -> str:
    """``image`` with a relative path made absolute: the daemon works in another directory than the user.

    Anything that is not ``transport:path`` of a transport that takes paths is left for the daemon to judge.
    Raises ``Failure`` where the absolute path cannot be written in the transport's syntax.
    """
    transport, _, name = image.partition(":")
    path, colon, inner = name.partition(":")
    if transport not in PATH_TRANSPORTS or not path or os.path.isabs(path):
        return image
    try:
        directory = os.getcwd()
    except OSError:
        raise Failure.usage("the current directory is gone, so a relative path means nothing") from None
    if ":" in directory:
        raise Failure.usage(
            f"{transport}: cannot name a path with a colon, and the current directory's has one",
            hint="call it from another directory, with a path that has none",
        )
    # Without "..", which the daemon refuses.
    return f"{transport}:{os.path.normpath(os.path.join(directory, path))}{colon}{inner}"
