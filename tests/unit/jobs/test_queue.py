"""The queue with workers that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState, Phase
from hostimaged.errors import Busy, Cancelled, JobNotCancellable, LimitsExceeded, NoSpace
from hostimaged.jobs.events import BytesEvent, Event, PhaseEvent, StatusEvent, TotalsEvent
from hostimaged.jobs.history import History
from hostimaged.jobs.job import Failure, Initiator, Job, Terms
from hostimaged.jobs.operations import Operation, Pull
from hostimaged.jobs.process import Outcome
from hostimaged.jobs.queue import QUEUED_PER_UID, JobQueue

ROOT = Initiator(0)


class FakeWorker:
    """Ends when told to."""

    def __init__(self) -> None:
        self.cancelled = False
        self.running = asyncio.Event()
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.send: Callable[[Event], None] = lambda _: None

    def cancel(self) -> None:
        self.cancelled = True
        self.end(Outcome(failure=Failure.of(Cancelled())))

    def end(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        self.send = on_event
        self.running.set()
        return await self.outcome


class Bench:
    """A queue, its workers, and what the observer and the status keeper were told."""

    def __init__(self, path: Path) -> None:
        self.workers: list[FakeWorker] = []
        self.told: list[tuple[str, int, str]] = []
        self.scans: list[Any] = []
        self.submitted = 0
        self.news = asyncio.Event()
        self.history = History(path, "boot")
        self.queue = JobQueue(self.history, self, self, self.start_worker)  # type: ignore[arg-type]

    def start_worker(self, operation: Operation) -> FakeWorker:
        del operation
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

    def take(self, place: int, status: dict[str, Any]) -> None:
        del place
        self.scans.append(status)

    async def refresh(self) -> None:
        self.scans.append("refresh")

    async def until(self, what: str, number: int, state: str) -> None:
        async with asyncio.timeout(10):
            while (what, number, state) not in self.told:
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


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "jobs.json")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(made.queue.run())
        yield made
        await made.queue.stop()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_job_runs_to_its_end(bench: Bench) -> None:
    job, worker = await bench.running()
    assert bench.queue.active is job
    worker.send(PhaseEvent(phase=Phase.PULLING))
    worker.send(StatusEvent(status={"images": []}))
    worker.end(Outcome(result={"tag": "x"}))
    await bench.until("finished", 1, "done")
    assert job.result == {"tag": "x"}
    assert job.progress.fraction == 1.0
    assert bench.told == [
        ("added", 1, "queued"),
        ("changed", 1, "running"),
        ("changed", 1, "running"),
        ("finished", 1, "done"),
    ]
    assert bench.scans == [{"images": []}]
    assert bench.queue.active is None
    assert [r.id for r in bench.history.results] == [1]


async def test_a_worker_that_told_no_status_is_followed_by_a_scan(bench: Bench) -> None:
    _, worker = await bench.running()
    worker.end(Outcome(failure=Failure.of(NoSpace("full"))))
    await bench.until("finished", 1, "failed")
    assert bench.scans == ["refresh"]
    assert ("changed", 1, "finalizing") in bench.told


async def test_jobs_run_in_order(bench: Bench) -> None:
    _, worker = await bench.running()
    await bench.submit()
    await bench.submit()
    assert [job.id for job in bench.queue.waiting] == [2, 3]
    worker.end(Outcome())
    await bench.until("changed", 2, "running")
    bench.workers[1].end(Outcome())
    await bench.until("changed", 3, "running")
    assert len(bench.workers) == 3


async def test_busy_and_limits(bench: Bench) -> None:
    await bench.running()
    with pytest.raises(Busy):
        await bench.submit(queue=False)
    results = await asyncio.gather(*(bench.submit() for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(r, Job) for r in results) == QUEUED_PER_UID
    assert {type(r) for r in results} == {Job, LimitsExceeded}
    assert (await bench.submit(who=Initiator(5))).id > QUEUED_PER_UID


async def test_cancel(bench: Bench) -> None:
    job, worker = await bench.running()
    waiting = await bench.submit()
    await bench.queue.cancel(waiting)
    assert waiting.state is JobState.CANCELLED
    assert bench.queue.waiting == ()
    await bench.queue.cancel(job)
    await bench.queue.cancel(job)
    assert worker.cancelled
    await bench.until("finished", 1, "cancelled")
    assert job.failure is not None
    assert job.failure.name is ErrorName.CANCELLED
    with pytest.raises(JobNotCancellable):
        await bench.queue.cancel(job)


async def test_a_fault_of_ours_costs_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rendering a traceback reads source files, which BlockBuster takes for blocking.
    logged: list[str] = []
    quiet = SimpleNamespace(exception=lambda event, **_: logged.append(event), info=lambda *_, **__: None)
    monkeypatch.setattr("hostimaged.jobs.queue._logger", quiet)
    _, worker = await bench.running()
    worker.outcome.set_exception(RuntimeError("ours"))
    await bench.until("finished", 1, "failed")
    assert bench.history.results[0].error == ErrorName.INTERNAL
    assert logged == ["job.fault"]
    await bench.running()


async def test_an_unwritable_job_file_does_not_stop_the_work(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "jobs.json").mkdir()
    _, worker = await bench.running()
    worker.end(Outcome())
    await bench.until("finished", 1, "done")


async def test_progress_is_told_by_the_clock(bench: Bench) -> None:
    job, worker = await bench.running()
    worker.send(TotalsEvent(total=1000, cached=0))
    for done in range(0, 500, 10):
        worker.send(BytesEvent(done=done))
    await bench.until("progress", 1, "running")
    assert [t for t in bench.told if t[0] == "progress"] == [("progress", 1, "running")]
    assert job.progress.done == 490


async def test_stop_ends_everything(bench: Bench) -> None:
    await bench.running()
    await bench.submit()
    await bench.queue.stop()
    await bench.until("finished", 1, "cancelled")
    await bench.until("finished", 2, "cancelled")
    with pytest.raises(Cancelled):
        await bench.submit()


async def test_the_file_knows_a_job_before_anybody_else(bench: Bench) -> None:
    saved: list[bytes] = []
    known: list[bytes] = []
    save, added = bench.history.save, bench.job_added

    def spy(content: bytes) -> None:
        save(content)
        saved.append(content)

    def job_added(job: Job) -> None:
        known.append(saved[-1])
        added(job)

    bench.history.save = spy  # type: ignore[method-assign]
    bench.job_added = job_added  # type: ignore[method-assign]
    await bench.running()
    assert b'"next_id": 2' in known[0]
    assert b'"id": 1' in known[0]
