"""Which job runs when: lanes, the order of those that wait, and what gives way to what. No I/O, no tasks.

There are three places to run in: for one job that changes something, for one reader that somebody waits for,
and for one background reader. In each, users come before the background, first come first served. A
background reader starts only while no user's job waits or runs.

A job that asks for the repository alone, in a phase that needs its exclusive lock, gets it when no reader
holds it: background readers are stopped and queued again, others pause.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from hostimage_dbus.names import JobState
from hostimaged.jobs.kinds import KINDS, Access

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from hostimaged.jobs.job import Job

#: States in which a job still does what an equal request would ask for.
_JOINABLE = (JobState.QUEUED, JobState.HELD, JobState.RUNNING, JobState.FINALIZING)


class Lane(IntEnum):
    """Places to run in, in the order in which they are listed."""

    MUTATING = 0
    READING = 1
    BACKGROUND = 2


def in_slices(job: Job) -> bool:
    """Whether the job holds the lock of the repository in slices, and pauses when it is asked to.

    So does one that only tells what a job which needs the repository alone would do.
    """
    access = KINDS[job.kind].access
    return access is Access.SLICES or (access is Access.ALONE and not job.operation.changes)


def lane_of(job: Job) -> Lane:
    """Where the job would start now."""
    if job.operation.changes:
        return Lane.MUTATING
    return Lane.BACKGROUND if job.terms.background else Lane.READING


class Lanes:
    """The jobs that wait and run."""

    def __init__(self) -> None:
        self._waiting: list[Job] = []
        self._running: dict[Lane, Job] = {}
        self._ranks = 0
        #: Whether a job asks for the repository alone, or has it.
        self.alone = False

    @property
    def readers(self) -> list[Job]:
        """Running jobs that have to stop, or to pause, before another has the repository alone."""
        return [job for job in self.running if in_slices(job)]

    @property
    def running(self) -> list[Job]:
        """Jobs that run, one that changes something first."""
        return [job for _, job in sorted(self._running.items())]

    @property
    def waiting(self) -> list[Job]:
        """Jobs that wait, in the order in which they would start."""
        return sorted(self._waiting, key=lambda job: (lane_of(job), job.terms.background, job.rank))

    @property
    def jobs(self) -> list[Job]:
        """All jobs by lane, the one that runs first."""
        return sorted([*self.running, *self.waiting], key=self._listed)

    def _listed(self, job: Job) -> Lane:
        return next((lane for lane, running in self._running.items() if running is job), lane_of(job))

    def add(self, job: Job) -> None:
        """A new job, behind all of its kind."""
        self.move_back(job)
        self._waiting.append(job)

    def move_back(self, job: Job) -> None:
        """Its turn is counted from now on."""
        self._ranks += 1
        job.rank = self._ranks

    def requeue(self, job: Job) -> None:
        """A job that ran waits again, where it was."""
        self.remove(job)
        self._waiting.append(job)

    def remove(self, job: Job) -> None:
        """The job ended."""
        if job in self._waiting:
            self._waiting.remove(job)
        for lane in [lane for lane, running in self._running.items() if running is job]:
            del self._running[lane]

    def is_waiting(self, job: Job) -> bool:
        """Whether it has not started."""
        return job in self._waiting

    def start_next(self) -> Job | None:
        """Take a job that can start now, if there is one; it counts as running."""
        for job in self.waiting:
            lane = lane_of(job)
            if job.state is JobState.QUEUED and lane not in self._running and not self._yields(job):
                self._waiting.remove(job)
                self._running[lane] = job
                return job
        return None

    def would_wait(self, job: Job) -> bool:
        """Whether a new job that is not held could not start at once."""
        lane = lane_of(job)
        ahead = any(lane_of(other) is lane and other.state is JobState.QUEUED for other in self._waiting)
        return ahead or lane in self._running or self._yields(job)

    def in_the_way(self) -> list[Job]:
        """Running jobs that have to give way now."""
        wanted = self._wanted()
        return [
            job
            for job in self.running
            if job.terms.background
            and ((wanted and job.operation.gives_way) or (self.alone and in_slices(job)))
        ]

    def equal(self, identity: Hashable) -> Job | None:
        """A job that does the same, and will be done."""
        return next(
            (job for job in self.jobs if job.operation.identity == identity and job.state in _JOINABLE), None
        )

    def count(self, uid: int) -> int:
        """Jobs of a user that wait."""
        return sum(job.initiator.uid == uid for job in self._waiting)

    def has_kind(self, kind: str, uid: int) -> bool:
        """Whether a job of this kind of a user waits or runs."""
        return any(job.kind == kind and job.initiator.uid == uid for job in self.jobs)

    def _yields(self, job: Job) -> bool:
        if not job.terms.background:
            return False
        if lane_of(job) is Lane.BACKGROUND and self.alone and in_slices(job):
            return True
        # What would be stopped for a user at once does not start either.
        return (lane_of(job) is Lane.BACKGROUND or job.operation.gives_way) and self._wanted()

    def _wanted(self) -> bool:
        """Whether somebody waits for any job."""
        everything: Sequence[Job] = [*self._running.values(), *self._waiting]
        return any(not job.terms.background and not job.state.finished for job in everything)
