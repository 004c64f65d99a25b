"""System calls that make a mount first and place it later, and those that cross mount namespaces.

Each a thin typed function, as in ``hostimaged.system.syscalls``. A mount that was made is a descriptor, the
caller's to close; as long as it was not placed, nobody else can see it, and closing it ends it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.system.syscalls import StrPath

# The same on every architecture of ours.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_AT_NO_AUTOMOUNT: Final = 0x800
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_FROM_FD: Final = 0x04
_MOVE_MOUNT_TO_FD: Final = 0x40
_CLOEXEC: Final = 1
_SET_FLAG: Final = 0
_SET_STRING: Final = 1
_CREATE: Final = 6
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_CLONE_NEWNS: Final = 0x00020000
#: What the kernel says of a mount that failed; one line has 256 bytes at most.
_MAX_LOG: Final = 1024

ATTR_RDONLY: Final = 0x01
ATTR_NOSUID: Final = 0x02
ATTR_NODEV: Final = 0x04
ATTR_NOEXEC: Final = 0x08

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [
        argument if isinstance(argument, bytes) else ctypes.c_long(argument or 0) for argument in arguments
    ]
    return _checked(_libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def make_mount(
    kind: str,
    *,
    source: str = "",
    options: Mapping[str, str | None] | None = None,
    read_only: bool = False,
    attributes: int = 0,
) -> int:
    """A mount of a file system of type ``kind``, not placed anywhere; ``options`` without a value are flags.

    ``read_only``: of the file system; ``attributes``: of the mount (``ATTR_*``). Raises ``OSError``, whose
    text has what the kernel says of the reason: ENODEV for an unknown type.
    """
    context = _call(_SYS_FSOPEN, kind.encode(), _CLOEXEC)
    try:
        try:
            if source:
                _call(_SYS_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(source), 0)
            for name, value in (options or {}).items():
                what = _SET_FLAG if value is None else _SET_STRING
                text = None if value is None else os.fsencode(value)
                _call(_SYS_FSCONFIG, context, what, name.encode(), text, 0)
            if read_only:
                _call(_SYS_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
            _call(_SYS_FSCONFIG, context, _CREATE, None, None, 0)
            return _call(_SYS_FSMOUNT, context, _CLOEXEC, attributes)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{_reason(context)}") from None
    finally:
        os.close(context)


def _reason(context: int) -> str:
    """What the kernel wrote last into the log of a context, in brackets; "" for nothing."""
    last = b""
    try:
        while line := os.read(context, _MAX_LOG):
            last = line
    except OSError:
        pass
    # "e " for an error, "w " for a warning, "i " for anything else.
    return f" ({last[2:].decode('utf-8', 'replace').strip()})" if last else ""


def open_without_automount(path: StrPath) -> int:
    """``path``, an O_PATH descriptor; an automount that waits there is left waiting."""
    flags = _AT_NO_AUTOMOUNT | os.O_CLOEXEC
    return _call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def clone_mount(directory: int, *, recursive: bool = False) -> int:
    """A second mount of the tree beneath the open ``directory``, not placed anywhere.

    ``recursive``: with what is mounted in it. It is as writable as the first one.
    """
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _call(_SYS_OPEN_TREE, directory, b"", flags)


def place_mount(mount: int, directory: int) -> None:
    """Mount ``mount`` on the open ``directory``."""
    _call(_SYS_MOVE_MOUNT, mount, b"", directory, b"", _MOVE_MOUNT_FROM_FD | _MOVE_MOUNT_TO_FD)


def set_attributes(mount: int, *, add: int = 0, remove: int = 0) -> None:
    """Change ``ATTR_*`` of one mount, not of its file system."""
    request = b"".join(value.to_bytes(8, sys.byteorder) for value in (add, remove, 0, 0))
    _call(_SYS_MOUNT_SETATTR, mount, b"", _AT_EMPTY_PATH, request, len(request))


def detach(path: StrPath) -> None:
    """Unmount what is mounted at ``path`` with all below it, now or when nobody uses it any more."""
    _checked(_libc.umount2(os.fsencode(path), ctypes.c_int(_MNT_DETACH | _UMOUNT_NOFOLLOW)))


def enter_mounts(namespace: int) -> None:
    """Go over to the mount namespace that is open; root and working directory are its root.

    For a process with one thread only.
    """
    _checked(_libc.setns(ctypes.c_int(namespace), ctypes.c_int(_CLONE_NEWNS)))
