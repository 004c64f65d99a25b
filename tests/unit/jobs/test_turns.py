"""A job that needs the repository alone: readers stop or pause first, and go on afterwards."""

from __future__ import annotations

import re
import typing
from typing import Any, ClassVar, Literal

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.names import MANAGER_INTERFACE, JobState
from hostimage_testing.queue_bench import Bench, FakeWorker
from hostimaged.bus import model
from hostimaged.bus.requests import OPERATIONS
from hostimaged.jobs import kinds, lanes, turns
from hostimaged.jobs.events import AloneEvent, MessageEvent, PausedEvent
from hostimaged.jobs.job import Initiator, Job, Terms
from hostimaged.jobs.kinds import KINDS, Access
from hostimaged.jobs.operations import Check, Operation, Pull
from hostimaged.jobs.process import Outcome

BACKGROUND = Terms(background=True)
ASK, GIVE_BACK = AloneEvent(wanted=True), AloneEvent(wanted=False)
PAUSED, GOES_ON = PausedEvent(paused=True), PausedEvent(paused=False)


class Collect(Pull):
    """Stands for a kind that later versions have."""

    kind: Literal["collect"] = "collect"  # type: ignore[assignment]


class Verify(Check):
    """Stands for a kind that later versions have."""

    gives_way: ClassVar[bool] = False
    kind: Literal["verify"] = "verify"  # type: ignore[assignment]


async def started(bench: Bench, operation: Any, terms: Terms | None = None) -> tuple[Job, FakeWorker]:
    job = await bench.submit(operation=operation, terms=terms or Terms())
    await bench.until("changed", job.id, "running")
    worker = bench.workers[-1]
    await worker.running.wait()
    return job, worker


def collect() -> Collect:
    return Collect(reference="oci:/x")


def verify(name: str = "x") -> Verify:
    return Verify(reference=f"oci:/{name}")


def test_the_table_knows_every_kind() -> None:
    operations = {
        typing.get_args(operation.model_fields["kind"].annotation)[0]: operation
        for operation in typing.get_args(typing.get_args(Operation)[0])
    }
    decisions = {"policy", "hold", "reload", "cancel"}
    assert (operations.keys() | set(OPERATIONS.values())) - decisions == KINDS.keys()
    reading = (Access.UNLOCKED, Access.SLICES)
    for kind in KINDS.keys() & operations.keys():
        operation = operations[kind]
        assert operation.mutating == (KINDS[kind].access not in reading), kind
    assert lanes.KINDS is turns.KINDS is model.KINDS is kinds.KINDS


def test_states_are_those_of_the_interface() -> None:
    (told,) = re.findall(r"State: what is being done: ([a-z,\s]+);", load_shipped()[MANAGER_INTERFACE].xml)
    assert {kind.state for kind in KINDS.values()} <= set(re.split(r",\s+", told)) - {"idle"}


async def test_without_readers_it_is_granted_at_once(bench: Bench) -> None:
    job, worker = await started(bench, collect())
    worker.send(ASK)
    assert worker.requests == ["alone"]
    worker.send(GIVE_BACK)
    worker.send(ASK)
    assert worker.requests == ["alone", "alone"]
    worker.end(Outcome())
    await bench.until("finished", job.id, "done")


async def test_a_reader_in_the_foreground_pauses(bench: Bench) -> None:
    reader, reading = await started(bench, verify())
    job, worker = await started(bench, collect())
    assert reading.requests == [], "as long as nobody asks"
    worker.send(ASK)
    assert reading.requests == ["pause"]
    assert worker.requests == []
    reading.send(PAUSED)
    assert worker.requests == ["alone"]
    worker.send(GIVE_BACK)
    assert reading.requests == ["pause", "resume"]
    reading.send(GOES_ON)
    assert reader.state is JobState.RUNNING
    worker.end(Outcome())
    await bench.until("finished", job.id, "done")
    reading.end(Outcome())
    await bench.until("finished", reader.id, "done")


async def test_a_job_that_ends_gives_it_back(bench: Bench) -> None:
    _, reading = await started(bench, verify())
    job, worker = await started(bench, collect())
    worker.send(ASK)
    reading.send(PAUSED)
    worker.end(Outcome())
    await bench.until("finished", job.id, "done")
    assert reading.requests == ["pause", "resume"]


async def test_a_reader_that_ends_is_not_waited_for(bench: Bench) -> None:
    reader, reading = await started(bench, verify())
    _, worker = await started(bench, collect())
    worker.send(ASK)
    reading.end(Outcome())
    await bench.until("finished", reader.id, "done")
    assert worker.requests == ["alone"]


async def test_a_background_reader_is_stopped_and_comes_back(bench: Bench) -> None:
    reader, reading = await started(bench, verify(), BACKGROUND)
    reading.obedient = False
    _, worker = await started(bench, collect(), BACKGROUND)
    assert not reading.cancelled
    worker.send(ASK)
    assert reading.cancelled
    assert worker.requests == []
    reading.end(Outcome(failure=Bench.cancelled))
    await bench.until("changed", reader.id, "queued")
    assert worker.requests == ["alone"]
    assert len(bench.workers) == 2, "it waits for the other"
    worker.send(GIVE_BACK)
    worker.end(Outcome())
    await bench.count("changed", reader.id, "running", 2)
    bench.workers[2].end(Outcome())
    await bench.until("finished", reader.id, "done")


async def test_a_user_who_joins_makes_it_pause_instead(bench: Bench) -> None:
    reader, reading = await started(bench, verify(), BACKGROUND)
    await bench.submit(operation=verify(), who=Initiator(1000, name=":1.1"))
    _, worker = await started(bench, collect())
    worker.send(ASK)
    assert not reading.cancelled
    assert reading.requests == ["pause"]
    reading.send(PAUSED)
    assert worker.requests == ["alone"]
    assert reader.state is JobState.RUNNING


async def test_a_reader_that_starts_meanwhile_pauses_first(bench: Bench) -> None:
    _, worker = await started(bench, collect())
    worker.send(ASK)
    _, reading = await started(bench, verify())
    assert reading.requests == ["pause"]
    assert worker.requests == ["alone"], "what was granted stays granted"
    worker.send(GIVE_BACK)
    assert reading.requests == ["pause", "resume"]


async def test_checks_hold_no_lock(bench: Bench) -> None:
    _, checking = await started(bench, Check(reference="oci:/x"))
    _, worker = await started(bench, collect())
    worker.send(ASK)
    assert worker.requests == ["alone"]
    assert checking.requests == []
    assert not checking.cancelled


async def test_one_that_pauses_unasked_proves_nothing(bench: Bench) -> None:
    _, reading = await started(bench, verify())
    reading.send(PAUSED)
    _, worker = await started(bench, collect())
    worker.send(ASK)
    assert worker.requests == []
    reading.send(PAUSED)
    reading.send(GOES_ON)
    assert worker.requests == ["alone"]


async def test_waiting_can_be_cancelled(bench: Bench) -> None:
    _, reading = await started(bench, verify())
    job, worker = await started(bench, collect())
    worker.send(ASK)
    await bench.queue.cancel(job)
    await bench.until("finished", job.id, "cancelled")
    assert reading.requests == ["pause", "resume"]


@pytest.mark.parametrize("operation", [Pull(reference="oci:/y"), Check(reference="oci:/y"), verify()])
async def test_who_may_not_ask_fails(bench: Bench, operation: Any) -> None:
    job, worker = await started(bench, operation)
    with pytest.raises(Exception, match="internal"):
        worker.send(ASK)
    worker.send(MessageEvent(text="still here"))
    assert worker.requests == []
    assert job.state is JobState.RUNNING
    assert ErrorName.INTERNAL
