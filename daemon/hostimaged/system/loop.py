"""A file as a read-only block device (loop(4)), where a file itself cannot be mounted."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL: Final = "/dev/loop-control"
_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
#: struct loop_config: descriptor, block size, then of struct loop_info64 five numbers that are left 0, three
#: more, the flags, and names and keys; reserved.
_CONFIG: Final = struct.Struct("=II 40x 12x I 176x 64x")
#: Somebody else may take the free device first.
_TRIES: Final = 64


@contextmanager
def loop_device(fd: int) -> Iterator[str]:
    """Path of a new block device with the content of the file open as ``fd``.

    It ends when the context is left, or later, when what was mounted from it is unmounted. Raises
    ``OSError``.
    """
    device, path = _configured(fd)
    try:
        yield path
    finally:
        os.close(device)


def _configured(fd: int) -> tuple[int, str]:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(fd, 0, _READ_ONLY | _AUTOCLEAR))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")
