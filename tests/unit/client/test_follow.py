"""Following a job: every order of events that a bus can produce."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_NO_SERVICE, EXIT_USAGE, ErrorName
from hostimage_dbus.names import JOB_INTERFACE, job_path
from hostimage_dbus.transport import BusError, Variant
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.follow import Follower, Patience
from hostimagectl.job import Job

PATH = job_path(1)
SHORT = Patience(restart=0.05, announcement=0.05, removal=0.05)


class Recorder:
    """A display that remembers."""

    interval: float | None = None

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.notes: list[str] = []

    def update(self, job: Job) -> None:
        self.jobs.append(job)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None: ...


@pytest.fixture
def display() -> Recorder:
    return Recorder()


async def pull(daemon: Any) -> str:
    path: str = await daemon.start_job("Pull", "s", ["oci:/image"])
    return path


class Run:
    """A follower at work in a task."""

    def __init__(self, daemon: Any, display: Recorder, patience: Patience) -> None:
        self.follower = Follower(daemon, display, patience)
        self._daemon = daemon

    def start(self, request: Callable[[], Awaitable[str]] | None = None) -> asyncio.Task[Job]:
        return asyncio.create_task(self.follower.run(request or (lambda: pull(self._daemon))))


@pytest.fixture
def run(daemon: Any, display: Recorder) -> Run:
    return Run(daemon, display, SHORT)


async def test_a_job_is_followed_to_its_result(bus: Any, run: Run, display: Recorder) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.change(PATH, State="running", Phase="pulling", Progress=0.25, BytesDone=10, BytesTotal=40)
    await asyncio.sleep(0.01)
    assert (display.jobs[-1].phase, display.jobs[-1].progress) == ("pulling", 0.25)
    assert (display.jobs[-1].bytes_done, display.jobs[-1].bytes_total) == (10, 40)
    bus.end(PATH, "done", Result={"changed": Variant("b", True), "tag": Variant("s", "x")})
    job = await task
    assert job.succeeded
    assert job.result == {"changed": True, "tag": "x"}
    assert job.error is None


async def test_signals_are_subscribed_before_the_call(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("Pull")
    assert len(bus.rules) == 3
    assert [member for member, _, _ in bus.calls][:2] == ["GetNameOwner", "Pull"]
    bus.end(PATH, "done")
    await task


async def test_a_job_that_ended_is_told_though_nothing_answers_any_more(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.change(PATH, Result={"tag": Variant("s", "x")})
    answer = bus.call

    async def hang(*arguments: Any, **options: Any) -> Any:
        bus.lost.set()
        await asyncio.Event().wait()
        return await answer(*arguments, **options)

    bus.call = hang
    bus.end(PATH, "done")
    job = await task
    assert (job.state, job.result) == ("done", {"tag": "x"})


async def test_a_job_that_ended_before_the_reply(bus: Any, run: Run) -> None:
    async def end_at_once() -> None:
        bus.end(PATH, "done", Result={"changed": Variant("b", False)})

    bus.on_pull = end_at_once
    job = await run.start()
    assert job.succeeded
    assert job.result == {"changed": False}


async def test_a_job_that_ended_and_was_forgotten_before_the_reply(bus: Any, run: Run) -> None:
    async def end_and_forget() -> None:
        bus.end(PATH, "failed", ErrorName.NETWORK, "no route")
        del bus.jobs[PATH]

    bus.on_pull = end_and_forget
    job = await run.start()
    assert not job.succeeded
    assert job.error is not None
    assert (job.error.name, job.error.message) == (ErrorName.NETWORK, "no route")


async def test_a_job_whose_end_was_not_signalled_is_found_in_the_results(bus: Any, run: Run) -> None:
    async def forget() -> None:
        del bus.jobs[PATH]

    bus.on_pull = forget
    error = {"name": ErrorName.NO_SPACE, "message": "disk full"}
    bus.status = {
        "results": [{"id": 1, "kind": "pull", "target": "oci:/i", "state": "failed", "error": error}]
    }
    job = await run.start()
    assert job.error is not None
    assert (job.state, job.error.name, job.target) == ("failed", ErrorName.NO_SPACE, "oci:/i")


async def test_a_job_that_nobody_knows_is_an_error(bus: Any, run: Run) -> None:
    async def forget() -> None:
        del bus.jobs[PATH]

    bus.on_pull = forget
    with pytest.raises(Failure) as caught:
        await run.start()
    assert caught.value.name == ErrorName.UNKNOWN_OBJECT


async def test_the_end_is_known_from_properties_alone(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.change(PATH, State="failed", Error=[ErrorName.DIGEST_MISMATCH, "layer"])
    job = await task
    assert job.error is not None
    assert job.error.name == ErrorName.DIGEST_MISMATCH


async def test_signals_of_strangers_and_of_other_jobs_are_ignored(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    lie = {"State": Variant("s", "done")}
    bus.signal(
        PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged", [JOB_INTERFACE, lie, []], ":1.66"
    )
    bus.signal(
        "/org/hostimage1", "org.hostimage1.Manager", "JobRemoved", [1, PATH, "pull", "done", "", ""], ":1.66"
    )
    bus.signal(
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        "NameOwnerChanged",
        ["org.hostimage1", "", ":1.66"],
        ":1.66",
    )
    bus.announce(job_path(99), "done")
    await asyncio.sleep(0.12)
    assert not task.done()
    bus.end(PATH, "cancelled", ErrorName.CANCELLED, "cancelled")
    assert (await task).cancelled


async def test_malformed_signals_do_no_harm(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    for body in ([], [1], [JOB_INTERFACE], [JOB_INTERFACE, "x", []], [JOB_INTERFACE, {"State": 5}, []]):
        bus.signal(PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged", body)
        bus.signal("/org/hostimage1", "org.hostimage1.Manager", "JobRemoved", body)
        bus.signal("/x", "org.freedesktop.DBus", "NameOwnerChanged", body, "org.freedesktop.DBus")
    bus.end(PATH, "done")
    assert (await task).succeeded


async def test_many_other_jobs_do_not_push_ours_out(bus: Any, run: Run) -> None:
    async def crowd() -> None:
        for number in range(100, 300):
            bus.announce(job_path(number), "done")
        bus.announce(PATH, "failed", ErrorName.BUSY, "first")
        for number in range(300, 340):
            bus.announce(job_path(number), "done")

    bus.on_pull = crowd
    job = await run.start()
    assert job.error is not None
    assert job.error.message == "first"


async def test_an_error_of_the_call_is_the_failure(bus: Any, run: Run) -> None:
    bus.errors["Pull"] = BusError(ErrorName.INVALID_ARGS, "no tracked image is set")
    with pytest.raises(Failure) as caught:
        await run.start()
    assert (caught.value.code, caught.value.message) == (EXIT_USAGE, "no tracked image is set")


async def test_a_daemon_started_by_the_call_is_followed(bus: Any, run: Run) -> None:
    bus.owner = None
    task = run.start(lambda: _start_then_pull(bus, run))
    await bus.called("GetAll")
    bus.end(PATH, "done")
    assert (await task).succeeded


async def _start_then_pull(bus: Any, run: Run) -> str:
    bus.own(":1.8")
    return await pull(run._daemon)


async def test_daemon_gone_for_good(bus: Any, run: Run, display: Recorder) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.own(None)
    with pytest.raises(Failure) as caught:
        await task
    assert caught.value.code == EXIT_NO_SERVICE
    assert "did not come back" in caught.value.message
    assert any("went away" in note for note in display.notes)


async def test_daemon_gone_right_after_its_reply(bus: Any, run: Run, daemon: Any) -> None:
    async def request() -> str:
        path = await pull(daemon)
        bus.own(None)
        return path

    with pytest.raises(Failure) as caught:
        async with asyncio.timeout(2):
            await run.start(request)
    assert caught.value.code == EXIT_NO_SERVICE


async def test_daemon_comes_back_and_announces_the_orphan(bus: Any, run: Run, display: Recorder) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.own(None)
    await asyncio.sleep(0.01)
    bus.own(":1.9")
    bus.announce(PATH, "failed", ErrorName.INTERNAL, "hostimaged was restarted")
    job = await task
    assert job.error is not None
    assert job.error.message == "hostimaged was restarted"
    assert len(display.notes) >= 1


async def test_daemon_comes_back_and_remembers_the_result(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.own(None)
    await asyncio.sleep(0.01)
    error = {"name": ErrorName.INTERNAL, "message": "orphaned"}
    bus.status = {"results": [{"id": 1, "state": "failed", "error": error}]}
    bus.own(":1.9")
    job = await task
    assert job.error is not None
    assert job.error.message == "orphaned"


async def test_daemon_comes_back_without_knowing_the_job(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.own(None)
    await asyncio.sleep(0.01)
    bus.own(":1.9")
    with pytest.raises(Failure) as caught:
        await task
    assert caught.value.code == EXIT_NO_SERVICE
    assert "knows nothing of job 1" in caught.value.message


async def test_the_bus_is_lost(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    bus.lost.set()
    with pytest.raises(Failure) as caught:
        await task
    assert caught.value.code == EXIT_NO_SERVICE


async def test_first_interrupt_cancels(bus: Any, run: Run, display: Recorder) -> None:
    bus.on_cancel = lambda path: bus.end(path, "cancelled", ErrorName.CANCELLED, "cancelled")
    task = run.start()
    await bus.called("GetAll")
    run.follower.interrupt(signal.SIGINT)
    job = await task
    assert job.cancelled
    assert run.follower.cancel_requested
    assert bus.count("Cancel") == 1
    assert "cancelling job 1" in display.notes[0]


async def test_a_real_signal_reaches_the_follower(bus: Any, run: Run) -> None:
    bus.on_cancel = lambda path: bus.end(path, "cancelled", ErrorName.CANCELLED, "cancelled")
    task = run.start()
    await bus.called("GetAll")
    signal.raise_signal(signal.SIGTERM)
    assert (await task).cancelled


async def test_an_ignored_signal_stays_ignored(bus: Any, run: Run) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        task = run.start()
        await bus.called("GetAll")
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.01)
        assert bus.count("Cancel") == 0
        bus.end(PATH, "done")
        assert (await task).succeeded
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


async def test_interrupt_before_the_job_is_known(bus: Any, run: Run, display: Recorder) -> None:
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    bus.on_pull = slow
    bus.on_cancel = lambda path: bus.end(path, "cancelled", ErrorName.CANCELLED, "cancelled")
    task = run.start()
    await bus.called("Pull")
    run.follower.interrupt(signal.SIGINT)
    await asyncio.sleep(0.01)
    assert bus.count("Cancel") == 0
    assert "as soon as" in display.notes[-1]
    go.set()
    assert (await task).cancelled


async def test_a_job_finishes_in_spite_of_the_interrupt(bus: Any, run: Run) -> None:
    bus.on_cancel = lambda path: bus.end(path, "done")
    task = run.start()
    await bus.called("GetAll")
    run.follower.interrupt(signal.SIGINT)
    assert (await task).succeeded


async def test_a_job_that_cannot_be_cancelled_is_waited_for(bus: Any, run: Run, display: Recorder) -> None:
    bus.errors["Cancel"] = BusError(ErrorName.JOB_NOT_CANCELLABLE, "it is being finalised")
    task = run.start()
    await bus.called("GetAll")
    run.follower.interrupt(signal.SIGINT)
    await bus.called("Cancel")
    assert not task.done()
    assert "it is being finalised" in display.notes[-1]
    bus.end(PATH, "done")
    assert (await task).succeeded


async def test_second_interrupt_leaves(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    run.follower.interrupt(signal.SIGTERM)
    await bus.called("Cancel")
    run.follower.interrupt(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        await task
    assert caught.value.code == 128 + signal.SIGTERM
    assert run.follower.path == PATH


async def test_second_interrupt_leaves_though_nothing_answers(bus: Any, run: Run) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    bus.on_pull = never
    task = run.start()
    await bus.called("Pull")
    run.follower.interrupt(signal.SIGINT)
    run.follower.interrupt(signal.SIGINT)
    with pytest.raises(Interrupted):
        await task
    assert run.follower.path is None


async def test_cancellation_of_the_task_leaves_nothing_behind(bus: Any, run: Run) -> None:
    task = run.start()
    await bus.called("GetAll")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bus._callbacks == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
