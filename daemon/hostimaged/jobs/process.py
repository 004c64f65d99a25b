"""The daemon's side of a worker process: start it, read its events, end it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import ErrorName
from hostimaged.errors import Cancelled, HostimageError, Internal
from hostimaged.jobs.channel import ALONE, CANCEL, PAUSE, RESUME
from hostimaged.jobs.events import MAX_EVENT, ErrorEvent, Event, InvalidEvent, ResultEvent, parse_event
from hostimaged.jobs.job import Failure
from hostimaged.jobs.operations import Operation, Order
from hostimaged.jobs.privileges import Profile
from hostimaged.log import get_logger
from hostimaged.system.paths import HostPaths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

#: How a worker is started; ``-P`` keeps the current directory out of the import path.
COMMAND: Final = (sys.executable, "-P", "-m", "hostimaged.jobs.worker")

#: Seconds a cancelled worker gets to stop by itself, then after SIGTERM; then it is killed.
COOPERATIVE: Final = 5.0
TERMINATION: Final = 2.0
#: Seconds a worker may live after its last event.
_LINGER: Final = 5.0
#: What must not be passed on: it speaks to the daemon, not to a worker.
_PRIVATE_ENVIRONMENT: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
    | {"DBUS_SYSTEM_BUS_ADDRESS", "DBUS_STARTER_ADDRESS", "DBUS_STARTER_BUS_TYPE"}
)

_logger = get_logger("hostimaged.jobs")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker ended: with a result, or a failure."""

    result: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What is the same for all workers of a daemon; times are seconds."""

    root: Path | None
    command: Sequence[str] = COMMAND
    cooperative: float = COOPERATIVE
    termination: float = TERMINATION


class Worker:
    """The worker process of an operation, and those of what it does then, one after the other.

    ``run`` once; ``cancel`` at any time, from the same loop. ``known``: what came of it before, if that is
    still true; then there is no process.
    """

    def __init__(self, settings: WorkerSettings, operation: Operation, known: Outcome | None = None) -> None:
        self._settings = settings
        self._operation = operation
        self._known = known
        self._cancelled = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._requests: list[bytes] = []

    def cancel(self) -> None:
        """Have the worker stop: by a message, then SIGTERM, then SIGKILL."""
        self._cancelled.set()

    def pause(self) -> None:
        """Have the worker give up the lock of the repository; it tells when it has."""
        self._request(PAUSE)

    def resume(self) -> None:
        """Let the worker go on."""
        self._request(RESUME)

    def grant(self) -> None:
        """Tell the worker that it has the repository alone."""
        self._request(ALONE)

    def _request(self, line: bytes) -> None:
        if self._writer is None:
            self._requests.append(line)
        elif not self._writer.is_closing():
            self._writer.write(line)

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        """Run the workers to their end; ``on_event`` gets every event. If cancelled, they are killed.

        The result has what each of them achieved.
        """
        if self._known is not None:
            return self._known
        operation: Operation | None = self._operation
        result: dict[str, Any] = {}
        while operation is not None:
            outcome = await self._run_one(operation, on_event)
            if outcome.failure is not None:
                return outcome
            result |= outcome.result
            try:
                operation = operation.then(outcome.result)
            except HostimageError as error:
                return Outcome(failure=Failure.of(error))
        return Outcome(result=result)

    async def _run_one(self, operation: Operation, on_event: Callable[[Event], None]) -> Outcome:
        if self._cancelled.is_set():
            return _cancelled()
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return _not_started(error)
        try:
            process = await self._spawn(operation, theirs)
        except OSError as error:
            ours.close()
            return _not_started(error)
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_EVENT)
        root = None if self._settings.root is None else str(self._settings.root)
        order = Order(root=root, operation=operation)
        writer.write(order.model_dump_json().encode() + b"\n" + b"".join(self._requests))
        self._requests.clear()
        self._writer = writer
        async with asyncio.TaskGroup() as group:
            escalation = group.create_task(self._escalate(process, writer))
            try:
                outcome = await _read_outcome(reader, on_event)
                if outcome is not None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LINGER):
                            await process.wait()
            finally:
                self._writer = None
                escalation.cancel()
                _kill(process, signal.SIGKILL)
                await process.wait()
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
        return self._judge(process, outcome)

    async def _spawn(self, operation: Operation, theirs: socket.socket) -> asyncio.subprocess.Process:
        arguments = (
            "--fd", str(theirs.fileno()),
            "--profile", str(operation.profile),
            "--parent", str(os.getpid()),
            *self._privileged(operation),
        )  # fmt: skip
        return await asyncio.create_subprocess_exec(
            *self._settings.command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # Its own process group: what it starts is signalled with it, a terminal's Ctrl-C is not for it.
            start_new_session=True,
            env=_environment(os.environ),
        )

    def _privileged(self, operation: Operation) -> tuple[str, ...]:
        """What a worker on a running host does before it gives up its privileges.

        The physical root is a read-only mount there; so may be where it boots from. The EFI system partition
        may not be mounted at all, which jobs on deployments see to themselves.
        """
        if self._settings.root is not None:
            return ()
        if not (operation.changes or operation.writes):
            return ("--esp",) if operation.profile is Profile.SCAN else ()
        paths = HostPaths.live()
        places = [paths.physical_root]
        if operation.profile is Profile.HOST:
            places += paths.boot_mounts
        return tuple(word for place in places for word in ("--writable", str(place)))

    async def _escalate(self, process: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
        await self._cancelled.wait()
        with suppress(OSError):
            writer.write(CANCEL)
        await asyncio.sleep(self._settings.cooperative)
        _logger.warning("worker.terminate", pid=process.pid)
        _kill(process, signal.SIGTERM)
        await asyncio.sleep(self._settings.termination)
        _logger.warning("worker.kill", pid=process.pid)
        _kill(process, signal.SIGKILL)

    def _judge(self, process: asyncio.subprocess.Process, outcome: Outcome | None) -> Outcome:
        if outcome is not None and outcome.failure is None:
            # Done before it noticed the cancellation: what is done is told as done.
            return outcome
        if self._cancelled.is_set():
            return _cancelled()
        if outcome is not None:
            return outcome
        code = process.returncode or 0
        _logger.error("worker.died", pid=process.pid, code=code)
        if code < 0:
            how = f"the worker process was killed by {_signal_name(-code)}"
        else:
            how = "the worker process ended without a result"
        return Outcome(failure=Failure(ErrorName.INTERNAL, how))


async def _read_outcome(reader: asyncio.StreamReader, on_event: Callable[[Event], None]) -> Outcome | None:
    """Read events up to the last; None if the worker ended without one."""
    try:
        while line := await reader.readline():
            event = parse_event(line)
            if isinstance(event, ResultEvent):
                return Outcome(result=event.result)
            if isinstance(event, ErrorEvent):
                return Outcome(failure=Failure(event.name, event.message))
            on_event(event)
    except (InvalidEvent, ValueError) as error:
        # ValueError: a line longer than the limit.
        _logger.warning("worker.bad-event", error=str(error))
        return Outcome(failure=Failure.of(Internal()))
    except OSError:
        # The socket of a killed worker may be reset.
        return None
    return None


def _kill(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signal the worker and what it started; the worker is not yet waited for, so its id is still its own."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _not_started(error: OSError) -> Outcome:
    _logger.warning("worker.start-failed", error=error.strerror)
    return Outcome(failure=Failure(ErrorName.INTERNAL, "the worker process could not be started"))


def _cancelled() -> Outcome:
    return Outcome(failure=Failure.of(Cancelled()))


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    passed = {key: value for key, value in environment.items() if key not in _PRIVATE_ENVIRONMENT}
    # pydantic would look through all packages of the system for plugins, and run them; it takes 30 ms.
    return passed | {"PYDANTIC_DISABLE_PLUGINS": "1"}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
