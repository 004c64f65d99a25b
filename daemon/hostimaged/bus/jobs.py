"""Job objects on the bus."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import JOB_INTERFACE, JobState, job_path
from hostimage_dbus.server import Export, ObjectServer
from hostimage_dbus.transport import Variant
from hostimaged.bus.authorization import Member
from hostimaged.bus.options import parse_options
from hostimaged.bus.requests import Request
from hostimaged.bus.status import to_variants
from hostimaged.errors import JobNotCancellable
from hostimaged.jobs.history import JobRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.gate import Gate
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.queue import JobQueue

#: Seconds a job that ended stays readable.
LINGER: Final = 60.0


class JobObjects:
    """Exports jobs while they wait and run, and for ``linger`` seconds after."""

    def __init__(self, server: ObjectServer, gate: Gate, *, linger: float = LINGER) -> None:
        self._server = server
        self._gate = gate
        self._linger = linger
        self._interface = server.interfaces[JOB_INTERFACE]
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    def add(self, job: Job, queue: JobQueue) -> None:
        """Export a new job."""

        def prepare(call: MethodCall) -> Request:
            options = parse_options(Member.CANCEL, call.body[0])
            if not job.cancellable:
                raise JobNotCancellable(f"job {job.id} is {job.state}")
            return Request(
                Member.CANCEL,
                options,
                reference=getattr(job.operation, "reference", ""),
                deployment=getattr(job.operation, "deployment", None) or "",
                arguments=(job.id,),
            )

        async def cancel(call: MethodCall) -> Sequence[Any]:
            async with self._gate.passed(
                call,
                partial(prepare, call),
                lambda caller: job.asked_by(caller.uid) or job.state is JobState.CANCELLING,
            ) as (caller, _):
                if job.asked_by(caller.uid):
                    await queue.withdraw(job, caller.uid, caller.name)
                else:
                    await queue.cancel(job)
            return []

        constant = _constant(JobRecord.of(job), background=job.background)
        export = Export(self._interface, constant | _changing(job), {"Cancel": cancel})
        self._server.export(job.path, export)

    def add_ended(self, record: JobRecord) -> None:
        """Export a job that an earlier daemon left behind, as it ended."""

        def cancel(call: MethodCall) -> Sequence[Any]:
            parse_options(Member.CANCEL, call.body[0])
            raise JobNotCancellable(f"job {record.id} is {record.state}")

        constant = _constant(record, background=False)
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
    "HoldReasons": [],
    "Started": 0,
    "Finished": 0,
    "Error": ["", ""],
    "Result": {},
}


def _constant(record: JobRecord, *, background: bool) -> dict[str, Any]:
    initiator = {"uid": Variant("u", record.uid)}
    for key, text in (("unit", record.unit), ("client-id", record.client_id)):
        if text:
            initiator[key] = Variant("s", text)
    return {
        "Id": record.id,
        "Kind": record.kind,
        "Background": background,
        "Initiator": initiator,
        "Target": record.target,
        "Created": record.created,
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
        "HoldReasons": list(job.hold_reasons),
        "Started": job.started,
        "Finished": job.finished,
        "Error": [str(failure.name), failure.message] if failure else ["", ""],
        "Result": to_variants(job.result),
    }
