"""The job queue: who runs when, what becomes of it, and who is told.

A *lane* runs its jobs one after the other, first come first served. There is one, for mutating jobs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.errors import Busy, Cancelled, Internal, JobNotCancellable, LimitsExceeded
from hostimaged.jobs.events import (
    BytesEvent,
    Event,
    GeneratingEvent,
    MessageEvent,
    PhaseEvent,
    StatusEvent,
    TotalsEvent,
)
from hostimaged.jobs.job import Failure, Initiator, Job
from hostimaged.jobs.process import Outcome, Worker
from hostimaged.jobs.progress import INTERVAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.jobs.history import History
    from hostimaged.jobs.operations import Operation

#: Jobs of one user that may wait.
QUEUED_PER_UID: Final = 8

_logger = structlog.get_logger("hostimaged.jobs")


class Observer(Protocol):
    """Is told of every change, in order. No method may raise or block."""

    def job_added(self, job: Job) -> None:
        """A job was accepted."""

    def job_changed(self, job: Job, *, only_progress: bool) -> None:
        """Something about a job changed; ``only_progress``: telling it later would do."""

    def job_finished(self, job: Job) -> None:
        """A job ended."""


class StatusKeeper(Protocol):
    """Keeps what the last scan found."""

    def begin(self) -> int:
        """A scan begins; gives its place in the order of scans."""

    def take(self, place: int, status: dict[str, Any]) -> None:
        """A scan found ``status``."""

    async def refresh(self) -> None:
        """Scan now; never raises."""


class JobQueue:
    """All jobs that wait or run. ``run`` is the lane's task; the other methods are for its loop only.

    ``start_worker`` makes the worker of a job.
    """

    def __init__(
        self,
        history: History,
        observer: Observer,
        status: StatusKeeper,
        start_worker: Callable[[Operation], Worker],
    ) -> None:
        self._history = history
        self._observer = observer
        self._status = status
        self._start_worker = start_worker
        self._waiting: deque[Job] = deque()
        self._active: Job | None = None
        self._entering: Job | None = None
        self._worker: Worker | None = None
        self._wake = asyncio.Event()
        self._submitting = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._stopping = False

    @property
    def active(self) -> Job | None:
        """The job that runs."""
        return self._active

    @property
    def waiting(self) -> tuple[Job, ...]:
        """The jobs that wait, the next one first."""
        return tuple(self._waiting)

    @property
    def jobs(self) -> list[Job]:
        """The job that runs, then those that wait."""
        return [*([self._active] if self._active else []), *self._waiting]

    async def submit(self, operation: Operation, initiator: Initiator, *, queue: bool = True) -> Job:
        """Accept a job: it is written down, then announced, then run when its turn comes.

        Raises ``Busy`` if it would have to wait and ``queue`` is False, ``LimitsExceeded`` if too many jobs
        of the same user wait.
        """
        async with self._submitting:
            if self._stopping:
                raise Cancelled("the service is stopping")
            if not queue and self.jobs:
                raise Busy("another job is running")
            mine = sum(job.initiator.uid == initiator.uid for job in self._waiting)
            if mine >= QUEUED_PER_UID:
                raise LimitsExceeded(f"{mine} jobs of this user are waiting already")
            job = self._entering = Job(self._history.allot(), operation, initiator)
            try:
                await self.save()
            finally:
                self._entering = None
            self._waiting.append(job)
            _logger.info("job.new", id=job.id, kind=job.kind, target=job.target, uid=initiator.uid)
            self._observer.job_added(job)
            self._wake.set()
            return job

    async def cancel(self, job: Job) -> None:
        """Stop ``job``: one that waits ends at once, one that runs soon.

        Raises ``JobNotCancellable`` if it has ended or cannot be stopped any more.
        """
        if not job.cancellable:
            raise JobNotCancellable(f"job {job.id} is {job.state}")
        if job.state is JobState.CANCELLING:
            return
        _logger.info("job.cancel", id=job.id, state=str(job.state))
        job.state = JobState.CANCELLING
        self._observer.job_changed(job, only_progress=False)
        if job in self._waiting:
            self._waiting.remove(job)
            await self._finish(job, Outcome(failure=Failure.of(Cancelled())))
        elif self._worker is not None:
            self._worker.cancel()

    async def run(self) -> None:
        """Run jobs, until ``stop``; if cancelled, a running worker is killed."""
        while not self._stopping:
            if self._waiting:
                await self._run_one(self._waiting.popleft())
            else:
                self._wake.clear()
                await self._wake.wait()

    async def stop(self) -> None:
        """Accept no more jobs and cancel all; ``run`` returns when the active one has ended."""
        self._stopping = True
        self._wake.set()
        for job in self.jobs:
            if job.cancellable:
                await self.cancel(job)

    async def _run_one(self, job: Job) -> None:
        self._active = job
        self._worker = worker = self._start_worker(job.operation)
        job.start()
        _logger.info("job.start", id=job.id)
        self._observer.job_changed(job, only_progress=False)
        scanned = False

        def on_event(event: Event) -> None:
            nonlocal scanned
            if isinstance(event, StatusEvent):
                scanned = True
                self._status.take(self._status.begin(), event.status)
            else:
                self._take(job, event)

        try:
            async with asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick(job))
                outcome = await worker.run(on_event)
                ticker.cancel()
        except Exception:
            # A fault of ours costs this job, not the daemon.
            _logger.exception("job.fault", id=job.id)
            outcome = Outcome(failure=Failure.of(Internal()))
        self._worker = None
        if not scanned:
            if job.state is JobState.RUNNING:
                job.state = JobState.FINALIZING
                self._observer.job_changed(job, only_progress=False)
            await self._status.refresh()
        await self._finish(job, outcome)

    async def _finish(self, job: Job, outcome: Outcome) -> None:
        state, failure = _end_state(outcome.failure), outcome.failure
        job.result = outcome.result
        job.finish(state, failure)
        self._history.add_result(job)
        if job is self._active:
            self._active = None
        await self.save()
        _logger.info("job.end", id=job.id, state=str(state), error=str(failure.name) if failure else "")
        self._observer.job_finished(job)

    def _take(self, job: Job, event: Event) -> None:
        """Take in an event; numbers are announced by the ticker, everything else at once."""
        match event:
            case PhaseEvent(phase=phase):
                job.phase = phase
            case MessageEvent(text=text):
                job.message = text
            case TotalsEvent(total=total, cached=cached):
                job.progress.set_totals(total, cached)
            case BytesEvent(done=done):
                job.progress.set_bytes(done)
                return
            case GeneratingEvent(done=done, total=total):
                job.progress.set_generated(done, total)
                return
        self._observer.job_changed(job, only_progress=False)

    async def _tick(self, job: Job) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            now = time.monotonic()
            job.progress.measure(now)
            if job.progress.due(now):
                self._observer.job_changed(job, only_progress=True)

    async def save(self) -> None:
        """Write the job file; without it only the announcement of orphans is lost, so errors are logged."""
        async with self._saving:
            entering = [self._entering] if self._entering else []
            content = self._history.snapshot([*self.jobs, *entering])
            try:
                await asyncio.to_thread(self._history.save, content)
            except OSError as error:
                _logger.warning("history.save-failed", error=error.strerror)


def _end_state(failure: Failure | None) -> JobState:
    if failure is None:
        return JobState.DONE
    return JobState.CANCELLED if failure.name is ErrorName.CANCELLED else JobState.FAILED
