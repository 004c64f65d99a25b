"""A job: what was asked for, by whom, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hostimage_dbus.names import JobState, Phase, job_path
from hostimaged.errors import HostimageError, Internal
from hostimaged.jobs.progress import Progress

if TYPE_CHECKING:
    from hostimage_dbus.errors import ErrorName
    from hostimaged.jobs.operations import Operation


@dataclass(frozen=True, slots=True)
class Initiator:
    """Who asked for a job: uid as the bus knows it, and the name the caller gave itself."""

    uid: int
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed: error name and message for the caller."""

    name: ErrorName
    message: str

    @classmethod
    def of(cls, error: HostimageError) -> Failure:
        """From one of our errors."""
        return cls(error.name, error.message)


def now_usec() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


@dataclass(slots=True, eq=False)
class Job:
    """One job. Times are microseconds since the epoch, 0 for not yet."""

    id: int
    operation: Operation
    initiator: Initiator
    created: int = field(default_factory=now_usec)
    state: JobState = JobState.QUEUED
    phase: Phase | None = None
    progress: Progress = field(default_factory=lambda: Progress(time.monotonic()))
    message: str = ""
    started: int = 0
    finished: int = 0
    failure: Failure | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Object path on the bus."""
        return job_path(self.id)

    @property
    def kind(self) -> str:
        """Kind of job."""
        return self.operation.kind

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return self.operation.target

    @property
    def cancellable(self) -> bool:
        """Whether a cancellation would be accepted."""
        return self.state in (JobState.QUEUED, JobState.HELD, JobState.RUNNING, JobState.CANCELLING)

    def start(self) -> None:
        """It runs now."""
        self.state = JobState.RUNNING
        self.started = now_usec()
        self.progress = Progress(time.monotonic())

    def finish(self, state: JobState, failure: Failure | None = None) -> None:
        """It ended; nothing changes any more."""
        if self.state.finished:
            raise Internal
        self.state = state
        self.failure = failure
        self.finished = now_usec()
        if state is JobState.DONE:
            self.progress.finish()
