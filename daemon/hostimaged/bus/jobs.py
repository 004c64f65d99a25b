"""Job objects on the bus."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import JOB_INTERFACE, JobState, job_path
from hostimage_dbus.server import Export, ObjectServer
from hostimage_dbus.transport import Variant
from hostimaged.bus.options import parse_options
from hostimaged.bus.status import to_variants
from hostimaged.errors import JobNotCancellable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.callers import Callers
    from hostimaged.jobs.history import JobRecord
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.queue import JobQueue

#: Seconds a job that ended stays readable.
LINGER: Final = 60.0


class JobObjects:
    """Exports jobs while they wait and run, and for ``linger`` seconds after."""

    def __init__(self, server: ObjectServer, callers: Callers, *, linger: float = LINGER) -> None:
        self._server = server
        self._callers = callers
        self._linger = linger
        self._interface = server.interfaces[JOB_INTERFACE]
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    def add(self, job: Job, queue: JobQueue) -> None:
        """Export a new job."""

        async def cancel(call: MethodCall) -> Sequence[Any]:
            parse_options("Cancel", call.body[0])
            async with self._callers.privileged(call):
                await queue.cancel(job)
            return []

        constant = _constant(
            job.id, job.kind, job.target, job.created, job.initiator.uid, job.initiator.client_id
        )
        export = Export(self._interface, constant | _changing(job), {"Cancel": cancel})
        self._server.export(job.path, export)

    def add_ended(self, record: JobRecord) -> None:
        """Export a job that an earlier daemon left behind, as it ended."""

        async def cancel(call: MethodCall) -> Sequence[Any]:
            parse_options("Cancel", call.body[0])
            async with self._callers.privileged(call):
                raise JobNotCancellable(f"job {record.id} is {record.state}")

        constant = _constant(record.id, record.kind, record.target, record.created, record.uid, "")
        values = constant | _NOTHING_YET
        values |= {
            "State": str(record.state),
            "Started": record.started,
            "Finished": record.finished,
            "Error": [record.error, record.message],
            "Cancellable": False,
        }
        path = job_path(record.id)
        self._server.export(path, Export(self._interface, values, {"Cancel": cancel}))
        self._expire(path)

    def change(self, job: Job, *, only_progress: bool = False) -> None:
        """Announce what changed."""
        self._server.change(job.path, JOB_INTERFACE, _changing(job), droppable=only_progress)

    def ended(self, job: Job) -> None:
        """The job's end was announced; its object goes away later."""
        self._expire(job.path)

    def close(self) -> None:
        """Forget what was to happen later."""
        for handle in self._leaving.values():
            handle.cancel()
        self._leaving.clear()

    def _expire(self, path: str) -> None:
        def remove() -> None:
            del self._leaving[path]
            self._server.unexport(path)

        self._leaving[path] = asyncio.get_running_loop().call_later(self._linger, remove)


_NOTHING_YET: Final[dict[str, Any]] = {
    "State": str(JobState.QUEUED),
    "Phase": "",
    "Progress": -1.0,
    "BytesDone": 0,
    "BytesTotal": 0,
    "BytesCached": 0,
    "Rate": 0,
    "Eta": 0,
    "Message": "",
    "Cancellable": True,
    "Started": 0,
    "Finished": 0,
    "Error": ["", ""],
    "Result": {},
}


def _constant(number: int, kind: str, target: str, created: int, uid: int, client_id: str) -> dict[str, Any]:
    initiator = {"uid": Variant("u", uid)} | ({"client-id": Variant("s", client_id)} if client_id else {})
    return {
        "Id": number,
        "Kind": kind,
        "Background": False,
        "Initiator": initiator,
        "Target": target,
        "Created": created,
    }


def _changing(job: Job) -> dict[str, Any]:
    progress, failure = job.progress, job.failure
    return {
        "State": str(job.state),
        "Phase": str(job.phase or ""),
        "Progress": progress.fraction,
        "BytesDone": progress.done,
        "BytesTotal": progress.total,
        "BytesCached": progress.cached,
        "Rate": progress.rate,
        "Eta": progress.eta,
        "Message": job.message,
        "Cancellable": job.cancellable,
        "Started": job.started,
        "Finished": job.finished,
        "Error": [str(failure.name), failure.message] if failure else ["", ""],
        "Result": to_variants(job.result),
    }
