"""The Manager object on the bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import API_VERSION, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.server import Export, Handler, ObjectServer
from hostimaged import __version__
from hostimaged.bus.options import parse_options
from hostimaged.bus.status import to_variants
from hostimaged.errors import InvalidArgs
from hostimaged.ids import SourceDigest
from hostimaged.jobs.job import Initiator
from hostimaged.jobs.operations import Pull
from hostimaged.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.callers import Callers
    from hostimaged.bus.status import Problem, StatusCache
    from hostimaged.config import Settings
    from hostimaged.jobs.history import History, JobRecord
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.queue import JobQueue

#: What the daemon is doing while a job of this kind runs (property State).
_STATES: Final = {"pull": "pulling"}


class Manager:
    """Answers the Manager's calls and keeps its properties true.

    ``problems`` gives what is wrong with the daemon itself; what scans find is added.
    """

    def __init__(
        self,
        server: ObjectServer,
        callers: Callers,
        queue: JobQueue,
        status: StatusCache,
        history: History,
        settings: Settings,
        boot_id: str,
        problems: Callable[[], list[Problem]],
    ) -> None:
        self._server = server
        self._callers = callers
        self._queue = queue
        self._status = status
        self._history = history
        self._settings = settings
        self._boot_id = boot_id
        self._own_problems = problems
        self._document: str | None = None

    def export(self) -> None:
        """Put the object on the bus."""
        constant = {"Version": __version__, "ApiVersion": API_VERSION, "BootId": self._boot_id}
        methods: dict[str, Handler] = {
            "GetStatus": self._get_status,
            "ListImages": self._list_images,
            "ListJobs": self._list_jobs,
            "Pull": self._pull,
        }
        interface = self._server.interfaces[MANAGER_INTERFACE]
        self._server.export(ROOT_PATH, Export(interface, constant | self._changing(), methods))

    def refresh(self) -> None:
        """Announce what changed, in one signal."""
        self.forget_document()
        self._server.change(ROOT_PATH, MANAGER_INTERFACE, self._changing())

    def forget_document(self) -> None:
        """Something in the status document changed."""
        self._document = None

    def job_new(self, job: Job) -> None:
        """Announce a new job."""
        self._server.emit(ROOT_PATH, MANAGER_INTERFACE, "JobNew", job.id, job.path, job.kind)

    def job_removed(self, record: JobRecord, path: str) -> None:
        """Announce the end of a job."""
        failure = record.failure
        self._server.emit(
            ROOT_PATH,
            MANAGER_INTERFACE,
            "JobRemoved",
            record.id,
            path,
            record.kind,
            str(record.state),
            str(failure.name) if failure else "",
            failure.message if failure else "",
        )

    # methods

    def _get_status(self, call: MethodCall) -> Sequence[Any]:
        form, options = call.body
        parse_options("GetStatus", options)
        if form != "native":
            raise InvalidArgs(f"there is no status format {form[:32]!a}")
        if self._document is None:
            self._document = self._status.document(
                daemon={"version": __version__, "bootId": self._boot_id, "state": self._state()},
                tracked_image=self._settings.tracked_image,
                jobs=self._queue.jobs,
                results=self._history.results,
                problems=self._problems(),
            )
        return [self._document]

    def _list_images(self, call: MethodCall) -> Sequence[Any]:
        parse_options("ListImages", call.body[0])
        return [self._status.image_rows]

    def _list_jobs(self, _call: MethodCall) -> Sequence[Any]:
        return [[[job.id, job.kind, str(job.state), job.path] for job in self._queue.jobs]]

    async def _pull(self, call: MethodCall) -> Sequence[Any]:
        image, given = call.body
        options = parse_options("Pull", given)
        if not image and not self._settings.tracked_image:
            raise InvalidArgs("no image is named, and tracked-image is not set")
        reference = ImageReference.parse(image or self._settings.tracked_image)
        expected = options.get("expect-digest")
        operation = Pull(
            reference=str(reference),
            expect_digest=None if expected is None else str(SourceDigest(expected)),
            verity=self._settings.verity,
            lock_timeout=self._settings.lock_timeout,
        )
        async with self._callers.privileged(call) as uid:
            job = await self._queue.submit(
                operation,
                Initiator(uid, options.get("client-id", "")),
                queue=options.get("queue", True),
            )
        return [job.path]

    # properties

    def _state(self) -> str:
        active = self._queue.active
        return _STATES[active.kind] if active else "idle"

    def _problems(self) -> list[Problem]:
        return [*self._own_problems(), *self._status.findings.problems]

    def _changing(self) -> dict[str, Any]:
        active = self._queue.active
        repository = self._status.findings.repository
        return {
            "State": self._state(),
            "ActiveJob": active.path if active else "/",
            "QueuedJobs": [job.path for job in self._queue.waiting],
            "TrackedImage": self._settings.tracked_image,
            "LastFailure": _last_failure(self._history.results),
            "Problems": [[problem.id, problem.severity, problem.text] for problem in self._problems()],
            "RepositorySize": [repository.used if repository else 0, 0],
        }


def _last_failure(results: Sequence[JobRecord]) -> dict[str, Any]:
    """The last failure that no success of its kind followed, among the results that are remembered."""
    last: JobRecord | None = None
    for record in results:
        if record.state == "failed":
            last = record
        elif record.state == "done" and last is not None and last.kind == record.kind:
            last = None
    if last is None:
        return {}
    return to_variants(
        {
            "job": last.id,
            "kind": last.kind,
            "target": last.target,
            "error": last.error,
            "message": last.message,
            "time": last.finished,
        }
    )
