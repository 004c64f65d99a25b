"""Jobs of the mock: one after the other, each in steps, as the interface promises them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.mock.model import DOWNLOAD_SIZE, TOTAL_SIZE, now, values
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, NO_OBJECT, ROOT_PATH, JobState, job_path
from hostimage_dbus.server import Export, ObjectServer
from hostimage_dbus.transport import BusError, MethodCall, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hostimage_dbus.mock.scenarios import Scenario

#: Seconds a job that ended stays readable.
LINGER: Final = 60.0
#: Steps of a job, so many that a bar moves smoothly at five signals a second and ten seconds.
_STEPS: Final = 50
#: Kinds of jobs that transfer something.
_TRANSFERS: Final = frozenset({"pull", "upgrade", "switch", "repair"})
#: Property State of the Manager while a job of this kind runs; "finalizing" for all others.
_STATES: Final = {
    "check": "checking",
    "pull": "pulling",
    "upgrade": "pulling",
    "switch": "pulling",
    "stage": "staging",
    "kargs": "staging",
    "collect": "collecting",
    "verify": "verifying",
}
_PHASES: Final = {"check": "resolving", "collect": "deleting", "delete": "deleting", "verify": "verifying"}


class Jobs:
    """The jobs. ``duration`` is that of one in seconds.

    ``done`` is told the kind and target of one that succeeded, and gives its Result.
    """

    def __init__(
        self,
        server: ObjectServer,
        tasks: asyncio.TaskGroup,
        scenario: Scenario,
        duration: float,
        done: Callable[[str, str], Mapping[str, Variant]],
    ) -> None:
        self._server = server
        self._tasks = tasks
        self._scenario = scenario
        self._duration = duration
        self._done = done
        self._next = 1
        self._waiting: list[str] = []
        self._active: str | None = None
        self._running: asyncio.Task[None] | None = None
        self._exports: dict[str, Export] = {}
        self.ended: list[dict[str, Any]] = []

    @property
    def unfinished(self) -> list[dict[str, Any]]:
        """Properties of the jobs that run or wait, in the order in which they run."""
        paths = ([self._active] if self._active else []) + self._waiting
        return [self._plain(path) for path in paths]

    def rows(self) -> list[list[Any]]:
        """What ListJobs returns."""
        return [[job["Id"], job["Kind"], job["State"], job_path(job["Id"])] for job in self.unfinished]

    def remember_failure(self, target: str) -> None:
        """A job ended ten minutes ago, before the mock was started, as the scenario lets all end."""
        failing = self._scenario.failing
        assert failing is not None
        past = now() - 600_000_000
        known = {
            "Id": self._next,
            "Kind": "pull",
            "Target": target,
            "State": str(JobState.FAILED),
            "Created": past,
            "Started": past,
            "Finished": past + 5_000_000,
            "Error": [str(failing.name), failing.message],
        }
        self._next += 1
        self.ended.append(values(self._server.interfaces[JOB_INTERFACE], known))
        self._tell_manager()

    def start(self, call: MethodCall, kind: str, target: str, options: Mapping[str, Variant]) -> str:
        """Add a job for ``call``, or find an equal one; gives its path. Raises ``BusError`` (Busy)."""
        given = {key: option.value for key, option in options.items()}
        if not given.get("no-join"):
            for job in self.unfinished:
                if (job["Kind"], job["Target"]) == (kind, target) and job["State"] != JobState.CANCELLING:
                    return job_path(job["Id"])
        if self._active and given.get("queue") is False:
            raise BusError(ErrorName.BUSY, "another job runs")
        initiator = {"uid": Variant("u", 0), "unit": Variant("s", call.sender)}
        if "client-id" in given:
            initiator["client-id"] = Variant("s", given["client-id"])
        return self.add(kind, target, initiator, background=bool(given.get("background")))

    def add(
        self, kind: str, target: str, initiator: Mapping[str, Variant], *, background: bool = False
    ) -> str:
        """Add a job; it runs when those before it have ended."""
        number = self._next
        self._next += 1
        path = job_path(number)
        interface = self._server.interfaces[JOB_INTERFACE]
        known = {
            "Id": number,
            "Kind": kind,
            "Target": target,
            "Background": background,
            "Initiator": dict(initiator),
            "Created": now(),
            "State": str(JobState.QUEUED),
            "Progress": -1.0,
            "Cancellable": True,
        }
        self._exports[path] = Export(interface, values(interface, known), {"Cancel": self._cancel})
        self._server.export(path, self._exports[path])
        self._server.emit(ROOT_PATH, MANAGER_INTERFACE, "JobNew", number, path, kind)
        self._waiting.append(path)
        self._begin()
        return path

    def _begin(self) -> None:
        """Run the next job, if none runs."""
        if self._active is None and self._waiting:
            self._active = self._waiting.pop(0)
            self._running = self._tasks.create_task(self._run(self._active))
        self._tell_manager()

    async def _run(self, path: str) -> None:
        job = self._plain(path)
        total, transfers = DOWNLOAD_SIZE, job["Kind"] in _TRANSFERS
        phase = _PHASES.get(job["Kind"], "pulling" if transfers else "finalizing")
        self._change(path, State=str(JobState.RUNNING), Phase=phase, Started=now(), Progress=0.0)
        if transfers:
            self._change(path, BytesTotal=TOTAL_SIZE, BytesCached=TOTAL_SIZE - total)
        failing = self._scenario.failing
        stop = failing.progress if failing else self._scenario.pulling if transfers else None
        try:
            for step in range(1, _STEPS + 1):
                progress = step / _STEPS
                changes: dict[str, Any] = {"Progress": progress}
                if transfers:
                    changes["BytesDone"] = int(total * progress)
                    changes["Rate"] = int(total / self._duration)
                    changes["Eta"] = int(self._duration * (1 - progress) * 1_000_000)
                self._change(path, **changes)
                if stop is not None and progress >= stop:
                    break
                # One that stands still somewhere is there from the start.
                await asyncio.sleep(self._duration / _STEPS if stop is None or failing else 0)
            if failing:
                self._end(path, JobState.FAILED, failing.name, failing.message)
                return
            if stop is not None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            if self._plain(path)["State"] != JobState.CANCELLING:
                raise  # the mock ends
            self._end(path, JobState.CANCELLED, ErrorName.CANCELLED, "the job was cancelled")
            return
        self._end(path, JobState.DONE)

    def _end(self, path: str, state: JobState, name: str = "", message: str = "") -> None:
        job = self._plain(path)
        if path in self._waiting:
            self._waiting.remove(path)
        if path == self._active:
            self._active = self._running = None
        # Deployments and the Manager first, JobRemoved last: who waits for it finds everything in place.
        result = dict(self._done(job["Kind"], job["Target"])) if state is JobState.DONE else {}
        ending = {
            "State": str(state),
            "Finished": now(),
            "Cancellable": False,
            "Error": [str(name), message],
            "Result": result,
            "Rate": 0,
            "Eta": 0,
        }
        self.ended.append(self._plain(path) | ending)
        self._begin()
        self._server.change(path, JOB_INTERFACE, ending)
        self._server.emit(
            ROOT_PATH,
            MANAGER_INTERFACE,
            "JobRemoved",
            job["Id"],
            path,
            job["Kind"],
            str(state),
            str(name),
            message,
        )
        asyncio.get_running_loop().call_later(LINGER, self._forget, path)

    def _forget(self, path: str) -> None:
        del self._exports[path]
        self._server.unexport(path)

    def _cancel(self, call: MethodCall) -> Sequence[Any]:
        job = self._plain(call.path)
        if JobState(job["State"]).finished:
            raise BusError(ErrorName.JOB_NOT_CANCELLABLE, f"job {job['Id']} is {job['State']}")
        if job["State"] != JobState.CANCELLING:
            self._change(call.path, State=str(JobState.CANCELLING))
            if call.path == self._active:
                assert self._running is not None
                self._running.cancel()
            else:
                self._end(call.path, JobState.CANCELLED, ErrorName.CANCELLED, "the job was cancelled")
        return []

    def _tell_manager(self) -> None:
        active = self._active
        failed = [job for job in self.ended if job["State"] == JobState.FAILED]
        kind = self._plain(active)["Kind"] if active else ""
        self._server.change(
            ROOT_PATH,
            MANAGER_INTERFACE,
            {
                "State": _STATES.get(kind, "finalizing") if active else "idle",
                "ActiveJob": active or NO_OBJECT,
                "QueuedJobs": list(self._waiting),
                "LastFailure": _failure(failed[-1]) if failed else {},
            },
        )

    def _change(self, path: str, **changes: Any) -> None:
        self._server.change(path, JOB_INTERFACE, changes)

    def _plain(self, path: str) -> dict[str, Any]:
        return {name: variant.value for name, variant in self._exports[path].values.items()}


def _failure(job: Mapping[str, Any]) -> dict[str, Variant]:
    name, message = job["Error"]
    return {
        "job": Variant("t", job["Id"]),
        "kind": Variant("s", job["Kind"]),
        "target": Variant("s", job["Target"]),
        "error": Variant("s", name),
        "message": Variant("s", message),
        "time": Variant("t", job["Finished"]),
    }
