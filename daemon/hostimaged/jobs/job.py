"""A job: what was asked for, by whom, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import JobState, Phase, job_path
from hostimaged.errors import HostimageError, Internal, LimitsExceeded
from hostimaged.jobs.operations import SoftReboot
from hostimaged.jobs.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimage_dbus.errors import ErrorName
    from hostimaged.jobs.operations import Operation

#: Programs of one user that may wait for one job: as many as connections may have calls under way.
JOINERS_PER_UID: Final = 64


@dataclass(frozen=True, slots=True)
class Initiator:
    """Who asked for a job: uid and unique name as the bus knows them, and the name the caller gave itself.

    ``unit``: the systemd unit of the process, "" if unknown.
    """

    uid: int
    client_id: str = ""
    name: str = ""
    unit: str = ""


class Apply(IntEnum):
    """What follows a job that is done, if that starts something else; what is more stands behind."""

    NONE = 0
    SOFT_REBOOT = 1
    REBOOT = 2


@dataclass(frozen=True, slots=True)
class Terms:
    """How a job is to be run, besides what it does.

    ``background``: nobody waits for it, so that it obeys holds and gives way to users. The others: holds
    that do not count for it. ``apply``: what follows.
    """

    background: bool = False
    allow_metered: bool = False
    allow_on_battery: bool = False
    apply: Apply = Apply.NONE

    def __or__(self, other: Terms) -> Terms:
        """What satisfies those who asked for either."""
        return Terms(
            background=self.background and other.background,
            allow_metered=self.allow_metered or other.allow_metered,
            allow_on_battery=self.allow_on_battery or other.allow_on_battery,
            apply=max(self.apply, other.apply),
        )

    def obeyed(self, holds: Sequence[str]) -> tuple[str, ...]:
        """Those of ``holds`` that hold such a job."""
        if not self.background:
            return ()
        ignored = {"metered": self.allow_metered, "battery": self.allow_on_battery}
        return tuple(hold for hold in holds if not ignored.get(hold, False))


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
    """One job. Times are microseconds since the epoch, 0 for not yet.

    ``joiners``: who asked for it and has not withdrawn, as unique names by uid. ``background``: how it was
    started; ``terms`` change with who joins. ``rank``: its place among those that wait. ``decided``: whether
    a soft reboot is prepared or not.
    """

    id: int
    operation: Operation
    initiator: Initiator
    terms: Terms = field(default_factory=Terms)
    rank: int = 0
    joiners: dict[int, set[str]] = field(default_factory=dict)
    hold_reasons: tuple[str, ...] = ()
    preempted: bool = False
    decided: bool = False
    background: bool = field(init=False)
    created: int = field(default_factory=now_usec)
    state: JobState = JobState.QUEUED
    phase: Phase | None = None
    progress: Progress = field(default_factory=lambda: Progress(time.monotonic()))
    message: str = ""
    started: int = 0
    finished: int = 0
    failure: Failure | None = None
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.background = self.terms.background
        self.joiners.setdefault(self.initiator.uid, set()).add(self.initiator.name)

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

    def requeue(self) -> None:
        """It waits again."""
        self.state = JobState.QUEUED
        self.started = 0
        self.phase = None
        self.preempted = False
        self.progress = Progress(time.monotonic())

    def hold(self, reasons: tuple[str, ...]) -> bool:
        """If it waits, it is held for ``reasons`` if there are any; tells whether that is new."""
        if self.state not in (JobState.QUEUED, JobState.HELD):
            # Cancelled, but not taken from those that wait yet.
            return False
        if reasons == self.hold_reasons:
            return False
        self.hold_reasons = reasons
        self.state = JobState.HELD if reasons else JobState.QUEUED
        return True

    def following(self) -> SoftReboot | None:
        """What is to be done besides, once its own work is done; from now on that does not change."""
        self.decided = True
        if self.terms.apply is not Apply.SOFT_REBOOT:
            return None
        return SoftReboot(lock_timeout=self.operation.lock_timeout)

    def can_take(self, terms: Terms) -> bool:
        """Whether it is not too late to do it in this way, too."""
        return not self.decided or terms.apply is not Apply.SOFT_REBOOT or self.terms.apply >= terms.apply

    def join(self, who: Initiator, terms: Terms) -> None:
        """Let ``who`` ask for it as well; raises ``LimitsExceeded`` if too many of their programs do."""
        names = self.joiners.setdefault(who.uid, set())
        if len(names) >= JOINERS_PER_UID and who.name not in names:
            raise LimitsExceeded("too many programs of this user wait for the same job")
        names.add(who.name)
        self.terms |= terms

    def asked_by(self, uid: int) -> bool:
        """Whether the user asked for it, and has not withdrawn."""
        return uid in self.joiners

    def withdraw(self, uid: int, name: str) -> None:
        """The program ``name`` does not ask for it any more; if it never did, no program of its user does."""
        names = self.joiners.get(uid, set())
        if name in names:
            names.remove(name)
        else:
            names.clear()
        if not names:
            self.joiners.pop(uid, None)

    def finish(self, state: JobState, failure: Failure | None = None) -> None:
        """It ended; nothing changes any more."""
        if self.state.finished:
            raise Internal
        self.state = state
        self.failure = failure
        self.finished = now_usec()
        if state is JobState.DONE:
            self.progress.finish()
