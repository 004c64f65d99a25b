"""The objects of the mock: the shipped interfaces, with an answer for every member."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.mock import model
from hostimage_dbus.mock.jobs import Jobs
from hostimage_dbus.mock.scenarios import IMAGE
from hostimage_dbus.names import (
    DEPLOYMENT_INTERFACE,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    NO_OBJECT,
    ROOT_PATH,
    deployment_path,
)
from hostimage_dbus.server import Export, Handler, ObjectServer
from hostimage_dbus.transport import BusError, MethodCall, Variant

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from hostimage_dbus.mock.scenarios import Scenario
    from hostimage_dbus.transport import Connection

#: Kind of the job that a method starts.
KINDS: Final = {
    "Check": "check",
    "Upgrade": "upgrade",
    "Pull": "pull",
    "Stage": "stage",
    "Switch": "switch",
    "Rollback": "rollback",
    "Unstage": "unstage",
    "CancelRollback": "rollback",
    "CollectGarbage": "collect",
    "VerifyRepository": "verify",
    "Repair": "repair",
    "Explain": "explain",
    "SetKernelArguments": "kargs",
    "SetUnified": "unify",
    "SetPinned": "pin",
    "Delete": "delete",
    "MakeDefault": "rollback",
    "Diff": "diff",
}
_POLICIES: Final = ("none", "check", "download", "stage")


class Mock:
    """The mock service on ``connection``; ``duration`` is that of a job in seconds.

    Tasks of jobs run in ``tasks``. The interfaces are the shipped ones.
    """

    def __init__(
        self, connection: Connection, tasks: asyncio.TaskGroup, scenario: Scenario, *, duration: float
    ) -> None:
        self._server = ObjectServer(connection, ROOT_PATH, tasks, load_shipped(), lambda _: None)
        self._scenario = scenario
        self._update = scenario.update
        self._jobs = Jobs(self._server, tasks, scenario, duration, self._done)
        self._deployments: dict[str, Export] = {}
        self._manager: Export

    def start(self) -> None:
        """Export everything, play what the scenario begins with, and answer calls."""
        interface = self._server.interfaces[MANAGER_INTERFACE]
        own: dict[str, Handler] = {
            "GetStatus": self._get_status,
            "GetDeployment": self._get_deployment,
            "ListImages": lambda _: [model.images(self._update)],
            "ListJobs": lambda _: [self._jobs.rows()],
            "SetUpdatePolicy": self._set_update_policy,
            "HoldUpdates": self._hold_updates,
            "Reload": self._reload,
        }
        methods = {name: own.get(name, self._start_job) for name in interface.methods}
        known = model.manager(self._update)
        self._manager = Export(interface, model.values(interface, known), methods)
        self._server.export(ROOT_PATH, self._manager)
        for number in (model.BOOTED, model.PREVIOUS):
            self._deploy(number)
        if self._update == "staged":
            self._deploy(model.UPDATE)
        self._export_log_control()
        if self._scenario.failed:
            self._jobs.remember_failure(known["TrackedImage"])
        if self._scenario.pulling is not None:
            self._jobs.add("pull", known["TrackedImage"], {"uid": Variant("u", 0)}, background=True)
        self._server.start()

    def _export_log_control(self) -> None:
        interface = self._server.interfaces[LOG_CONTROL_INTERFACE]

        async def set_property(call: MethodCall, value: Any) -> None:
            self._server.change(call.path, LOG_CONTROL_INTERFACE, {call.body[1]: value})

        known = {"LogLevel": "info", "LogTarget": "console", "SyslogIdentifier": "hostimaged"}
        setters = {name: set_property for name, member in interface.properties.items() if member.writable}
        export = Export(interface, model.values(interface, known), {}, setters)
        self._server.export(LOG_CONTROL_PATH, export)

    def _deploy(self, number: str) -> None:
        interface = self._server.interfaces[DEPLOYMENT_INTERFACE]
        properties = model.values(interface, model.deployment(number))
        export = Export(interface, properties, dict.fromkeys(interface.methods, self._start_job))
        self._deployments[number] = export
        self._server.export(deployment_path(number), export)

    def _remove_deployment(self, number: str) -> None:
        if self._deployments.pop(number, None) is not None:
            self._server.unexport(deployment_path(number))

    # methods

    def _get_status(self, call: MethodCall) -> Sequence[Any]:
        if call.body[0] != "native":
            raise BusError(ErrorName.NOT_SUPPORTED, "the mock has the native status document only")
        text = model.document(
            _plain(self._manager),
            [_plain(export) for export in self._deployments.values()],
            model.images(self._update),
            self._jobs.unfinished,
            self._jobs.ended,
        )
        return [text]

    def _get_deployment(self, call: MethodCall) -> Sequence[Any]:
        name: str = call.body[0]
        alias = {"booted": "Booted", "staged": "Staged", "rollback": "IsRollback"}.get(name)
        found = [
            number
            for number, export in self._deployments.items()
            if (export.values[alias].value if alias else name and number.startswith(name))
        ]
        if len(found) != 1:
            raise BusError(ErrorName.NO_SUCH_DEPLOYMENT, f"there is no deployment {name[:64]!a}")
        return [deployment_path(found[0])]

    def _set_update_policy(self, call: MethodCall) -> Sequence[Any]:
        self._authorize(call)
        if call.body[0] not in _POLICIES:
            raise BusError(ErrorName.INVALID_ARGS, f"a policy is one of {', '.join(_POLICIES)}")
        self._change(UpdatePolicy=call.body[0])
        return []

    def _hold_updates(self, call: MethodCall) -> Sequence[Any]:
        self._authorize(call)
        self._change(Holds=["manual"] if call.body[0] > model.now() else [])
        return []

    def _reload(self, call: MethodCall) -> Sequence[Any]:
        self._authorize(call)
        return []

    def _start_job(self, call: MethodCall) -> Sequence[Any]:
        """Any method that starts a job: its last argument are options, its answer is the job."""
        self._authorize(call)
        first = call.body[0]
        target = first if isinstance(first, str) else ""
        number = _number_at(call.path)
        if call.path != ROOT_PATH:
            target = number
        elif call.member in ("Check", "Pull", "Upgrade"):
            target = target or IMAGE
        if call.member == "SetPinned":
            self._server.change(call.path, DEPLOYMENT_INTERFACE, {"Pinned": first})
        return [self._jobs.start(call, KINDS[call.member], target, call.body[-1])]

    def _authorize(self, call: MethodCall) -> None:
        if self._scenario.denied:
            if call.interactive:
                raise BusError(ErrorName.ACCESS_DENIED, "the password was wrong")
            raise BusError(ErrorName.AUTHORIZATION_REQUIRED, "somebody has to be asked")

    # what jobs achieve

    def _done(self, kind: str, target: str) -> Mapping[str, Variant]:
        """A job has succeeded: change the host as it would; gives its Result."""
        if kind == "check":
            self._change(LastCheck=[model.now(), "", ""])
            return model.pulled() | {"state": Variant("s", self._update or "downloaded")}
        if kind == "pull" and self._update == "available":
            self._progress("downloaded")
        elif kind in ("upgrade", "switch", "stage") and self._update != "staged":
            self._progress("staged")
        elif kind == "unstage" and self._update == "staged":
            self._progress("downloaded")
        elif kind == "delete":
            number = next((full for full in self._deployments if full.startswith(target)), "")
            self._remove_deployment(number)
        return model.pulled() if kind in ("pull", "upgrade", "switch") else {}

    def _progress(self, state: str) -> None:
        """The update has come to ``state``."""
        self._update = state
        if state == "staged":
            self._deploy(model.UPDATE)
        else:
            self._remove_deployment(model.UPDATE)
        staged = state == "staged"
        self._change(
            Update=model.update(state),
            Staged=deployment_path(model.UPDATE) if staged else NO_OBJECT,
            RebootRequired=staged,
        )

    def _change(self, **changes: Any) -> None:
        self._server.change(ROOT_PATH, MANAGER_INTERFACE, changes)


def _plain(export: Export) -> dict[str, Any]:
    return {name: variant.value for name, variant in export.values.items()}


def _number_at(path: str) -> str:
    """The beginning of the id of the deployment at ``path``."""
    return path.rpartition("_")[2]
