"""Scans that the daemon starts by itself: first of all, when another program changed the host, and at times.

Changes are gathered until it has been quiet for a moment, so that what belongs together is scanned once. A
job of ours that changes something is followed by its own scan, so nothing is scanned while one runs; what
came meanwhile is scanned for after it, since nobody knows whose it was.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from hostimaged.host.watches import Watches
from hostimaged.log import get_logger
from hostimaged.system.mounts import MountChanges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.bus.status import StatusCache
    from hostimaged.system.paths import HostPaths

#: Seconds without a change after which changes are complete, and how often it is waited for that.
QUIET: Final = 0.2
_MOMENTS: Final = 10
#: Seconds between the starts of two scans, at least; and how much longer than a scan takes it is to the next.
INTERVAL: Final = 2.0
_SHARE: Final = 3
#: Seconds after which there is a scan in any case: objects are not watched, and a watch can be missing.
EVERY: Final = 900.0
#: Reads in a row; the kernel keeps 16,384 events by default, which is some 10 of them.
_READS: Final = 64

_logger = get_logger("hostimaged.bus")


class Rescans:
    """Keeps ``status`` up to date with the host at ``paths``; ``run`` is its task.

    ``changing``: whether a job that changes something runs; its end is told by ``job_ended``. ``tell`` is
    given what cannot be watched, "" once all is.
    """

    def __init__(
        self,
        paths: HostPaths,
        status: StatusCache,
        changing: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._paths = paths
        self._status = status
        self._changing = changing
        self._tell = tell
        self._told = ""
        self._watches: Watches | None = None
        self._mounts: MountChanges | None = None
        self._wanted = False
        self._news = asyncio.Event()
        self._job_ended = asyncio.Event()

    def job_ended(self) -> None:
        """A job ended; sizes are measured anew if they hold no longer."""
        self._job_ended.set()
        if not self._status.is_measured:
            self._wanted = True
            self._news.set()

    async def run(self) -> None:
        """Scan, and scan again when it is due, until cancelled."""
        self._open()
        try:
            while True:
                started = time.monotonic()
                await self._renew()
                await self._status.refresh()
                took = time.monotonic() - started
                # Before anything else: a storm of changes must not become one of scans.
                await asyncio.sleep(max(INTERVAL, took * _SHARE) - took)
                await self._until_due()
        finally:
            self._close()

    def _open(self) -> None:
        try:
            self._watches = Watches(self._paths)
            if self._paths.scratch_root is None:
                self._mounts = MountChanges()
        except OSError as error:
            self._told = str(error.strerror)
            self._tell(self._told)
            _logger.warning("watch.failed", error=self._told)

    def _close(self) -> None:
        self._listen(listen=False)
        for source in (self._watches, self._mounts):
            if source is not None:
                source.close()

    async def _renew(self) -> None:
        if self._watches is None:
            return
        renewal = asyncio.get_running_loop().run_in_executor(None, self._watches.renew)
        try:
            await asyncio.shield(renewal)
        finally:
            # It takes milliseconds, and what it works with must not be closed meanwhile.
            await renewal
        if (problem := self._watches.problem) != self._told:
            self._told = problem
            self._tell(problem)
            if problem:
                _logger.warning("watch.incomplete", problem=problem)

    # waiting

    async def _until_due(self) -> None:
        """Return when something changed and it is quiet again and no job runs, or after ``EVERY``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(EVERY):
                while not await self._next_change():
                    pass
                for _ in range(_MOMENTS):
                    if not await self._changed():
                        break
                    await asyncio.sleep(QUIET)
                while self._changing():
                    self._job_ended.clear()
                    await self._job_ended.wait()

    async def _next_change(self) -> bool:
        """Wait until something happened, and a moment longer; whether it matters.

        In between nothing is listened to: a storm of what does not matter costs a few wake-ups each second.
        """
        self._news.clear()
        if self._wanted:
            self._news.set()
        self._listen(listen=True)
        try:
            await self._news.wait()
        finally:
            self._listen(listen=False)
        await asyncio.sleep(QUIET)
        return await self._changed()

    def _listen(self, *, listen: bool) -> None:
        loop = asyncio.get_running_loop()
        for descriptor, heard in self._sources():
            if listen:
                loop.add_reader(descriptor, heard)
            else:
                loop.remove_reader(descriptor)

    def _sources(self) -> Iterator[tuple[int, Callable[[], None]]]:
        if self._watches is not None:
            yield self._watches.fileno(), self._news.set
        if self._mounts is not None:
            yield self._mounts.fileno(), self._mounts_changed

    def _mounts_changed(self) -> None:
        """To be told at once: it is told to one listener only."""
        if self._mounts is not None:
            self._mounts.take()
        self._wanted = True
        self._news.set()

    async def _changed(self) -> bool:
        """Take what has happened until now; whether anything of it matters."""
        changed, self._wanted = self._wanted, False
        for _ in range(_READS):
            if self._watches is None or (matters := self._watches.read()) is None:
                break
            changed = changed or matters
            # A full queue is taken in steps.
            await asyncio.sleep(0)
        return changed
