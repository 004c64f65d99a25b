"""Locks of logind while jobs run: what a user waits for is not put to sleep, what stages is not cut off.

What is locked follows the phase of a job, and who asked for it. Taking a lock never delays a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimage_dbus.names import JobState, Phase
from hostimaged.jobs.logind import Inhibition, release
from hostimaged.log import get_logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping

    from hostimaged.jobs.job import Job

DOWNLOAD: Final = Inhibition("idle:sleep", "An operating system image is being downloaded", weak=True)
STAGING: Final = Inhibition("shutdown:sleep", "The operating system for the next boot is being prepared")

#: What each phase locks, and whether it does so for background jobs too. Collecting garbage can be cut off.
_PHASES: Final[Mapping[Phase, tuple[Inhibition, bool]]] = {
    Phase.PULLING: (DOWNLOAD, False),
    Phase.IMPORTING: (DOWNLOAD, False),
    Phase.STAGING: (STAGING, True),
    Phase.FINALIZING: (STAGING, True),
}
#: States of a job whose worker may be working.
_AT_WORK: Final = (JobState.RUNNING, JobState.FINALIZING, JobState.CANCELLING)

_logger = get_logger("hostimaged.jobs")


def wanted(job: Job) -> Inhibition | None:
    """What is to be locked for ``job`` as it is now."""
    if job.state not in _AT_WORK or job.phase is None or job.phase not in _PHASES:
        return None
    inhibition, always = _PHASES[job.phase]
    return inhibition if always or not job.terms.background else None


@dataclass(slots=True, eq=False)
class _Lock:
    """``before``: the lock that lasts until this one is taken, so that no suspend slips in between."""

    inhibition: Inhibition
    before: _Lock | None = None
    descriptor: int | None = None
    released: bool = False

    def take(self, descriptor: int | None) -> None:
        if descriptor is not None and self.released:
            release(descriptor)
        else:
            self.descriptor = descriptor
        self._end_before()

    def release(self) -> None:
        self.released = True
        if self.descriptor is not None:
            release(self.descriptor)
            self.descriptor = None
        self._end_before()

    def _end_before(self) -> None:
        if self.before is not None:
            self.before.release()
            self.before = None


class Inhibitors:
    """The locks of all jobs, taken by ``take`` in tasks of ``tasks``."""

    def __init__(self, take: Callable[[Inhibition], Awaitable[int | None]], tasks: asyncio.TaskGroup) -> None:
        self._take = take
        self._tasks = tasks
        self._locks: dict[int, _Lock] = {}
        self._taking: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        """How many locks are held."""
        return sum(lock.descriptor is not None for lock in self._locks.values())

    def follow(self, job: Job) -> None:
        """Lock what the job as it is now needs, and nothing else."""
        inhibition = wanted(job)
        lock = self._locks.get(job.id)
        if lock is not None and lock.inhibition == inhibition:
            return
        if inhibition is None:
            self.release(job)
            return
        self._locks[job.id] = new = _Lock(inhibition, before=lock)
        task = self._tasks.create_task(self._fill(new))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    def release(self, job: Job) -> None:
        """Give back what is locked for the job, at once; what is just being taken goes when it comes."""
        if (lock := self._locks.pop(job.id, None)) is not None:
            lock.release()

    def close(self) -> None:
        """Give everything back."""
        for task in self._taking:
            task.cancel()
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    async def _fill(self, lock: _Lock) -> None:
        try:
            lock.take(await self._take(lock.inhibition))
        except Exception:  # a mistake of ours costs a lock, not all that the service does
            _logger.exception("inhibit.failed", what=lock.inhibition.what)
