"""The queue with workers that do what a test says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState, Phase
from hostimage_testing.queue_bench import Bench, FakeWorker
from hostimaged.errors import Busy, Cancelled, JobNotCancellable, LimitsExceeded, NoSpace
from hostimaged.jobs.events import BytesEvent, PhaseEvent, StatusEvent, TotalsEvent
from hostimaged.jobs.job import Apply, Failure, Initiator, Job, Terms
from hostimaged.jobs.operations import Diff, Rollback, SoftReboot
from hostimaged.jobs.process import Outcome
from hostimaged.jobs.queue import QUEUED_PER_UID


class BlockedSave:
    """Stands for a disk that takes its time: the job file is written when the context is left."""

    def __init__(self, save: Callable[[bytes], None]) -> None:
        self._save = save
        self._reached = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.go = threading.Event()

    def __call__(self, content: bytes) -> None:
        self._loop.call_soon_threadsafe(self._reached.set)
        assert self.go.wait(10)
        self._save(content)

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            await self._reached.wait()


@contextmanager
def blocked_save(bench: Bench) -> Iterator[BlockedSave]:
    save = bench.history.save
    blocked = BlockedSave(save)
    bench.history.save = blocked  # type: ignore[method-assign]
    try:
        yield blocked
    finally:
        bench.history.save = save  # type: ignore[method-assign]
        blocked.go.set()


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


async def test_stopping_waits_for_ends_that_others_announce(bench: Bench) -> None:
    await bench.running()
    waiting = await bench.submit()
    with blocked_save(bench) as save:
        cancelling = asyncio.ensure_future(bench.queue.cancel(waiting))
        await save.reached()
        stopping = asyncio.ensure_future(bench.queue.stop())
        await bench.until("changed", 1, "cancelling")
        done, _ = await asyncio.wait([stopping], timeout=0.05)
        assert not done
    await stopping
    assert ("finished", 2, "cancelled") in bench.told
    await cancelling


async def test_a_job_is_not_accepted_while_stopping(bench: Bench, tmp_path: Path) -> None:
    with blocked_save(bench) as save:
        submitting = asyncio.ensure_future(bench.submit())
        await save.reached()
        stopping = asyncio.ensure_future(bench.queue.stop())
        done, _ = await asyncio.wait([stopping], timeout=0.05)
        assert not done
    with pytest.raises(Cancelled, match="stopping"):
        await submitting
    await stopping
    assert bench.told == []
    assert bench.queue.jobs == []
    assert json.loads((tmp_path / "jobs.json").read_text())["active"] == []


@pytest.mark.parametrize("reasons", [["manual"], []])
async def test_a_hold_does_not_revive_what_ended(bench: Bench, reasons: list[str]) -> None:
    await bench.running()
    bench.queue.hold([] if reasons else ["manual"])
    waiting = await bench.submit(terms=Terms(background=True))
    with blocked_save(bench) as save:
        cancelling = asyncio.ensure_future(bench.queue.cancel(waiting))
        await save.reached()
        bench.queue.hold(reasons)
        assert waiting.state is JobState.CANCELLED
        assert waiting.hold_reasons == ()
    await cancelling
    await bench.until("finished", waiting.id, "cancelled")


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


async def test_each_user_has_one_comparison_at_a_time(bench: Bench) -> None:
    ids = [digit * 128 for digit in "abc"]
    first = Diff(deployment=ids[0], other=ids[1])
    other = Diff(deployment=ids[0], other=ids[2])
    job = await bench.submit(operation=first, who=Initiator(5))
    assert await bench.submit(operation=first, who=Initiator(5)) is job
    with pytest.raises(LimitsExceeded, match="of this user"):
        await bench.submit(operation=other, who=Initiator(5))
    for who in (Initiator(6), Initiator(0), Initiator(0)):
        await bench.submit(operation=other, who=who, join=False)
    await bench.until("changed", job.id, "running")
    bench.workers[0].end(Outcome())
    await bench.until("finished", job.id, "done")
    await bench.submit(operation=other, who=Initiator(5), join=False)


# what follows


async def following(bench: Bench, first: FakeWorker, result: dict[str, Any]) -> FakeWorker:
    """The worker of what follows, once the first has ended."""
    count = len(bench.workers)
    first.end(Outcome(result=result))
    async with asyncio.timeout(10):
        while len(bench.workers) == count:  # noqa: ASYNC110 (the loop's own doing)
            await asyncio.sleep(0)
    await bench.workers[-1].running.wait()
    return bench.workers[-1]


async def soft(bench: Bench, **options: Any) -> tuple[Job, FakeWorker]:
    job = await bench.submit(
        operation=Rollback(lock_timeout=7), terms=Terms(apply=Apply.SOFT_REBOOT), **options
    )
    await bench.until("changed", job.id, "running")
    await bench.workers[-1].running.wait()
    return job, bench.workers[-1]


async def test_a_soft_reboot_is_prepared_by_the_same_job(bench: Bench) -> None:
    job, worker = await soft(bench)
    second = await following(bench, worker, {"result": "queued"})
    assert bench.operations[-1] == SoftReboot(lock_timeout=7)
    assert job.state is JobState.RUNNING
    second.end(Outcome(result={"soft-reboot": "prepared"}))
    await bench.until("finished", 1, "done")
    assert job.result == {"result": "queued", "soft-reboot": "prepared"}


async def test_what_was_done_before_it_is_told(bench: Bench) -> None:
    job, worker = await soft(bench)
    second = await following(bench, worker, {"result": "queued"})
    second.end(Outcome(failure=Failure.of(NoSpace("full"))))
    await bench.until("finished", 1, "failed")
    assert job.failure == Failure(
        ErrorName.NO_SPACE, "done, and effective from the next reboot; but there is no soft reboot: full"
    )


async def test_nothing_follows_a_failure_or_a_cancellation(bench: Bench) -> None:
    _, worker = await soft(bench)
    worker.end(Outcome(failure=Failure.of(NoSpace("full"))))
    await bench.until("finished", 1, "failed")
    job, worker = await soft(bench)
    worker.obedient = False
    await bench.queue.cancel(job)
    worker.end(Outcome(result={"result": "queued"}))
    await bench.until("finished", 2, "done")
    assert [type(operation) for operation in bench.operations] == [Rollback, Rollback]


async def test_the_second_worker_is_the_one_that_is_cancelled(bench: Bench) -> None:
    job, worker = await soft(bench)
    second = await following(bench, worker, {})
    await bench.queue.cancel(job)
    assert second.cancelled
    await bench.until("finished", 1, "cancelled")


async def test_who_joins_in_time_gets_one_too_and_a_reboot_is_more(bench: Bench) -> None:
    job = await bench.submit(operation=Rollback())
    await bench.until("changed", 1, "running")
    assert await bench.submit(operation=Rollback(), terms=Terms(apply=Apply.SOFT_REBOOT)) is job
    assert job.terms.apply is Apply.SOFT_REBOOT
    await bench.workers[0].running.wait()
    second = await following(bench, bench.workers[0], {})
    assert await bench.submit(operation=Rollback(), terms=Terms(apply=Apply.SOFT_REBOOT)) is job
    assert await bench.submit(operation=Rollback(), terms=Terms(apply=Apply.REBOOT)) is job
    assert job.terms.apply is Apply.REBOOT
    second.end(Outcome())
    await bench.until("finished", 1, "done")
    assert len(bench.workers) == 2


async def test_who_comes_too_late_for_one_gets_a_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Job] = []

    async def refresh() -> None:
        # The work is done, the end is not announced.
        late.append(await bench.submit(operation=Rollback()))
        late.append(await bench.submit(operation=Rollback(), terms=Terms(apply=Apply.SOFT_REBOOT)))

    monkeypatch.setattr(bench, "refresh", refresh)
    job = await bench.submit(operation=Rollback())
    await bench.until("changed", 1, "running")
    bench.workers[0].end(Outcome())
    await bench.until("finished", 1, "done")
    assert late[0] is job
    assert late[1] is not job
