"""Following one job to its end, through Ctrl-C, a vanishing daemon and a job that is over at once.

Not in here: what is shown (``hostimagectl.progress``) and what the end means for a command.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.job import Job, JobError, job_id
from hostimagectl.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from hostimagectl.progress import Display
    from hostimagectl.service import Service

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: A job in one of these after it was cancelled was only left: somebody else asked for it as well.
_UNDISTURBED: Final = (JobState.QUEUED, JobState.HELD, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited, in seconds.

    ``restart``: for a daemon that vanished; systemd restarts it within seconds, a slow host takes its time.
    ``announcement``: for a restarted daemon to tell what became of the job. ``removal``: for ``JobRemoved``
    after the job's own properties said that it ended; it comes last, when the daemon's lists are up to date.
    """

    restart: float = 30.0
    announcement: float = 10.0
    removal: float = 5.0


class Follower:
    """Asks for a job and follows it; used once.

    ``path`` is the job's object path once known, ``cancel_requested`` whether the user asked to cancel.
    """

    def __init__(self, service: Service, display: Display, patience: Patience | None = None) -> None:
        self.path: str | None = None
        self._service = service
        self._display = display
        self._patience = patience or Patience()
        self._wake = asyncio.Event()
        self._watch = Watch(service, self._wake.set)
        self._interrupts: list[int] = []
        self._cancel_sent = False
        self._failure: Failure | None = None
        self._owner: str | None = None
        self._deadline: float | None = None
        self._deadline_message = ""
        self._ended_since: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._asked = 0

    @property
    def cancel_requested(self) -> bool:
        """Whether the user asked to cancel."""
        return bool(self._interrupts)

    def interrupt(self, number: int) -> None:
        """The user sent signal ``number``: the first asks the daemon to cancel, the second leaves."""
        self._interrupts.append(number)
        self._wake.set()

    async def run(self, request: Callable[[], Awaitable[str]], *, may_join: bool = False) -> Job:
        """Call ``request``, which gives a job's path, and return the job when it has ended.

        ``may_join``: the request may be answered with a job that was there before, and the user is told so.
        Raises ``Failure`` if there is no job or its end cannot be known, or if it goes on for others though
        the user cancelled; ``Interrupted`` if the user left.
        """
        self._asked = time.time_ns() // 1000 if may_join else 0
        with self._signals():
            try:
                await self._watch.start()
                async with asyncio.TaskGroup() as group:
                    self._spawn(group, self._lost())
                    self._spawn(group, self._request(request))
                    job = await self._loop(group)
                    for task in self._tasks:
                        task.cancel()
            finally:
                self._watch.stop()
        if job is not None:
            return job
        if self._failure is not None:
            raise self._failure
        raise Interrupted(self._interrupts[0])

    async def _loop(self, group: asyncio.TaskGroup) -> Job | None:
        """The job at its end; None if the user left or ``_failure`` says why it is not known."""
        while self._failure is None and len(self._interrupts) < 2:
            self._wake.clear()
            if self.path is None and self._interrupts:
                self._display.note("the job will be cancelled as soon as hostimaged has accepted it")
            if self.path is not None:
                job = self._watch.job(self.path)
                if self._is_over(job):
                    return await self._ended(self.path)
                if self._interrupts and not self._cancel_sent:
                    self._cancel_sent = True
                    self._display.note(f"cancelling job {job.id}; once more leaves without waiting")
                    self._spawn(group, self._cancel(self.path))
                self._mind_owner(group, self.path)
                if job.state:
                    self._display.update(job)
            if self._failure is None:
                await self._pause()
        return None

    async def _pause(self) -> None:
        """Wait for an event, a deadline or the time to draw again."""
        now = asyncio.get_running_loop().time()
        waits = [self._display.interval] if self._display.interval is not None else []
        if self._deadline is not None:
            waits.append(max(0.0, self._deadline - now))
        if self._ended_since is not None:
            waits.append(max(0.0, self._ended_since + self._patience.removal - now))
        try:
            async with asyncio.timeout(min(waits, default=None)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _is_over(self, job: Job) -> bool:
        if self._watch.removed(job.path):
            return True
        if not job.ended:
            return False
        now = asyncio.get_running_loop().time()
        self._ended_since = self._ended_since or now
        return now >= self._ended_since + self._patience.removal

    async def _ended(self, path: str) -> Job:
        """The ended job with everything it left: signals may have been merged or missed."""
        told = self._watch.job(path)
        try:
            async with asyncio.timeout(self._patience.removal):
                self._watch.merge(path, await self._service.job_properties(path), newest=True)
        except (Failure, TimeoutError):
            return told
        job = self._watch.job(path)
        return job if job.ended else replace(job, state=told.state, error=told.error)

    async def _request(self, request: Callable[[], Awaitable[str]]) -> None:
        try:
            path = await request()
        except Failure as failure:
            self._fail(failure)
            return
        self._watch.focus(path)
        # "" is no owner: a daemon that went away right after its reply is to be noticed.
        self._owner = self._watch.owner or ""
        self.path = path
        self._wake.set()
        await self._look(path)
        job = self._watch.job(path)
        if 0 < job.created < self._asked:
            self._display.note(f"job {job.id} does this already; following it")

    async def _look(self, path: str) -> None:
        """Read the job as it is, besides what signals tell.

        A job that is not exported any more may be among the daemon's last results. One that is in neither,
        and for which no ``JobRemoved`` came, is lost; a restarted daemon is given time to announce it.
        """
        try:
            self._watch.merge(path, await self._service.job_properties(path))
        except Failure as failure:
            if failure.name != ErrorName.UNKNOWN_OBJECT:
                return  # a daemon that went away is minded by _mind_owner
            row = await self._last_result(job_id(path))
            if row is not None:
                self._watch.merge(path, _properties_of_result(row), newest=True)
            elif self._deadline is None and not self._watch.removed(path):
                self._fail(failure)
        self._wake.set()

    async def _last_result(self, number: int) -> dict[str, object] | None:
        try:
            results = (await self._service.status()).get("results")
        except Failure:
            return None
        rows = results if isinstance(results, list) else []
        return next((row for row in rows if isinstance(row, dict) and row.get("id") == number), None)

    async def _cancel(self, path: str) -> None:
        try:
            await self._service.cancel(path)
        except Failure as failure:
            if failure.name != ErrorName.UNKNOWN_OBJECT:
                self._display.note(f"it cannot be cancelled: {failure.message}; waiting for its end")
            return
        try:
            state = (await self._service.job(path)).state
        except Failure:
            return  # its end, or that of the daemon, is noticed elsewhere
        if state in _UNDISTURBED:
            self._fail(
                Failure.of_error(ErrorName.CANCELLED, f"job {job_id(path)} goes on: others wait for it too")
            )

    async def _lost(self) -> None:
        reason = await self._service.bus.closed()
        self._fail(Failure.no_bus(str(reason)))

    def _mind_owner(self, group: asyncio.TaskGroup, path: str) -> None:
        """Notice that the daemon went away or came back, and give up when it takes too long."""
        now = asyncio.get_running_loop().time()
        owner = self._watch.owner
        if owner != self._owner:
            self._owner = owner
            if owner is None:
                self._display.note("hostimaged went away; waiting for it to come back")
                self._deadline = now + self._patience.restart
                self._deadline_message = "hostimaged went away and did not come back; its job died with it"
            else:
                self._display.note("hostimaged is back; asking what became of the job")
                self._deadline = now + self._patience.announcement
                self._deadline_message = f"the restarted hostimaged knows nothing of job {job_id(path)}"
                self._spawn(group, self._look(path))
        elif self._deadline is not None and now >= self._deadline:
            self._fail(Failure.no_service(self._deadline_message))

    def _fail(self, failure: Failure) -> None:
        self._failure = self._failure or failure
        self._wake.set()

    def _spawn(self, group: asyncio.TaskGroup, work: Coroutine[object, object, None]) -> None:
        self._tasks.append(group.create_task(work))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Receive the user's signals, save those that whoever started us has switched off."""
        loop = asyncio.get_running_loop()
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in wanted:
            loop.add_signal_handler(number, self.interrupt, number)
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)


def _properties_of_result(row: dict[str, object]) -> dict[str, object]:
    """Job properties from a row of ``results`` in the status document."""
    error = row.get("error")
    name, message = "", ""
    if isinstance(error, dict):
        name, message = str(error.get("name", "")), str(error.get("message", ""))
    known = JobError(name, message) if name else None
    return {
        "Kind": row.get("kind"),
        "Target": row.get("target"),
        "State": row.get("state", row.get("result")),
        "Error": [known.name, known.message] if known else ["", ""],
    }
