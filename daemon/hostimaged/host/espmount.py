"""The EFI system partition of a running host, for as long as an operation needs it.

Where it is mounted, it is used through that mount; an automount that waits is left waiting. Else it is
mounted without a place: nobody sees such a mount, and it ends with its descriptor. So it has no path of its
own either, and is called ``/proc/self/fd/N`` here, ``ESP:`` to people. It is held for a short time only: what
is mounted read-only cannot be mounted writable by somebody else, nor the other way round.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.boot import loader
from hostimaged.boot.esp import find_esp, mount_of
from hostimaged.errors import BootLoaderError, HostimageError
from hostimaged.host.bootdirs import GRUB, mount_table
from hostimaged.system import mountcalls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.esp import EspDevice, Mount
    from hostimaged.system.paths import HostPaths

#: Type and options of the file system (boot-entries.md 1.2).
FILESYSTEM: Final = "vfat"
OPTIONS: Final = {"fmask": "0177", "dmask": "0077"}
_ATTRIBUTES: Final = mountcalls.ATTR_NOSUID | mountcalls.ATTR_NODEV | mountcalls.ATTR_NOEXEC
#: Tries, and seconds between them, while somebody has it mounted in the other way: a look at it is short.
_TRIES: Final = 40
_PAUSE: Final = 0.25

_PRIVATE: Final = re.compile(r"/proc/self/fd/[0-9]+")
_NAME: Final = "ESP:"
_USER_CFG: Final = f"{GRUB}/user.cfg"


def public(text: str) -> str:
    """``text`` with the name of the partition that people know in place of ours."""
    return _PRIVATE.sub(_NAME, text)


def seek(paths: HostPaths, *, writable: bool = False) -> HostPaths:
    """``paths`` with the partition where it can be read, or written, if there is one.

    To be given to ``release``. Done again it does nothing, nor on a host that does not run, whose places are
    given. Without a partition, and for a boot loader that needs none and does not have it mounted, there is
    none in the result. Raises ``BootLoaderError`` if it cannot be mounted, as without CAP_SYS_ADMIN.
    """
    if paths.esp is not None or paths.esp_sought or paths.mountinfo is None:
        return paths
    try:
        table = mount_table(paths)
        device = find_esp(table, paths.physical_root)
    except HostimageError:
        return replace(paths, esp_sought=True)
    fd = _open_mounted(table, device)
    if fd is None and not _is_needed(paths):
        return replace(paths, esp_sought=True)
    try:
        if fd is None:
            fd = _mount(device, writable=writable)
        elif writable:
            fd = _writable(fd)
    except OSError as error:
        raise BootLoaderError(f"the EFI system partition cannot be mounted: {error.strerror}") from error
    return replace(paths, esp=Path(f"/proc/self/fd/{fd}"), esp_sought=True)


def release(paths: HostPaths) -> None:
    """Give back what ``seek`` found."""
    if paths.esp is not None and _PRIVATE.fullmatch(str(paths.esp)):
        os.close(int(paths.esp.name))


@contextmanager
def reached(paths: HostPaths, *, writable: bool = False) -> Iterator[HostPaths]:
    """What ``seek`` gives, and ``release`` at the end; errors do not tell the path that it has here."""
    found = seek(paths, writable=writable)
    try:
        yield found
    except HostimageError as error:
        error.args = (public(error.message), *error.args[1:])
        raise
    finally:
        release(found)


def _is_needed(paths: HostPaths) -> bool:
    """Whether entries, kernels or UKIs are there."""
    try:
        found = loader.detect(paths.efivars)
    except HostimageError:
        return False
    return found.is_bls or (paths.physical_root / "boot" / _USER_CFG).exists()


def _open_mounted(table: list[Mount], device: EspDevice) -> int | None:
    """Where it is mounted, open; None if it is not, or not any more."""
    mount = mount_of(table, device.device)
    if mount is None:
        return None
    try:
        fd = mountcalls.open_without_automount(os.fsdecode(mount.point))
    except OSError:
        return None
    number = os.fstat(fd).st_dev
    if (os.major(number), os.minor(number)) == device.device:
        return fd
    os.close(fd)
    return None


def _writable(fd: int) -> int:
    """The mount ``fd``, or if that is read-only a second one that is not, in its place."""
    if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
        return fd
    try:
        mount = mountcalls.clone_mount(fd)
        mountcalls.set_attributes(mount, remove=mountcalls.ATTR_RDONLY)
    finally:
        os.close(fd)
    return mount


def _mount(device: EspDevice, *, writable: bool) -> int:
    """A mount of the partition without a place. Raises ``OSError``."""
    for _ in range(_TRIES - 1):
        try:
            return _mounted(device, writable=writable)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(_PAUSE)
    return _mounted(device, writable=writable)


def _mounted(device: EspDevice, *, writable: bool) -> int:
    def make(*, read_only: bool) -> int:
        attributes = _ATTRIBUTES | (0 if writable else mountcalls.ATTR_RDONLY)
        return mountcalls.make_mount(
            FILESYSTEM, source=device.path, options=OPTIONS, read_only=read_only, attributes=attributes
        )

    if writable:
        return make(read_only=False)
    try:
        return make(read_only=True)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    # Somebody writes to it: what is mounted writable already can be read along with them.
    return make(read_only=False)
