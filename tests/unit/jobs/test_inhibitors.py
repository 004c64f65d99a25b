"""What is locked while a job runs, and that it is given back in time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from hostimage_dbus.names import JobState, Phase
from hostimaged.jobs.inhibitors import DOWNLOAD, STAGING, Inhibitors, wanted
from hostimaged.jobs.job import Initiator, Job, Terms
from hostimaged.jobs.logind import Inhibition
from hostimaged.jobs.operations import Pull

BACKGROUND = Terms(background=True)


def job(
    phase: Phase | None = Phase.PULLING, state: JobState = JobState.RUNNING, terms: Terms | None = None
) -> Job:
    made = Job(1, Pull(reference="oci:/x"), Initiator(0), terms or Terms())
    made.state, made.phase = state, phase
    return made


@pytest.mark.parametrize(
    ("job", "inhibition"),
    [
        (job(), DOWNLOAD),
        (job(Phase.IMPORTING), DOWNLOAD),
        (job(state=JobState.FINALIZING), DOWNLOAD),
        (job(state=JobState.CANCELLING), DOWNLOAD),
        (job(terms=BACKGROUND), None),
        (job(Phase.STAGING), STAGING),
        (job(Phase.FINALIZING), STAGING),
        (job(Phase.STAGING, terms=BACKGROUND), STAGING),
        (job(Phase.RESOLVING), None),
        (job(Phase.VERIFYING), None),
        (job(Phase.DELETING), None),
        (job(None), None),
        (job(state=JobState.QUEUED), None),
        (job(state=JobState.HELD), None),
        (job(state=JobState.DONE), None),
        (job(Phase.STAGING, state=JobState.FAILED), None),
    ],
)
def test_what_a_job_locks(job: Job, inhibition: Inhibition | None) -> None:
    assert wanted(job) == inhibition


class Bench:
    """Locks are pipes: one is held as long as its end here has a writer."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.inhibitors = Inhibitors(self.take, tasks)
        self.go = asyncio.Event()
        self.go.set()
        self.taken: list[tuple[Inhibition, int]] = []
        self.broken = False

    async def take(self, inhibition: Inhibition) -> int | None:
        await self.go.wait()
        if self.broken:
            raise RuntimeError("broken")
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self.taken.append((inhibition, reading))
        return writing

    @property
    def held(self) -> list[Inhibition]:
        found = []
        for inhibition, reading in self.taken:
            try:
                os.read(reading, 1)
            except BlockingIOError:
                found.append(inhibition)
        return found


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        made = Bench(tasks)
        yield made
        made.inhibitors.close()
    assert made.held == []
    for _, reading in made.taken:
        os.close(reading)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_from_phase_to_phase(bench: Bench) -> None:
    one = job(None)
    for phase, held in [
        (None, []),
        (Phase.PULLING, [DOWNLOAD]),
        (Phase.IMPORTING, [DOWNLOAD]),
        (Phase.STAGING, [STAGING]),
        (Phase.DELETING, []),
    ]:
        one.phase = phase
        bench.inhibitors.follow(one)
        await settled()
        assert bench.held == held
        assert bench.inhibitors.held == len(held)
    assert len(bench.taken) == 2


async def test_a_job_that_somebody_waits_for_now(bench: Bench) -> None:
    one = job(terms=BACKGROUND)
    bench.inhibitors.follow(one)
    await settled()
    assert bench.taken == []
    one.join(Initiator(1000, name=":1.1"), Terms())
    bench.inhibitors.follow(one)
    await settled()
    assert bench.held == [DOWNLOAD]


async def test_it_is_released_at_once(bench: Bench) -> None:
    one = job()
    bench.inhibitors.follow(one)
    await settled()
    bench.inhibitors.release(one)
    assert bench.held == [], "before anything else happens"
    bench.inhibitors.release(one)


async def test_one_that_comes_too_late(bench: Bench) -> None:
    one = job()
    bench.go.clear()
    bench.inhibitors.follow(one)
    bench.inhibitors.release(one)
    bench.go.set()
    await settled()
    assert len(bench.taken) == 1
    assert bench.held == []


async def test_no_gap_between_two_locks(bench: Bench) -> None:
    one = job()
    bench.inhibitors.follow(one)
    await settled()
    bench.go.clear()
    one.phase = Phase.STAGING
    bench.inhibitors.follow(one)
    await settled()
    assert bench.held == [DOWNLOAD]
    one.phase = Phase.FINALIZING
    bench.inhibitors.follow(one)
    bench.go.set()
    await settled()
    assert bench.held == [STAGING]


async def test_the_end_releases_both(bench: Bench) -> None:
    one = job()
    bench.inhibitors.follow(one)
    await settled()
    bench.go.clear()
    one.phase = Phase.STAGING
    bench.inhibitors.follow(one)
    bench.inhibitors.release(one)
    assert bench.held == []
    bench.go.set()
    await settled()
    assert bench.held == []


async def test_jobs_have_locks_of_their_own(bench: Bench) -> None:
    one, two = job(), job(Phase.STAGING)
    two.id = 2
    for each in (one, two):
        bench.inhibitors.follow(each)
    await settled()
    bench.inhibitors.release(one)
    assert bench.held == [STAGING]


async def test_a_fault_costs_the_lock_only(bench: Bench) -> None:
    bench.broken = True
    with capture_logs() as logged:
        bench.inhibitors.follow(job())
        await settled()
    assert [(entry["event"], entry["log_level"]) for entry in logged] == [("inhibit.failed", "error")]
    assert bench.inhibitors.held == 0
