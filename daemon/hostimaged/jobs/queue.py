"""The job queue: accepts and joins requests, runs jobs in their lanes, ends them, and tells of it.

The order in which they run is the business of ``hostimaged.jobs.lanes``.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.errors import Busy, Cancelled, Held, Internal, JobNotCancellable, LimitsExceeded
from hostimaged.jobs.events import (
    AloneEvent,
    BytesEvent,
    Event,
    GeneratingEvent,
    ImportingEvent,
    MessageEvent,
    PausedEvent,
    PhaseEvent,
    StatusEvent,
    TotalsEvent,
)
from hostimaged.jobs.job import Failure, Initiator, Job, Terms
from hostimaged.jobs.lanes import Lanes
from hostimaged.jobs.process import Outcome, Worker
from hostimaged.jobs.progress import INTERVAL
from hostimaged.jobs.turns import Turns
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hostimaged.jobs.history import History
    from hostimaged.jobs.operations import Operation

#: Jobs that may wait: of one user, and of all users together. The job file has room for many more.
QUEUED_PER_UID: Final = 8
QUEUED_IN_ALL: Final = 64
_USUAL: Final = Terms()

_logger = get_logger("hostimaged.jobs")


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

    async def take(self, place: int, status: dict[str, Any]) -> None:
        """A scan found ``status``."""

    async def refresh(self) -> None:
        """Scan now; never raises."""


class JobQueue:
    """All jobs that wait or run. ``run`` is the task that runs them; all else is for its loop only.

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
        self._lanes = Lanes()
        self._workers: dict[int, Worker] = {}
        self._turns = Turns(self._lanes, self._workers)
        self._entering: Job | None = None
        self._holds: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._submitting = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._stopping = False
        self._ending: set[int] = set()
        self._none_ending = asyncio.Event()
        self._none_ending.set()

    @property
    def active(self) -> Job | None:
        """The job that runs; of several, one that changes something."""
        return next((job for job in self._lanes.running if not job.state.finished), None)

    @property
    def changing(self) -> bool:
        """Whether a job that changes something runs; its end is announced when this is no longer so."""
        return any(job.operation.mutating for job in self._lanes.running)

    @property
    def waiting(self) -> tuple[Job, ...]:
        """The jobs that wait, in the order in which they would start."""
        return tuple(job for job in self._lanes.waiting if not job.state.finished)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run or wait: those that change something, then the readers."""
        return [job for job in self._lanes.jobs if not job.state.finished]

    async def submit(
        self,
        operation: Operation,
        initiator: Initiator,
        terms: Terms = _USUAL,
        *,
        queue: bool = True,
        join: bool = True,
    ) -> Job:
        """The job that does ``operation``: an equal one that is there already if ``join``, else a new one.

        A new job is written down, then announced, then run when its turn comes. What the caller's ``terms``
        allow has been authorised. Raises ``Busy`` or ``Held`` if it would have to wait and ``queue`` is
        False, ``LimitsExceeded`` if too many jobs wait, ``Cancelled`` if the queue stops.
        """
        async with self._submitting:
            self._check_accepting()
            equal = self._lanes.equal(operation.identity) if join else None
            if equal is not None and equal.can_take(terms):
                self._join(equal, initiator, terms)
                return equal
            self._check_room(operation, initiator.uid)
            job = Job(0, operation, initiator, terms)
            held = terms.obeyed(self._holds)
            if not queue and held:
                raise Held(f"background jobs are held ({', '.join(held)})")
            if not queue and self._lanes.would_wait(job):
                raise Busy("another job is running")
            job.id = self._history.allot()
            self._entering = job
            try:
                await self.save()
            finally:
                self._entering = None
            try:
                self._check_accepting()
            except Cancelled:
                # Not to be found by the next daemon, which would announce the end of what nobody knows.
                await self.save()
                raise
            job.hold(terms.obeyed(self._holds))
            self._lanes.add(job)
            _logger.info("job.new", id=job.id, kind=job.kind, target=job.target, uid=initiator.uid)
            self._observer.job_added(job)
            self._reconsider()
            return job

    def _check_accepting(self) -> None:
        if self._stopping:
            raise Cancelled("the service is stopping")

    def _check_room(self, operation: Operation, uid: int) -> None:
        if operation.one_per_user and uid != 0 and self._lanes.has_kind(operation.kind, uid):
            raise LimitsExceeded(f"a job of kind {operation.kind} of this user is under way already")
        if (mine := self._lanes.count(uid)) >= QUEUED_PER_UID:
            raise LimitsExceeded(f"{mine} jobs of this user are waiting already")
        if uid != 0 and len(self._lanes.waiting) >= QUEUED_IN_ALL:
            raise LimitsExceeded(f"{QUEUED_IN_ALL} jobs are waiting already")

    def _join(self, job: Job, who: Initiator, terms: Terms) -> None:
        was_background = job.terms.background
        job.join(who, terms)
        _logger.info("job.joined", id=job.id, uid=who.uid)
        if was_background and not job.terms.background:
            self._lanes.move_back(job)
        if self._lanes.is_waiting(job):
            job.hold(job.terms.obeyed(self._holds))
        self._observer.job_changed(job, only_progress=False)
        self._reconsider()

    def hold(self, reasons: Sequence[str]) -> None:
        """From now on background jobs do not start, for ``reasons``; none: they do."""
        self._holds = tuple(reasons)
        for job in self._lanes.waiting:
            if job.hold(job.terms.obeyed(self._holds)):
                self._observer.job_changed(job, only_progress=False)
        self._reconsider()

    def _reconsider(self) -> None:
        """Have what is in the way of users stop, and start what can."""
        for job in self._lanes.in_the_way():
            if job.state is JobState.RUNNING and not job.preempted and job.id in self._workers:
                _logger.info("job.preempt", id=job.id)
                job.preempted = True
                self._workers[job.id].cancel()
        self._turns.settle()
        self._wake.set()

    async def withdraw(self, job: Job, uid: int, name: str) -> None:
        """A program does not want ``job`` any more: stop it if nobody else does.

        Raises ``JobNotCancellable`` as ``cancel`` does.
        """
        _check_cancellable(job)
        job.withdraw(uid, name)
        _logger.info("job.withdrawn", id=job.id, uid=uid)
        if not job.joiners:
            await self.cancel(job)

    async def cancel(self, job: Job) -> None:
        """Stop ``job``: one that waits ends at once, one that runs soon.

        Raises ``JobNotCancellable`` if it has ended or cannot be stopped any more.
        """
        _check_cancellable(job)
        if job.state is JobState.CANCELLING:
            return
        _logger.info("job.cancel", id=job.id, state=str(job.state))
        job.hold_reasons = ()
        job.state = JobState.CANCELLING
        self._observer.job_changed(job, only_progress=False)
        if self._lanes.is_waiting(job):
            await self._finish(job, Outcome(failure=Failure.of(Cancelled())))
        elif job.id in self._workers:
            self._workers[job.id].cancel()

    async def run(self) -> None:
        """Run jobs, until ``stop``; if cancelled, running workers are killed."""
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping:
                while (job := self._lanes.start_next()) is not None:
                    # Here, so that a cancellation finds it at once.
                    self._workers[job.id] = self._start_worker(job.operation)
                    self._turns.settle()
                    tasks.create_task(self._run_one(job, self._workers[job.id]))
                self._wake.clear()
                await self._wake.wait()

    async def stop(self) -> None:
        """Accept no more jobs and cancel all; ``run`` returns when those that run have ended.

        By then the ends of those that waited are announced, whoever cancelled them.
        """
        self._stopping = True
        self._wake.set()
        for job in self.jobs:
            if job.cancellable:
                await self.cancel(job)
        await self._none_ending.wait()
        async with self._submitting:
            # Nor is one being accepted.
            pass

    async def _run_one(self, job: Job, worker: Worker) -> None:
        if job.state is JobState.QUEUED:
            job.start()
            _logger.info("job.start", id=job.id)
            self._observer.job_changed(job, only_progress=False)
        scans: list[tuple[int, dict[str, Any]]] = []

        def on_event(event: Event) -> None:
            if isinstance(event, StatusEvent):
                scans.append((self._status.begin(), event.status))
            else:
                self._take(job, event)

        try:
            async with asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick(job))
                outcome = await self._work(job, worker, on_event)
                ticker.cancel()
        except Exception:
            # A fault of ours costs this job, not the daemon.
            _logger.exception("job.fault", id=job.id)
            outcome = Outcome(failure=Failure.of(Internal()))
        del self._workers[job.id]
        self._turns.ended(job)
        for place, status in scans[-1:]:
            await self._status.take(place, status)
        if self._gave_way(job, outcome):
            return
        if job.operation.changes and not scans:
            if job.state is JobState.RUNNING:
                job.state = JobState.FINALIZING
                self._observer.job_changed(job, only_progress=False)
            await self._status.refresh()
        await self._finish(job, outcome)

    async def _work(self, job: Job, worker: Worker, on_event: Callable[[Event], None]) -> Outcome:
        """Do the work, and what is to follow it."""
        outcome = await worker.run(on_event)
        wanted = outcome.failure is None and job.state is not JobState.CANCELLING
        following = job.following() if wanted else None
        if following is None:
            return outcome
        self._workers[job.id] = self._start_worker(following)
        prepared = await self._workers[job.id].run(on_event)
        failure = prepared.failure
        if failure is not None:
            message = (
                f"done, and effective from the next reboot; but there is no soft reboot: {failure.message}"
            )
            return Outcome(failure=Failure(failure.name, message))
        return Outcome(result=outcome.result | prepared.result)

    def _gave_way(self, job: Job, outcome: Outcome) -> bool:
        """Queue a job again that was stopped for a user's, unless it was cancelled as well."""
        stopped = outcome.failure is not None and outcome.failure.name is ErrorName.CANCELLED
        if not (stopped and job.preempted and job.state is JobState.RUNNING):
            return False
        self._lanes.requeue(job)
        job.requeue()
        job.hold(job.terms.obeyed(self._holds))
        self._observer.job_changed(job, only_progress=False)
        self._reconsider()
        return True

    async def _finish(self, job: Job, outcome: Outcome) -> None:
        self._ending.add(job.id)
        self._none_ending.clear()
        try:
            await self._end(job, outcome)
        finally:
            self._ending.discard(job.id)
            if not self._ending:
                self._none_ending.set()

    async def _end(self, job: Job, outcome: Outcome) -> None:
        state, failure = _end_state(outcome.failure), outcome.failure
        job.result = outcome.result
        job.finish(state, failure)
        self._history.add_result(job)
        await self.save()
        _logger.info("job.end", id=job.id, state=str(state), error=str(failure.name) if failure else "")
        # Only now, so that the next one starts when the end of this one is known.
        self._lanes.remove(job)
        self._observer.job_finished(job)
        self._reconsider()
        self._history.told(job)
        await self.save()

    def _take(self, job: Job, event: Event) -> None:
        """Take in an event; numbers are announced by the ticker, everything else at once."""
        match event:
            case AloneEvent(wanted=wanted):
                self._turns.ask(job, wanted=wanted)
                self._reconsider()
                return
            case PausedEvent(paused=paused):
                self._turns.paused(job, paused=paused)
                return
            case PhaseEvent(phase=phase):
                job.phase = phase
            case MessageEvent(text=text):
                job.message = text
            case TotalsEvent(total=total, cached=cached):
                job.progress.set_totals(total, cached)
            case BytesEvent(done=done):
                job.progress.set_bytes(done)
                return
            case ImportingEvent(done=done, total=total):
                job.progress.set_imported(done, total)
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


def _check_cancellable(job: Job) -> None:
    if not job.cancellable:
        raise JobNotCancellable(f"job {job.id} is {job.state}")


def _end_state(failure: Failure | None) -> JobState:
    if failure is None:
        return JobState.DONE
    return JobState.CANCELLED if failure.name is ErrorName.CANCELLED else JobState.FAILED
