"""Results of comparisons are given again only while they are true."""

from __future__ import annotations

from typing import Any

from hostimage_dbus.names import JobState
from hostimaged.bus.diffs import DiffCache
from hostimaged.bus.findings import DeploymentRow
from hostimaged.errors import NoSpace
from hostimaged.jobs.job import Failure, Initiator, Job
from hostimaged.jobs.operations import Diff, Operation, Unstage

ONE, TWO = "1" * 128, "2" * 128
ROWS = [DeploymentRow(id=ONE, kernel_arguments="rw"), DeploymentRow(id=TWO, kernel_arguments="rw")]
THERE = Diff(deployment=ONE, other=TWO)
BACK = Diff(deployment=TWO, other=ONE)


def ended(operation: Operation = THERE, state: JobState = JobState.DONE, **result: Any) -> Job:
    job = Job(1, operation, Initiator(0))
    job.result = {"diff": "{}", "problems": []} | result
    job.finish(state, None if state is JobState.DONE else Failure.of(NoSpace("full")))
    return job


def test_the_same_again_is_known() -> None:
    cache = DiffCache()
    assert cache.find(THERE, ROWS) is None
    cache.take(ended(), ROWS)
    found = cache.find(THERE.model_copy(update={"lock_timeout": 1}), ROWS)
    assert found is not None
    assert found.result == {"diff": "{}", "problems": []}
    assert cache.find(BACK, ROWS) is None
    assert cache.find(Unstage(), ROWS) is None


def test_what_may_be_different_now_is_not() -> None:
    cache = DiffCache()
    cache.take(ended(), ROWS)
    changed = [ROWS[0], ROWS[1].model_copy(update={"kernel_arguments": "rw quiet"})]
    assert cache.find(THERE, changed) is None
    assert cache.find(THERE, ROWS[:1]) is None
    assert cache.find(THERE, ROWS) is not None


def test_only_whole_results_are_kept() -> None:
    cache = DiffCache()
    cache.take(ended(state=JobState.FAILED), ROWS)
    cache.take(ended(problems=["the kernel arguments cannot be compared"]), ROWS)
    cache.take(ended(Unstage()), ROWS)
    assert cache.find(THERE, ROWS) is None


def test_the_oldest_is_forgotten() -> None:
    cache = DiffCache()
    rows = [DeploymentRow(id=f"{number:0128x}") for number in range(12)]
    pairs = [Diff(deployment=rows[0].id, other=row.id) for row in rows[1:]]
    for pair in pairs:
        cache.take(ended(pair), rows)
    known = [cache.find(pair, rows) is not None for pair in pairs]
    assert known == [False] * 3 + [True] * 8
