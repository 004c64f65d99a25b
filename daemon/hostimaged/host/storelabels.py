"""SELinux labels of the store of the host: those that the host's policy has for the usual one."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from hostimaged.boot.selinux import Policy
from hostimaged.errors import UnsupportedImage, from_os_error
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostimaged.system.paths import HostPaths

_KINDS: Final = {
    stat.S_IFREG: ord("-"),
    stat.S_IFDIR: ord("d"),
    stat.S_IFLNK: ord("l"),
    stat.S_IFIFO: ord("p"),
    stat.S_IFSOCK: ord("s"),
    stat.S_IFCHR: ord("c"),
    stat.S_IFBLK: ord("b"),
}


def labeller(paths: HostPaths) -> Callable[[bytes, int], bytes | None] | None:
    """What gives a path of the usual store, with its mode, its label; None where SELinux is off.

    Raises ``UnsupportedImage`` for a policy that is not whole, ``StorageError`` for one that cannot be read.
    """
    if paths.selinux_enforce is None or not paths.selinux_enforce.exists():
        return None
    policy = Policy.load(_HostFiles(paths.etc))
    if policy is None:
        return None
    return of_policy(policy)


def of_policy(policy: Policy) -> Callable[[bytes, int], bytes | None]:
    """The same by ``policy``, that of a host that is being made."""
    return lambda path, mode: policy.label(path, _KINDS.get(stat.S_IFMT(mode), ord("-")))


class _HostFiles:
    """``ImageFiles`` of what runs, as far as it is in /etc: what a policy is read from."""

    def __init__(self, etc: Path) -> None:
        self._etc = etc

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        """See ``ImageFiles``; links are followed within /etc."""
        del follow
        try:
            fd = syscalls.open_beneath(
                self._etc, path.removeprefix(f"/{self._etc.name}/"), os.O_RDONLY | os.O_NONBLOCK
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, f"cannot read {path}") from error
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsupportedImage(f"{path} is not a regular file")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UnsupportedImage(f"{path} is larger than {limit} bytes")
        return data

    def names(self, path: str) -> list[bytes]:
        """A policy is read by the names of its files."""
        raise NotImplementedError(path)

    def open(self, path: str) -> int | None:
        """A policy is read whole."""
        raise NotImplementedError(path)
