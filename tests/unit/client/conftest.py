"""A daemon in the test's own process, behind the interface of the transport."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH, job_path
from hostimage_dbus.transport import BusClosed, BusError, Variant
from hostimagectl.output import Console
from hostimagectl.service import Service

DBUS = "org.freedesktop.DBus"
UNKNOWN_OBJECT = DBUS + ".Error.UnknownObject"
OWNER = ":1.7"

SIGNATURES = {
    "Id": "t",
    "Kind": "s",
    "Target": "s",
    "State": "s",
    "Phase": "s",
    "Progress": "d",
    "BytesDone": "t",
    "BytesTotal": "t",
    "BytesCached": "t",
    "Rate": "t",
    "Eta": "t",
    "Message": "s",
    "Cancellable": "b",
    "Created": "t",
    "Started": "t",
    "Finished": "t",
    "Error": "(ss)",
    "Result": "a{sv}",
}


def variants(properties: dict[str, Any]) -> dict[str, Variant]:
    return {name: Variant(SIGNATURES[name], value) for name, value in properties.items()}


class FakeBus:
    """The bus and the daemon; a test drives it and looks at ``calls``."""

    def __init__(self) -> None:
        self.owner: str | None = OWNER
        self.rules: list[str] = []
        self.calls: list[tuple[str, str, list[Any]]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, BusError] = {}
        self.on_pull: Callable[[], Awaitable[None]] | None = None
        self.on_cancel: Callable[[str], None] | None = None
        self.on_interactive: Callable[[str, bool], None] = lambda member, interactive: None
        #: Whether others wait for the jobs too, so that Cancel is only their leaving.
        self.shared = False
        self.deployments: dict[str, str] = {}
        self.properties: dict[str, dict[str, Variant]] = {}
        self.status: dict[str, Any] = {"results": []}
        self.images: list[dict[str, Variant]] = []
        self.next_id = 1
        self.lost = asyncio.Event()
        self.activity = asyncio.Event()
        self._callbacks: list[Callable[..., None]] = []

    # What the client uses.

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float = 25.0,  # noqa: ASYNC109 (the transport's interface)
        interactive: bool = False,
    ) -> list[Any]:
        self.calls.append((member, path, list(body)))
        self.activity.set()
        await asyncio.sleep(0)
        if self.lost.is_set():
            raise BusClosed("the connection to the bus is lost")
        if member in self.errors:
            raise self.errors[member]
        if destination == DBUS:
            return self._bus_call(member)
        assert destination == BUS_NAME
        if self.owner is None:
            raise BusError(DBUS + ".Error.ServiceUnknown", "The name is not activatable")
        if interface != DBUS + ".Properties":
            self.on_interactive(member, interactive)
        elif path in self.properties:
            return self._properties_call(path, member, list(body))
        if path == ROOT_PATH or path in self.deployments.values():
            return await self._method_call(member, list(body))
        return self._job_call(path, member)

    def _bus_call(self, member: str) -> list[Any]:
        assert member == "GetNameOwner"
        if self.owner is None:
            raise BusError(DBUS + ".Error.NameHasNoOwner", "no such name")
        return [self.owner]

    def _properties_call(self, path: str, member: str, body: list[Any]) -> list[Any]:
        if member == "GetAll":
            return [self.properties[path]]
        if member == "Get":
            return [self.properties[path][body[1]]]
        assert member == "Set"
        self.properties[path][body[1]] = body[2]
        return []

    async def _method_call(self, member: str, body: list[Any]) -> list[Any]:
        if member == "GetDeployment":
            if body[0] not in self.deployments:
                raise BusError(ErrorName.NO_SUCH_DEPLOYMENT, f"there is no deployment {body[0]}")
            return [self.deployments[body[0]]]
        if member in ("SetUpdatePolicy", "HoldUpdates", "Reload"):
            return []
        if member == "ListImages":
            return [self.images]
        if member == "ListJobs":
            return [[[job["Id"], job["Kind"], job["State"], path] for path, job in self.jobs.items()]]
        if member == "GetStatus":
            return [json.dumps(self.status if body == ["native", {}] else body)]
        target = body[0] if isinstance(body[0], str) else ""
        path = self.add_job(Target=target, **({"Kind": "pull"} if member == "Pull" else {}))
        if self.on_pull is not None:
            await self.on_pull()
        return [path]

    def _job_call(self, path: str, member: str) -> list[Any]:
        if path not in self.jobs:
            raise BusError(UNKNOWN_OBJECT, f"there is no object {path}")
        if member == "GetAll":
            return [variants(self.jobs[path])]
        assert member == "Cancel"
        if not self.shared:
            self.change(path, State="cancelling")
        if self.on_cancel is not None:
            self.on_cancel(path)
        return []

    async def add_match(self, rule: str) -> None:
        self.rules.append(rule)

    def on_signal(self, callback: Callable[..., None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def closed(self) -> BusClosed:
        await self.lost.wait()
        return BusClosed("the connection to the bus is lost")

    # What a test uses.

    def add_job(self, **properties: Any) -> str:
        number = self.next_id
        self.next_id += 1
        self.jobs[job_path(number)] = {
            "Id": number,
            "Kind": "pull",
            "Target": "",
            "State": "queued",
            "Progress": -1.0,
        } | properties
        return job_path(number)

    def signal(
        self, path: str, interface: str, member: str, body: list[Any], sender: str | None = None
    ) -> None:
        for callback in tuple(self._callbacks):
            callback(path, interface, member, body, sender or self.owner or ":1.0")

    def change(self, path: str, **properties: Any) -> None:
        self.jobs[path].update(properties)
        body = [JOB_INTERFACE, variants(properties), []]
        self.signal(path, DBUS + ".Properties", "PropertiesChanged", body)

    def announce(self, path: str, result: str, name: str = "", message: str = "") -> None:
        number = int(path.rpartition("_")[2])
        kind = self.jobs.get(path, {}).get("Kind", "pull")
        body = [number, path, kind, result, name, message]
        self.signal(ROOT_PATH, MANAGER_INTERFACE, "JobRemoved", body)

    def end(self, path: str, state: str, name: str = "", message: str = "", **properties: Any) -> None:
        self.change(path, State=state, Error=[name, message], **properties)
        self.announce(path, state, name, message)

    def own(self, owner: str | None) -> None:
        """The daemon goes (None) or comes."""
        old, self.owner = self.owner or "", owner
        if owner is None:
            self.jobs.clear()
        body = [BUS_NAME, old, owner or ""]
        self.signal("/org/freedesktop/DBus", DBUS, "NameOwnerChanged", body, sender=DBUS)

    def count(self, member: str) -> int:
        return sum(1 for name, _, _ in self.calls if name == member)

    async def called(self, member: str, times: int = 1) -> None:
        """Wait until the client called ``member`` and got its answer."""
        async with asyncio.timeout(5):
            while self.count(member) < times:
                self.activity.clear()
                await self.activity.wait()
        for _ in range(10):
            await asyncio.sleep(0)


class Streams(Console):
    """A console whose output a test reads."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, terminal: bool = False) -> None:
        self.out_file = Terminal() if terminal else io.StringIO()
        self.err_file = Terminal() if terminal else io.StringIO()
        super().__init__(as_json=as_json, quiet=quiet, stdout=self.out_file, stderr=self.err_file)

    @property
    def out(self) -> str:
        return self.out_file.getvalue()

    @property
    def errors(self) -> str:
        return self.err_file.getvalue()

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def make_console() -> type[Streams]:
    return Streams


@pytest.fixture
def make_bus() -> type[FakeBus]:
    return FakeBus


@pytest.fixture
async def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
async def daemon(bus: FakeBus) -> Service:
    return Service(bus)
