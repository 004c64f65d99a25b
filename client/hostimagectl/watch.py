"""What the daemon tells about its jobs, collected from before a job is asked for.

A job may end before the reply that names it is read, so signals are kept from the first moment on and looked
up by path afterwards. Only signals of the connection that owns the daemon's bus name count: any peer may send
us a signal directly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, JOBS_PATH, MANAGER_INTERFACE, PROPERTIES_INTERFACE
from hostimage_dbus.transport import BUS, BusClosed, BusError
from hostimagectl.failure import Failure
from hostimagectl.job import Job, JobError
from hostimagectl.service import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostimagectl.service import Service

_PROPERTIES_RULE: Final = (
    f"type='signal',sender='{BUS_NAME}',interface='{PROPERTIES_INTERFACE}',member='PropertiesChanged',"
    f"path_namespace='{JOBS_PATH}',arg0='{JOB_INTERFACE}'"
)
RULES: Final = (
    f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{BUS_NAME}'",
    f"type='signal',sender='{BUS_NAME}',interface='{MANAGER_INTERFACE}',member='JobRemoved'",
    _PROPERTIES_RULE,
)
#: Jobs whose signals are kept while we do not know yet which is ours; the oldest are forgotten.
_KEPT: Final = 64


@dataclass(frozen=True, slots=True)
class Removal:
    """A ``JobRemoved`` signal: how a job ended."""

    kind: str
    result: str
    error: JobError | None


class Watch:
    """Collects signals; ``on_event`` is called after each that changed something.

    ``owner`` is the daemon's unique name, None while there is none. Made by ``start``; ``stop`` ends it.
    """

    def __init__(self, service: Service, on_event: Callable[[], None]) -> None:
        self.owner: str | None = None
        self._service = service
        self._on_event = on_event
        self._owner_told = False
        self._only: str | None = None
        self._properties: dict[str, dict[str, object]] = {}
        self._removals: dict[str, Removal] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Subscribe; after it returns nothing is missed. Raises ``Failure``."""
        self._unsubscribe = self._service.bus.on_signal(self._signal)
        try:
            for rule in RULES:
                await self._service.bus.add_match(rule)
        except BusClosed as error:
            raise Failure.no_bus(error.message) from None
        except BusError as error:
            raise Failure.no_service(f"the bus refuses our subscription: {error.message}") from None
        owner = await self._service.owner()
        if not self._owner_told:
            self.owner = owner

    def stop(self) -> None:
        """No event comes after this."""
        self._unsubscribe()

    def focus(self, path: str) -> None:
        """From now on only the job at ``path`` matters."""
        self._only = path
        self._properties = {key: value for key, value in self._properties.items() if key == path}
        self._removals = {key: value for key, value in self._removals.items() if key == path}

    def job(self, path: str) -> Job:
        """The job at ``path`` as far as it was told about."""
        job = Job.from_properties(path, self._properties.get(path, {}))
        removal = self._removals.get(path)
        if removal is None:
            return job
        return replace(job, kind=removal.kind, state=removal.result, error=removal.error or job.error)

    def removed(self, path: str) -> bool:
        """Whether ``JobRemoved`` came for the job at ``path``."""
        return path in self._removals

    def merge(self, path: str, properties: Mapping[str, object], *, newest: bool = False) -> None:
        """Take in all properties of a job, as a call gave them.

        What signals told wins, unless ``newest`` says that no signal can follow: a signal read before the
        reply is handled may have been sent after it, and every change is signalled.
        """
        told = self._properties.get(path, {})
        self._properties[path] = {**told, **properties} if newest else {**properties, **told}

    def _signal(self, path: str, interface: str, member: str, body: list[Any], sender: str) -> None:
        if interface == BUS and member == "NameOwnerChanged" and sender == BUS:
            self._owner_changed(body)
        elif sender != self.owner or not path:
            return
        elif interface == MANAGER_INTERFACE and member == "JobRemoved":
            self._removed(body)
        elif interface == PROPERTIES_INTERFACE and member == "PropertiesChanged":
            self._changed(path, body)

    def _owner_changed(self, body: list[Any]) -> None:
        match body:
            case [name, str(), str(new)] if name == BUS_NAME:
                self.owner = new or None
                self._owner_told = True
                self._on_event()

    def _wanted(self, path: str) -> bool:
        return self._only is None or path == self._only

    def _removed(self, body: list[Any]) -> None:
        match body:
            case [int(), str(path), str(kind), str(result), str(name), str(message)] if self._wanted(path):
                self._removals[path] = Removal(kind, result, JobError(name, message) if name else None)
                _trim(self._removals)
                self._on_event()

    def _changed(self, path: str, body: list[Any]) -> None:
        match body:
            case [interface, dict(changed), *_] if interface == JOB_INTERFACE and self._wanted(path):
                self._properties.setdefault(path, {}).update(plain(changed))
                _trim(self._properties)
                self._on_event()


def _trim(table: dict[str, Any]) -> None:
    while len(table) > _KEPT:
        del table[next(iter(table))]
