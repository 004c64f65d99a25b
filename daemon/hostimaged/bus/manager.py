"""The Manager object on the bus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hostimage_dbus.names import MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.server import Export, Handler, ObjectServer
from hostimaged.bus.authorization import Member
from hostimaged.bus.options import check_string, parse_options
from hostimaged.errors import InvalidArgs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from hostimage_dbus.transport import Encoded, MethodCall
    from hostimaged.bus.deployments import DeploymentObjects
    from hostimaged.bus.model import Model
    from hostimaged.bus.status import StatusCache
    from hostimaged.jobs.history import JobRecord
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.queue import JobQueue

Answer: TypeAlias = "Sequence[Any] | Encoded | Coroutine[Any, Any, Sequence[Any] | Encoded]"

#: Methods that everybody may call are answered here, all others behind the gate.
_OPEN: Final = (Member.GET_STATUS, Member.GET_DEPLOYMENT, Member.LIST_IMAGES, Member.LIST_JOBS)
_MAX_NAME: Final = 128


class Manager:
    """Answers the Manager's calls and keeps its properties true; ``guarded`` answers what is not open."""

    def __init__(
        self,
        server: ObjectServer,
        model: Model,
        queue: JobQueue,
        status: StatusCache,
        deployments: DeploymentObjects,
        guarded: Callable[[Member, MethodCall], Awaitable[Sequence[Any]]],
    ) -> None:
        self._server = server
        self._model = model
        self._queue = queue
        self._status = status
        self._deployments = deployments
        self._guarded = guarded

    def export(self) -> None:
        """Put the object on the bus."""
        interface = self._server.interfaces[MANAGER_INTERFACE]
        methods: dict[str, Handler] = {
            name: partial(self._answer, Member(name)) for name in interface.methods if name not in _OPEN
        }
        methods |= {
            "GetStatus": self._get_status,
            "GetDeployment": self._get_deployment,
            "ListImages": self._list_images,
            "ListJobs": self._list_jobs,
        }
        values = self._model.constant() | self._model.changing()
        self._server.export(ROOT_PATH, Export(interface, values, methods))

    def refresh(self) -> None:
        """Announce what changed, in one signal."""
        self._model.changed()
        self._server.change(ROOT_PATH, MANAGER_INTERFACE, self._model.changing())

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

    async def _answer(self, member: Member, call: MethodCall) -> Sequence[Any]:
        return await self._guarded(member, call)

    def _get_status(self, call: MethodCall) -> Answer:
        form, options = call.body
        parse_options(Member.GET_STATUS, options)
        answers = {"native": self._model.answer, "bootc-v1": lambda: self._status.bootc_document}
        if form not in answers:
            raise InvalidArgs(f"there is no status format {form[:32]!a}")
        return self._once_known(answers[form])

    def _get_deployment(self, call: MethodCall) -> Answer:
        name, options = call.body
        parse_options(Member.GET_DEPLOYMENT, options)
        check_string("the id", name, _MAX_NAME)
        return self._once_known(lambda: [self._deployments.find(name)])

    def _list_images(self, call: MethodCall) -> Answer:
        parse_options(Member.LIST_IMAGES, call.body[0])
        return self._once_known(lambda: self._status.image_list)

    def _once_known(self, answer: Callable[[], Sequence[Any] | Encoded]) -> Answer:
        """At once, but for calls that come before the first scan is back: one of them started the daemon."""
        return answer() if self._status.is_known else self._later(answer)

    async def _later(self, answer: Callable[[], Sequence[Any] | Encoded]) -> Sequence[Any] | Encoded:
        await self._status.known()
        return answer()

    def _list_jobs(self, _call: MethodCall) -> Sequence[Any]:
        return [[[job.id, job.kind, str(job.state), job.path] for job in self._queue.jobs]]
