"""The service: everything behind the bus name, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from hostimage_dbus.names import ROOT_PATH, job_path
from hostimage_dbus.server import ObjectServer
from hostimage_dbus.transport import BusError
from hostimaged.bus.callers import Callers
from hostimaged.bus.jobs import LINGER, JobObjects
from hostimaged.bus.manager import Manager
from hostimaged.bus.status import Problem, StatusCache
from hostimaged.errors import HostimageError, InvalidReference
from hostimaged.jobs.history import JobRecord
from hostimaged.jobs.process import Worker, WorkerSettings
from hostimaged.jobs.queue import JobQueue
from hostimaged.oci.reference import ImageReference

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

    from hostimage_dbus.introspection import Interface
    from hostimage_dbus.transport import Connection
    from hostimaged.config import Settings, SettingsProblem
    from hostimaged.jobs.history import History
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.operations import Operation

_logger = structlog.get_logger("hostimaged.bus")


class Service:
    """Serves ``connection`` until ``stop``; all its tasks belong to ``tasks``.

    ``history`` is loaded already. ``linger``: seconds a job that ended stays readable. ``tell`` gets a line
    for people about what the service does.
    """

    def __init__(
        self,
        connection: Connection,
        tasks: asyncio.TaskGroup,
        *,
        interfaces: Mapping[str, Interface],
        settings: Settings,
        settings_problems: Sequence[SettingsProblem],
        history: History,
        boot_id: str,
        workers: WorkerSettings,
        linger: float = LINGER,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._tasks = tasks
        self._tell = tell
        self._workers = workers
        self._history = history
        self._problems = list(_problems(settings, settings_problems, history))
        self._server = ObjectServer(connection, ROOT_PATH, tasks, interfaces, translate)
        callers = Callers(connection)
        self._status = StatusCache(self._worker, self._status_changed)
        self._queue = JobQueue(history, self, self._status, self._worker)
        self._jobs = JobObjects(self._server, callers, linger=linger)
        self._manager = Manager(
            self._server,
            callers,
            self._queue,
            self._status,
            history,
            settings,
            boot_id,
            lambda: self._problems,
        )

    def start(self) -> None:
        """Answer calls, tell the fate of jobs that an earlier daemon left, and scan the host."""
        self._manager.export()
        self._server.start()
        for record in self._history.orphans:
            _logger.warning("job.orphaned", id=record.id, kind=record.kind)
            self._jobs.add_ended(record)
            self._manager.job_removed(record, job_path(record.id))
        self._tasks.create_task(self._queue.save())
        self._lane = self._tasks.create_task(self._queue.run())
        self._scan = self._tasks.create_task(self._status.refresh())

    async def stop(self) -> None:
        """Cancel all jobs, and wait until their ends are announced."""
        self._scan.cancel()
        await self._queue.stop()
        await self._lane
        self._jobs.close()

    def _worker(self, operation: Operation) -> Worker:
        return Worker(self._workers, operation)

    def _status_changed(self) -> None:
        self._manager.refresh()

    # hostimaged.jobs.queue.Observer

    def job_added(self, job: Job) -> None:
        """Announce a new job: its object, then the signal, then the queue."""
        self._jobs.add(job, self._queue)
        self._manager.job_new(job)
        self._manager.refresh()

    def job_changed(self, job: Job, *, only_progress: bool) -> None:
        """Announce a change of a job, and of the Manager where there is one."""
        self._jobs.change(job, only_progress=only_progress)
        if only_progress:
            self._manager.forget_document()
        else:
            self._manager.refresh()
            self._tell(f"{job.kind} {job.target}: {job.state}")

    def job_finished(self, job: Job) -> None:
        """Announce the end of a job: Manager, job, and last JobRemoved, so that who waits finds all done."""
        self._manager.refresh()
        self._jobs.change(job)
        self._manager.job_removed(JobRecord.of(job), job.path)
        self._jobs.ended(job)
        if self._queue.active is None:
            self._tell("idle")


def translate(error: Exception) -> BusError | None:
    """The error for a caller; None for one that is not ours."""
    return BusError(error.name, error.message) if isinstance(error, HostimageError) else None


def _problems(settings: Settings, found: Sequence[SettingsProblem], history: History) -> list[Problem]:
    problems = [Problem(id="settings", severity="warning", text=f"{p.file}: {p.text}") for p in found]
    if settings.tracked_image:
        try:
            ImageReference.parse(settings.tracked_image)
        except InvalidReference as error:
            text = f"tracked-image: {error.message}"
            problems.append(Problem(id="settings", severity="error", text=text))
    if history.problem:
        problems.append(Problem(id="jobs", severity="warning", text=history.problem))
    return problems
