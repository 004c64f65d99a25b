"""Mounts that one thread and the programs it starts see: not the host, and not the rest of this process."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

from hostimaged.system import mountcalls, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_Result = TypeVar("_Result")


class PrivateMounts:
    """A thread in a mount namespace of its own, which ``arrange`` arranges before anything else is called.

    What is unmounted on the host goes away here too; nothing of ours is seen there. The thread lives until
    ``close``, so programs that are to die with their starter (``process.spawn``) may be started in ``call``.
    Raises ``OSError``, with EPERM for a lack of CAP_SYS_ADMIN. A context manager.
    """

    def __init__(self, arrange: Callable[[], None]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="private-mounts")
        try:
            self.call(lambda: _enter(arrange))
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[], _Result]) -> _Result:
        """What ``function`` returns, or raises, in there."""
        return self._thread.submit(function).result()

    def close(self) -> None:
        """End the thread, and with it whatever it started. Twice is harmless."""
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _enter(arrange: Callable[[], None]) -> None:
    syscalls.unshare_mounts()
    syscalls.mount("/", syscalls.MS_REC | syscalls.MS_SLAVE)
    arrange()


def open_directory(path: Path) -> int:
    """The directory ``path``, for ``bind``: within ``arrange`` only, as a mount belongs to its namespace."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def bind(directory: int, place: Path) -> None:
    """Let the directory ``place`` show what the open ``directory`` holds, which is closed."""
    try:
        _place(mountcalls.clone_mount(directory, recursive=True), place)
    finally:
        os.close(directory)


def cover(place: Path) -> None:
    """Let the directory ``place`` be an empty one, in memory."""
    _place(mountcalls.make_mount("tmpfs", options={"mode": "0755"}), place)


def _place(mount: int, place: Path) -> None:
    try:
        target = open_directory(place)
        try:
            mountcalls.place_mount(mount, target)
        finally:
            os.close(target)
    finally:
        os.close(mount)
