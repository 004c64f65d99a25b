"""Joining, order, holds, giving way and withdrawing: the rules of the queue, with obedient workers."""

from __future__ import annotations

from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimage_testing.queue_bench import Bench
from hostimaged.errors import Busy, Held, Internal, JobNotCancellable, LimitsExceeded
from hostimaged.jobs.job import JOINERS_PER_UID, Failure, Initiator, Job, Terms
from hostimaged.jobs.operations import Check, Collect, Operation, Pull
from hostimaged.jobs.process import Outcome
from hostimaged.jobs.queue import QUEUED_IN_ALL

ALICE, BOB = Initiator(1000, name=":1.1"), Initiator(1001, name=":1.2")
BACKGROUND = Terms(background=True)


def pull(name: str = "x", digest: str | None = None) -> Pull:
    return Pull(reference=f"oci:/{name}", expect_digest=digest)


def check(name: str = "x") -> Check:
    return Check(reference=f"oci:/{name}")


async def test_an_equal_request_joins(bench: Bench) -> None:
    first = await bench.submit(operation=pull(), who=ALICE)
    assert await bench.submit(operation=pull(), who=BOB, queue=False) is first
    await bench.until("changed", first.id, "running")
    assert await bench.submit(operation=pull(), who=ALICE) is first
    assert first.joiners == {1000: {":1.1"}, 1001: {":1.2"}}
    assert len(bench.workers) == 1


@pytest.mark.parametrize("other", [pull("y"), pull("x", "sha256:" + "a" * 64), check()])
async def test_another_request_does_not_join(bench: Bench, other: Operation) -> None:
    first = await bench.submit(operation=pull())
    assert await bench.submit(operation=other) is not first


async def test_what_the_settings_say_does_not_keep_from_joining(bench: Bench) -> None:
    first = await bench.submit(operation=pull())
    again = Pull(reference="oci:/x", verity="opportunistic", lock_timeout=1)
    assert await bench.submit(operation=again) is first


async def test_no_join_and_what_is_over_is_not_joined(bench: Bench) -> None:
    first = await bench.submit(operation=pull())
    await bench.until("changed", first.id, "running")
    assert await bench.submit(operation=pull(), join=False) is not first
    await bench.queue.cancel(first)
    assert first.state in (JobState.CANCELLING, JobState.CANCELLED)
    second = await bench.submit(operation=pull("z"), who=BOB)
    await bench.queue.cancel(second)
    assert await bench.submit(operation=pull("z"), who=BOB) is not second


async def test_users_come_before_the_background(bench: Bench) -> None:
    await bench.running()
    behind = [await bench.submit(terms=BACKGROUND), await bench.submit(terms=BACKGROUND)]
    users = [await bench.submit(), await bench.submit()]
    assert list(bench.queue.waiting) == [*users, *behind]
    # Whoever joins takes it along, behind those who were there before.
    joined = await bench.submit(operation=behind[1].operation, who=ALICE)
    assert joined is behind[1]
    assert list(bench.queue.waiting) == [*users, behind[1], behind[0]]
    assert joined.background, "how it was started stays true"


async def test_readers_and_a_mutating_job_run_side_by_side(bench: Bench) -> None:
    mutating, _ = await bench.running()
    reader = await bench.submit(operation=check())
    await bench.until("changed", reader.id, "running")
    second = await bench.submit(operation=check("y"))
    assert second.state is JobState.QUEUED
    assert bench.queue.active is mutating
    assert bench.queue.jobs == [mutating, reader, second]
    with pytest.raises(Busy):
        await bench.submit(operation=check("z"), queue=False)


async def test_a_background_check_gives_way_and_comes_back(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    users, worker = await bench.running()
    assert bench.workers[0].cancelled
    await bench.until("changed", watch.id, "queued")
    assert (watch.started, watch.phase, watch.progress.fraction) == (0, None, -1.0)
    assert bench.queue.active is users
    assert len(bench.workers) == 2
    worker.end(Outcome())
    await bench.until("finished", users.id, "done")
    await bench.count("changed", watch.id, "running", 2)
    bench.workers[2].end(Outcome(result={"version": "1"}))
    await bench.until("finished", watch.id, "done")
    assert ("finished", watch.id, "cancelled") not in bench.told


async def test_a_background_check_that_was_done_already_is_done(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    bench.workers[0].obedient = False
    await bench.running()
    bench.workers[0].end(Outcome(result={"version": "1"}))
    await bench.until("finished", watch.id, "done")


async def test_one_that_gives_way_can_still_be_cancelled(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    bench.workers[0].obedient = False
    await bench.running()
    await bench.queue.cancel(watch)
    bench.workers[0].end(Outcome(failure=bench.cancelled))
    await bench.until("finished", watch.id, "cancelled")


async def test_one_that_fails_while_it_gives_way_has_failed(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    bench.workers[0].obedient = False
    await bench.running()
    bench.workers[0].end(Outcome(failure=Failure.of(Internal())))
    await bench.until("finished", watch.id, "failed")


async def test_a_user_who_joins_a_background_check_keeps_it_running(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    assert await bench.submit(operation=check(), who=ALICE) is watch
    await bench.running()
    assert not bench.workers[0].cancelled
    assert not watch.terms.background


async def test_a_user_who_joins_one_that_gives_way_gets_it_at_once(bench: Bench) -> None:
    watch = await bench.submit(operation=check(), terms=BACKGROUND)
    await bench.until("changed", watch.id, "running")
    await bench.running()
    await bench.until("changed", watch.id, "queued")
    assert await bench.submit(operation=check(), who=ALICE) is watch
    await bench.count("changed", watch.id, "running", 2)


async def test_a_background_pull_is_not_stopped(bench: Bench) -> None:
    background = await bench.submit(terms=BACKGROUND)
    await bench.until("changed", background.id, "running")
    await bench.submit()
    assert not bench.workers[0].cancelled


async def test_holds(bench: Bench) -> None:
    bench.queue.hold(["manual"])
    held = await bench.submit(operation=check(), terms=BACKGROUND)
    assert (held.state, held.hold_reasons) == (JobState.HELD, ("manual",))
    with pytest.raises(Held, match="manual"):
        await bench.submit(operation=check("y"), terms=BACKGROUND, queue=False)
    users = await bench.submit(operation=pull("y"))
    await bench.until("changed", users.id, "running")
    bench.workers[0].end(Outcome())
    await bench.until("finished", users.id, "done")
    assert held.state is JobState.HELD
    bench.queue.hold([])
    assert held.hold_reasons == ()
    await bench.until("changed", held.id, "running")
    # What runs goes on.
    bench.queue.hold(["manual"])
    assert held.state is JobState.RUNNING


async def test_a_user_who_joins_what_is_held_releases_it(bench: Bench) -> None:
    bench.queue.hold(["manual"])
    held = await bench.submit(operation=check(), terms=BACKGROUND)
    assert await bench.submit(operation=check(), who=ALICE) is held
    await bench.until("changed", held.id, "running")


@pytest.mark.parametrize(
    ("terms", "state"),
    [
        (BACKGROUND, JobState.HELD),
        (Terms(background=True, allow_metered=True), JobState.HELD),
        (Terms(background=True, allow_metered=True, allow_on_battery=True), JobState.QUEUED),
    ],
)
async def test_holds_that_do_not_count(bench: Bench, terms: Terms, state: JobState) -> None:
    bench.queue.hold(["metered", "battery"])
    job = await bench.submit(operation=check(), terms=terms)
    assert job.state is state
    # What one of those who ask allows is allowed.
    await bench.submit(operation=check(), terms=Terms(background=True, allow_metered=True))
    await bench.submit(operation=check(), terms=Terms(background=True, allow_on_battery=True))
    await bench.until("changed", job.id, "running")


async def test_held_jobs_can_be_cancelled(bench: Bench) -> None:
    bench.queue.hold(["manual"])
    job = await bench.submit(terms=BACKGROUND)
    await bench.queue.cancel(job)
    assert (job.state, job.hold_reasons) == (JobState.CANCELLED, ())


async def test_the_last_one_to_withdraw_stops_the_job(bench: Bench) -> None:
    job = await bench.submit(operation=pull(), who=ALICE)
    await bench.submit(operation=pull(), who=BOB)
    await bench.submit(operation=pull(), who=Initiator(1000, name=":1.9"))
    await bench.queue.withdraw(job, 1000, ":1.9")
    assert job.asked_by(1000)
    await bench.queue.withdraw(job, 1001, ":1.2")
    assert not job.asked_by(1001)
    assert job.state in (JobState.QUEUED, JobState.RUNNING)
    # Another program of the same user speaks for all of them.
    await bench.queue.withdraw(job, 1000, ":1.77")
    await bench.until("finished", job.id, "cancelled")
    assert job.failure is not None
    assert job.failure.name is ErrorName.CANCELLED
    with pytest.raises(JobNotCancellable):
        await bench.queue.withdraw(job, 1000, ":1.1")


async def test_joiners_and_jobs_are_limited(bench: Bench) -> None:
    job = await bench.submit(operation=pull(), who=Initiator(7, name=":0"))
    for number in range(1, JOINERS_PER_UID):
        await bench.submit(operation=pull(), who=Initiator(7, name=f":{number}"))
    with pytest.raises(LimitsExceeded):
        await bench.submit(operation=pull(), who=Initiator(7, name=":more"))
    assert await bench.submit(operation=pull(), who=Initiator(7, name=":0")) is job
    for number in range(QUEUED_IN_ALL):
        await bench.submit(who=Initiator(2000 + number))
    with pytest.raises(LimitsExceeded, match="64 jobs"):
        await bench.submit(who=Initiator(3000))
    await bench.submit(who=Initiator(0))


async def test_a_job_that_ended_is_not_listed_while_its_end_is_written(bench: Bench) -> None:
    job, worker = await bench.running()
    listed: list[Any] = []
    save = bench.history.save

    def spy(content: bytes) -> None:
        listed.append((bench.queue.jobs, bench.queue.active, b'"active": []' in content))
        save(content)

    bench.history.save = spy  # type: ignore[method-assign]
    worker.end(Outcome())
    await bench.until("finished", job.id, "done")
    assert listed[0] == ([], None, True)


async def test_stopping_ends_all_lanes(bench: Bench) -> None:
    jobs: list[Job] = [
        await bench.submit(operation=check(), terms=BACKGROUND),
        await bench.submit(operation=check("y")),
        await bench.submit(),
        await bench.submit(),
    ]
    await bench.queue.stop()
    for job in jobs:
        await bench.until("finished", job.id, "cancelled")


async def test_a_collection_in_the_background_gives_way_to_all_that_users_want(bench: Bench) -> None:
    collection = await bench.submit(operation=Collect(), terms=BACKGROUND)
    await bench.until("changed", collection.id, "running")
    reader = await bench.submit(operation=check())
    assert bench.workers[0].cancelled
    await bench.until("changed", collection.id, "queued")
    await bench.until("changed", reader.id, "running")
    users, worker = await bench.running()
    bench.workers[1].end(Outcome())
    await bench.until("finished", reader.id, "done")
    assert str(collection.state) == "queued", "while a user's job runs"
    worker.end(Outcome())
    await bench.until("finished", users.id, "done")
    await bench.count("changed", collection.id, "running", 2)
    assert len(bench.workers) == 4
    bench.workers[3].end(Outcome())
    await bench.until("finished", collection.id, "done")


async def test_who_asks_for_a_collection_that_runs_in_the_background_gets_it(bench: Bench) -> None:
    collection = await bench.submit(operation=Collect(), terms=BACKGROUND)
    await bench.until("changed", collection.id, "running")
    assert await bench.submit(operation=Collect(keep_pulled=3)) is collection
    assert not bench.workers[0].cancelled
    bench.workers[0].end(Outcome())
    await bench.until("finished", collection.id, "done")


async def test_a_dry_run_reads_beside_what_changes_something(bench: Bench) -> None:
    _, worker = await bench.running()
    dry = await bench.submit(operation=Collect(dry_run=True))
    await bench.until("changed", dry.id, "running")
    real = await bench.submit(operation=Collect())
    assert real is not dry
    assert str(real.state) == "queued"
    bench.workers[1].end(Outcome())
    await bench.until("finished", dry.id, "done")
    worker.end(Outcome())
    await bench.until("changed", real.id, "running")
    bench.workers[2].end(Outcome())
    await bench.until("finished", real.id, "done")
