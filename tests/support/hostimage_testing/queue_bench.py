"""A job queue with workers that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostimaged.errors import Cancelled
from hostimaged.jobs.events import Event
from hostimaged.jobs.history import History
from hostimaged.jobs.job import Failure, Initiator, Job, Terms
from hostimaged.jobs.operations import Operation, Pull
from hostimaged.jobs.process import Outcome
from hostimaged.jobs.queue import JobQueue

ROOT = Initiator(0)


class FakeWorker:
    """Ends when told to."""

    def __init__(self) -> None:
        self.cancelled = False
        self.requests: list[str] = []
        self.obedient = True
        self.running = asyncio.Event()
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.send: Callable[[Event], None] = lambda _: None

    def cancel(self) -> None:
        self.cancelled = True
        if self.obedient:
            self.end(Outcome(failure=Bench.cancelled))

    def pause(self) -> None:
        self.requests.append("pause")

    def resume(self) -> None:
        self.requests.append("resume")

    def grant(self) -> None:
        self.requests.append("alone")

    def end(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        self.send = on_event
        self.running.set()
        return await self.outcome


class Bench:
    """A queue, its workers, and what the observer and the status keeper were told."""

    cancelled = Failure.of(Cancelled())

    def __init__(self, path: Path) -> None:
        self.workers: list[FakeWorker] = []
        self.operations: list[Operation] = []
        self.told: list[tuple[str, int, str]] = []
        self.scans: list[Any] = []
        self.submitted = 0
        self.news = asyncio.Event()
        self.history = History(path, "boot")
        self.queue = JobQueue(self.history, self, self, self.start_worker)  # type: ignore[arg-type]

    def start_worker(self, operation: Operation) -> FakeWorker:
        self.operations.append(operation)
        self.workers.append(FakeWorker())
        return self.workers[-1]

    def job_added(self, job: Job) -> None:
        self._tell("added", job)

    def job_changed(self, job: Job, *, only_progress: bool) -> None:
        self._tell("progress" if only_progress else "changed", job)

    def job_finished(self, job: Job) -> None:
        self._tell("finished", job)

    def _tell(self, what: str, job: Job) -> None:
        self.told.append((what, job.id, str(job.state)))
        self.news.set()

    def begin(self) -> int:
        return len(self.scans)

    async def take(self, place: int, status: dict[str, Any]) -> None:
        del place
        self.scans.append(status)

    async def refresh(self) -> None:
        self.scans.append("refresh")

    async def until(self, what: str, number: int, state: str) -> None:
        """Wait until this was told."""
        await self.count(what, number, state, 1)

    async def count(self, what: str, number: int, state: str, times: int) -> None:
        """Wait until this was told so often."""
        async with asyncio.timeout(10):
            while self.told.count((what, number, state)) < times:
                self.news.clear()
                await self.news.wait()

    async def submit(self, **options: Any) -> Job:
        self.submitted += 1
        operation = options.pop("operation", Pull(reference=f"oci:/x{self.submitted}"))
        return await self.queue.submit(
            operation, options.pop("who", ROOT), options.pop("terms", Terms()), **options
        )

    async def running(self) -> tuple[Job, FakeWorker]:
        job = await self.submit()
        await self.until("changed", job.id, "running")
        worker = self.workers[-1]
        await worker.running.wait()
        return job, worker
