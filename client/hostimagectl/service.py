"""The daemon as the client sees it: the calls of the Manager and what a reply may be.

Every method raises ``Failure`` for an error answer, no answer, or one that breaks the interface.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    JOB_INTERFACE,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    PROPERTIES_INTERFACE,
    ROOT_PATH,
)
from hostimage_dbus.transport import BUS, BUS_PATH, BusClosed, BusError, Connection, Variant
from hostimagectl.agent import Agent
from hostimagectl.failure import Failure
from hostimagectl.job import Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

#: Name by which our jobs are told apart from those of other programs (option ``client-id``).
CLIENT_ID: Final = "hostimagectl"
_CLIENT: Final = {"client-id": Variant("s", CLIENT_ID)}
#: Seconds that a call may take during which the user may be asked for a password.
AUTHORIZATION_TIMEOUT: Final = 180.0


class Bus(Protocol):
    """What is used of ``hostimage_dbus.transport.Connection``."""

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float = ...,  # noqa: ASYNC109 - the transport's interface
        interactive: bool = False,
    ) -> list[Any]:
        """Call a method and give the body of its reply."""
        ...

    async def add_match(self, rule: str) -> None:
        """Ask the bus for signals."""
        ...

    def on_signal(self, callback: Callable[[str, str, str, list[Any], str], None]) -> Callable[[], None]:
        """Call ``callback(path, interface, member, body, sender)`` for each signal; gives its end."""
        ...

    async def closed(self) -> object:
        """Wait until the connection is lost."""
        ...


@dataclass(frozen=True, slots=True)
class JobRow:
    """A row of ``ListJobs``."""

    id: int
    kind: str
    state: str
    path: str


def plain(value: Any) -> Any:
    """``value`` with every D-Bus variant replaced by what it holds."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@asynccontextmanager
async def connect(*, ask: bool = True) -> AsyncIterator[Service]:
    """The service on the system bus (or the one that DBUS_SYSTEM_BUS_ADDRESS names).

    The daemon need not run: the bus starts it at the first call. ``ask``: whether polkit may ask somebody for
    a password; a person at a terminal is asked there, if nowhere else.
    """
    try:
        connection = await Connection.connect()
    except (BusError, OSError) as error:
        reason = error.message if isinstance(error, BusError) else error.strerror or "input/output error"
        raise Failure.no_bus(reason) from None
    agent = Agent()
    try:
        yield Service(connection, ask=ask, agent=agent if ask and agent.useful() else None)
    finally:
        await agent.stop()
        await connection.close()


class Service:
    """Calls to the daemon over an open connection.

    ``ask``: whether polkit may ask somebody; ``agent`` is then started when it wants to.
    """

    def __init__(self, bus: Bus, *, ask: bool = True, agent: Agent | None = None) -> None:
        self.bus = bus
        self._ask = ask
        self._agent = agent

    async def start_job(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        options: Mapping[str, Variant] | None = None,
        *,
        deployment: str | None = None,
    ) -> str:
        """Call a method that starts a job, and give the path of the job.

        ``signature`` and ``body`` are what comes before the method's options. The method is the Manager's, or
        that of the deployment at the path ``deployment``.
        """
        reply = await self._authorized(
            deployment or ROOT_PATH,
            DEPLOYMENT_INTERFACE if deployment else MANAGER_INTERFACE,
            member,
            signature + "a{sv}",
            [*body, {**_CLIENT, **(options or {})}],
        )
        match reply:
            case [str(path)]:
                return path
        raise Failure.bad_reply(member)

    async def decide(self, member: str, signature: str, body: Sequence[Any]) -> None:
        """Call a method of the Manager that takes options after ``body`` and returns nothing."""
        await self._authorized(
            ROOT_PATH, MANAGER_INTERFACE, member, signature + "a{sv}", [*body, dict(_CLIENT)]
        )

    async def reload(self) -> None:
        """Have the daemon read its settings again."""
        await self._authorized(ROOT_PATH, MANAGER_INTERFACE, "Reload")

    async def deployment(self, name: str) -> str:
        """Object path of the deployment that ``name`` means."""
        match await self._manager("GetDeployment", "sa{sv}", [name, {}]):
            case [str(path)]:
                return path
        raise Failure.bad_reply("GetDeployment")

    async def images(self) -> list[dict[str, object]]:
        """The images in the repository."""
        match plain(await self._manager("ListImages", "a{sv}", [{}])):
            case [list(rows)] if all(isinstance(row, dict) for row in rows):
                return rows
        raise Failure.bad_reply("ListImages")

    async def status(self) -> dict[str, Any]:
        """The daemon's native status document."""
        try:
            document = json.loads(await self.status_text("native"))
        except (ValueError, RecursionError):
            raise Failure.bad_reply("GetStatus") from None
        if not isinstance(document, dict):
            raise Failure.bad_reply("GetStatus")
        return document

    async def status_text(self, form: str) -> str:
        """The status document of the format ``form``, as the daemon sent it."""
        match await self._manager("GetStatus", "sa{sv}", [form, {}]):
            case [str(text)]:
                return text
        raise Failure.bad_reply("GetStatus")

    async def jobs(self) -> list[JobRow]:
        """Jobs that wait or run."""
        rows = []
        match await self._manager("ListJobs"):
            case [list(items)]:
                for item in items:
                    match item:
                        case [int(number), str(kind), str(state), str(path)]:
                            rows.append(JobRow(number, kind, state, path))
                        case _:
                            raise Failure.bad_reply("ListJobs")
                return rows
        raise Failure.bad_reply("ListJobs")

    async def job(self, path: str) -> Job:
        """The job at ``path`` as it is now."""
        return Job.from_properties(path, await self.job_properties(path))

    async def job_properties(self, path: str) -> Mapping[str, object]:
        """All properties of the job at ``path``."""
        return await self.properties(path, JOB_INTERFACE)

    async def properties(self, path: str, interface: str) -> Mapping[str, object]:
        """All properties of an interface."""
        match plain(await self._call(path, PROPERTIES_INTERFACE, "GetAll", "s", [interface])):
            case [dict(properties)]:
                return properties
        raise Failure.bad_reply("GetAll")

    async def property_text(self, path: str, interface: str, name: str) -> str:
        """A property that is text."""
        match plain(await self._call(path, PROPERTIES_INTERFACE, "Get", "ss", [interface, name])):
            case [str(value)]:
                return value
        raise Failure.bad_reply("Get")

    async def set_log_level(self, level: str) -> None:
        """Set how much the daemon logs."""
        body = [LOG_CONTROL_INTERFACE, "LogLevel", Variant("s", level)]
        await self._call(LOG_CONTROL_PATH, PROPERTIES_INTERFACE, "Set", "ssv", body)

    async def cancel(self, path: str) -> None:
        """Ask the daemon to cancel the job at ``path``; returns when it agreed."""
        await self._authorized(path, JOB_INTERFACE, "Cancel", "a{sv}", [{}])

    async def owner(self) -> str | None:
        """Unique name of the running daemon, None if it does not run."""
        try:
            reply = await self.bus.call(BUS, BUS_PATH, BUS, "GetNameOwner", "s", [BUS_NAME])
        except BusClosed as error:
            raise Failure.no_bus(error.message) from None
        except BusError:
            return None
        return str(reply[0]) if reply else None

    async def _manager(self, member: str, signature: str = "", body: Sequence[Any] = ()) -> list[Any]:
        return await self._call(ROOT_PATH, MANAGER_INTERFACE, member, signature, body)

    async def _authorized(
        self, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> list[Any]:
        """A call that polkit decides about, and may want to ask somebody about."""
        if self._agent is not None:
            try:
                return await self._call(path, interface, member, signature, body)
            except Failure as failure:
                if failure.name != ErrorName.AUTHORIZATION_REQUIRED:
                    raise
            agent, self._agent = self._agent, None
            await agent.start()
        return await self._call(path, interface, member, signature, body, interactive=self._ask)

    async def _call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        interactive: bool = False,
    ) -> list[Any]:
        limit = {"timeout": AUTHORIZATION_TIMEOUT} if interactive else {}
        try:
            return await self.bus.call(
                BUS_NAME, path, interface, member, signature, body, interactive=interactive, **limit
            )
        except BusClosed as error:
            raise Failure.no_bus(error.message) from None
        except BusError as error:
            raise Failure.of_error(error.name, error.message) from None
