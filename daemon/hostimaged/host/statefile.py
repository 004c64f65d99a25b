"""Small files of state that others write too: read whole, never followed, never larger than they may be."""

from __future__ import annotations

import errno
import os
import stat

from hostimaged.errors import DamagedState, from_os_error


def read_state_file(directory: int, name: str, limit: int) -> bytes | None:
    """The content of the regular file ``name`` in ``directory``, None if there is none.

    Raises ``DamagedState`` for more than ``limit`` bytes and for what is no file, ``StorageError`` for what
    cannot be read.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedState("it is not a regular file", file=name) from None
        raise from_os_error(error, f"cannot read {name}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DamagedState("it is not a regular file", file=name)
        data = b""
        while len(data) <= limit and (piece := os.read(fd, limit + 1 - len(data))):
            data += piece
    except OSError as error:
        raise from_os_error(error, f"cannot read {name}") from error
    finally:
        os.close(fd)
    if len(data) > limit:
        raise DamagedState(f"it is larger than {limit} bytes", file=name)
    return data
