"""The service: everything behind the bus name, put together."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import ROOT_PATH, JobState, job_path
from hostimage_dbus.server import ObjectServer
from hostimage_dbus.transport import BusError
from hostimaged.bus.callers import Callers
from hostimaged.bus.deployments import DeploymentObjects
from hostimaged.bus.diffs import DiffCache
from hostimaged.bus.gate import Gate
from hostimaged.bus.guarded import GuardedMethods, rules_of
from hostimaged.bus.jobs import LINGER, JobObjects
from hostimaged.bus.logcontrol import LogControl
from hostimaged.bus.manager import Manager
from hostimaged.bus.model import Model
from hostimaged.bus.polkit import Authority
from hostimaged.bus.rescans import Rescans
from hostimaged.bus.status import StatusCache
from hostimaged.errors import HostimageError
from hostimaged.jobs.conditions import CONDITIONS, Watch
from hostimaged.jobs.history import JobRecord
from hostimaged.jobs.inhibitors import Inhibitors
from hostimaged.jobs.job import Apply, Initiator, Terms
from hostimaged.jobs.logind import Logind
from hostimaged.jobs.operations import PREPARED, SOFT_REBOOT, Collect, Recover
from hostimaged.jobs.process import Worker, WorkerSettings
from hostimaged.jobs.queue import JobQueue
from hostimaged.jobs.units import FinalizerWatch, Subscription, TimerWatch
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hostimage_dbus.introspection import Interface
    from hostimage_dbus.transport import Connection, MethodCall
    from hostimaged.bus.authorization import Member
    from hostimaged.bus.bootfailure import BootFailure
    from hostimaged.bus.holds import Holds
    from hostimaged.bus.policy import Policy
    from hostimaged.bus.sizes import Sizes
    from hostimaged.bus.updates import Updates
    from hostimaged.bus.verified import Verified
    from hostimaged.config import Settings, SettingsProblem
    from hostimaged.jobs.history import History
    from hostimaged.jobs.job import Failure, Job
    from hostimaged.jobs.operations import Operation
    from hostimaged.system.notify import Notifier
    from hostimaged.system.paths import HostPaths

#: What came of jobs after which garbage is collected: what was staged before, deleted or interrupted is gone.
_GARBAGE: Final = ("staged", "unstaged", "deleted", "recovered")
_OWN: Final = Initiator(os.geteuid(), "hostimaged")

_logger = get_logger("hostimaged.bus")


class Service:
    """Serves ``connection`` until ``stop``; its tasks belong to ``tasks``, those of calls to ``calls``.

    After ``stop`` the tasks of ``calls`` are to be cancelled: some may wait for a dialog that stays open.
    ``history``, ``holds``, ``updates``, ``sizes``, ``policy`` and ``verified`` are loaded. ``load_settings``
    reads the settings again, and may block. ``linger``: seconds a job that ended stays readable. ``notifier``
    is told what the service does. ``boot_failure``: what was wrong with this boot.
    """

    def __init__(
        self,
        connection: Connection,
        tasks: asyncio.TaskGroup,
        calls: asyncio.TaskGroup,
        *,
        interfaces: Mapping[str, Interface],
        paths: HostPaths,
        settings: Settings,
        settings_problems: Sequence[SettingsProblem],
        load_settings: Callable[[], tuple[Settings, list[SettingsProblem]]],
        history: History,
        holds: Holds,
        updates: Updates,
        policy: Policy,
        boot_failure: BootFailure | None,
        sizes: Sizes,
        verified: Verified,
        boot_id: str,
        workers: WorkerSettings,
        notifier: Notifier,
        linger: float = LINGER,
    ) -> None:
        self._connection = connection
        self._tasks = tasks
        self._notifier = notifier
        self._workers = workers
        self._paths = paths
        self._history = history
        self._holds = holds
        self._updates = updates
        self._policy = policy
        self._verified = verified
        self._load_settings = load_settings
        self._reloading = asyncio.Lock()
        self._server = ObjectServer(connection, ROOT_PATH, calls, interfaces, translate)
        authority = Authority(connection, calls, own_uid=os.geteuid())
        callers = Callers(connection, calls)
        self._logind = Logind(connection)
        gate = Gate(callers, authority, self._logind, paths)
        self._inhibitors = Inhibitors(self._logind.inhibit, tasks)
        self._diffs = DiffCache()
        self._status = StatusCache(self._worker, self._changed, sizes)
        self._queue = JobQueue(history, self, self._status, self._worker)
        self._rescans = Rescans(paths, self._status, lambda: self._queue.changing, self._unwatched)
        self._deployments = DeploymentObjects(self._server, self._guarded)
        self._model = Model(
            queue=self._queue,
            status=self._status,
            history=history,
            holds=holds,
            updates=updates,
            policy=policy,
            boot_failure=boot_failure,
            verified=verified,
            deployments=self._deployments,
            boot_id=boot_id,
            settings=settings,
            settings_problems=settings_problems,
        )
        self._methods = GuardedMethods(
            gate,
            callers,
            self._model,
            self._queue,
            holds,
            reload=self._reload,
            set_policy=self._set_policy,
            known=self._status.known,
        )
        self._jobs = JobObjects(self._server, gate, linger=linger)
        self._log_control = LogControl(self._server, gate, settings.log_level)
        self._manager = Manager(
            self._server, self._model, self._queue, self._status, self._deployments, self._guarded
        )
        holds.changed = self._hold_changed

    def start(self) -> None:
        """Answer calls, tell the fate of jobs that an earlier daemon left, and watch the host."""
        self._manager.export()
        self._log_control.export()
        self._server.start()
        for record in self._history.orphans:
            _logger.warning("job.orphaned", id=record.id, kind=record.kind)
            self._jobs.add_ended(record)
            self._manager.job_removed(record, job_path(record.id))
        self._queue.hold(self._holds.reasons)
        self._holds.start()
        self._watches = [
            self._tasks.create_task(Watch(self._connection, condition, self._holds.set_condition).run())
            for condition in CONDITIONS
        ]
        subscription = Subscription(self._connection)
        self._watches += [
            self._tasks.create_task(watch.run())
            for watch in (
                TimerWatch(self._connection, subscription, self._timer_set),
                FinalizerWatch(self._connection, subscription, self._finalizer_missing),
            )
        ]
        self._tasks.create_task(self._queue.save())
        self._lanes = self._tasks.create_task(self._queue.run())
        self._scans = self._tasks.create_task(self._rescans.run())
        self._recovery = self._tasks.create_task(self._recover())

    async def _recover(self) -> None:
        """Have what was interrupted finished or taken back, before anybody else starts a job.

        What another program left is known from the first scan.
        """
        operation = Recover(lock_timeout=self._model.settings.lock_timeout)
        interrupted = await asyncio.to_thread(_is_interrupted, self._paths)
        if not interrupted:
            await self._status.known()
            interrupted = self._status.findings.unsettled
        if interrupted:
            with suppress(HostimageError):
                await self._queue.submit(operation, _OWN)
        if await asyncio.to_thread(os.path.exists, self._paths.collection_due):
            await self._collect()

    async def _collect(self) -> None:
        """Have garbage collected when nobody wants anything else; neither network nor battery matter."""
        settings = self._model.settings
        operation = Collect(lock_timeout=settings.lock_timeout, **rules_of(settings))
        terms = Terms(background=True, allow_metered=True, allow_on_battery=True)
        with suppress(HostimageError):
            await self._queue.submit(operation, _OWN, terms)

    async def stop(self) -> None:
        """Cancel all jobs, and wait until their ends are announced."""
        for task in (self._scans, self._recovery, *self._watches):
            task.cancel()
        self._holds.close()
        await self._queue.stop()
        await self._lanes
        self._jobs.close()
        self._inhibitors.close()

    def _worker(self, operation: Operation) -> Worker:
        known = self._diffs.find(operation, self._status.findings.deployments)
        return Worker(self._workers, operation, known)

    async def _guarded(self, member: Member, call: MethodCall, deployment: str = "") -> Sequence[Any]:
        return await self._methods.answer(member, call, deployment)

    async def _reload(self) -> None:
        async with self._reloading:
            self._notifier.reloading()
            settings, problems = await asyncio.to_thread(self._load_settings)
            self._model.take_settings(settings, problems)
            self._log_control.set(settings.log_level)
            self._manager.refresh()
            self._notifier.ready("settings were read again")

    async def _set_policy(self, policy: str) -> None:
        # Whoever asked may leave meanwhile: then it is done all the same, and what is told stays true.
        failure = await asyncio.shield(self._tasks.create_task(self._choose(policy)))
        if failure is not None:
            raise BusError(failure.name, failure.message)

    async def _choose(self, policy: str) -> Failure | None:
        failure = await self._policy.choose(policy, self._worker)
        self._manager.refresh()
        return failure

    def _hold_changed(self) -> None:
        self._queue.hold(self._holds.reasons)
        self._manager.refresh()

    def _changed(self) -> None:
        self._deployments.update(self._status.findings.deployments)
        self._manager.refresh()

    def _timer_set(self, due: int) -> None:
        self._model.set_timer(due)
        self._manager.refresh()

    def _finalizer_missing(self, missing: bool) -> None:
        self._model.set_finalizer_missing(missing)
        self._manager.refresh()

    def _unwatched(self, why: str) -> None:
        self._model.set_unwatched(why)
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
            self._model.changed()
        else:
            self._inhibitors.follow(job)
            self._manager.refresh()
            self._notifier.status(f"{job.kind} {job.target}: {job.state}")

    def job_finished(self, job: Job) -> None:
        """Announce the end of a job: Manager, job, and last JobRemoved, so that who waits finds all done.

        By then nothing of it keeps the machine awake: who waits may want to restart it.
        """
        self._rescans.job_ended()
        self._inhibitors.release(job)
        self._diffs.take(job, self._status.findings.deployments)
        if self._updates.job_ended(job, self._model.tracked):
            self._tasks.create_task(self._updates.save())
        if self._verified.job_ended(job):
            self._model.changed()
            self._tasks.create_task(self._verified.save())
        self._manager.refresh()
        self._jobs.change(job)
        self._manager.job_removed(JobRecord.of(job), job.path)
        self._jobs.ended(job)
        if self._queue.active is None:
            self._notifier.status("idle")
        if job.state is JobState.DONE and not self._apply(job) and _leaves_garbage(job):
            self._tasks.create_task(self._collect())

    def _apply(self, job: Job) -> bool:
        """Restart after a job that is done, if that is to be; tells whether it is."""
        if job.terms.apply is Apply.REBOOT and self._model.reboot_required:
            self._tasks.create_task(self._logind.reboot())
        elif job.terms.apply is Apply.SOFT_REBOOT and job.result.get(SOFT_REBOOT) == PREPARED:
            self._tasks.create_task(self._logind.soft_reboot())
        else:
            return False
        return True


def _is_interrupted(paths: HostPaths) -> bool:
    """Whether there is something to recover: an operation, or the upgrade of a repository of old."""
    # What a repository is made of is known to workers alone: to import it would delay every start.
    old = (paths.repository / "objects").exists() and not (paths.repository / "meta.json").exists()
    return old or paths.transaction.exists()


def _leaves_garbage(job: Job) -> bool:
    """Whether a deployment may have gone with the job, so that what it needed is garbage now."""
    return job.state is JobState.DONE and job.result.get("result") in _GARBAGE


def translate(error: Exception) -> BusError | None:
    """The error for a caller; None for one that is not ours."""
    return BusError(error.name, error.message) if isinstance(error, HostimageError) else None
