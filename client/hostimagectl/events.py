"""What ``hostimagectl monitor`` prints: the daemon's signals as events, and events as lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, PROPERTIES_INTERFACE
from hostimagectl.job import job_id
from hostimagectl.output import printable, text_of, timestamp
from hostimagectl.service import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
#: Properties of a job that change all the time: a line tells the percent, and only when that changed.
_FIGURES: Final = frozenset({"Progress", "BytesDone", "BytesTotal", "BytesCached", "Rate", "Eta"})
#: Of a job's properties these make no line: Result is told at its end, the others follow from its state.
_UNTOLD: Final = frozenset({"Result", "Error", "Started", "Finished", "Cancellable"})
#: Longest value on a line.
_VALUE_LIMIT: Final = 200


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened; ``time`` in microseconds since the epoch, ``details`` as JSON shows them."""

    time: int
    name: str
    details: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The line in JSON."""
        return {"time": self.time, "event": self.name, **self.details}


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def event_of(path: str, interface: str, member: str, body: list[Any]) -> Event | None:
    """The event that a signal of the daemon tells, None for one that is unknown or makes no sense."""
    match interface, member, plain(body):
        case (str(), "PropertiesChanged", [str(of), dict(properties), list(invalidated)]) if (
            interface == PROPERTIES_INTERFACE
        ):
            changes = {
                "path": path,
                "interface": of,
                "properties": _finite(properties),
                "invalidated": invalidated,
            }
            return Event(now(), "changed", changes)
        case (str(), "InterfacesAdded", [str(where), dict(interfaces)]) if interface == _OBJECT_MANAGER:
            found = {name: _finite(values) for name, values in interfaces.items() if isinstance(values, dict)}
            return Event(now(), "added", {"path": where, "interfaces": found})
        case (str(), "InterfacesRemoved", [str(where), list(names)]) if interface == _OBJECT_MANAGER:
            return Event(now(), "removed", {"path": where, "interfaces": names})
        case (str(), "JobNew", [int(number), str(job), str(kind)]) if interface == MANAGER_INTERFACE:
            return Event(now(), "job-new", {"id": number, "path": job, "kind": kind})
        case (
            str(),
            "JobRemoved",
            [int(number), str(job), str(kind), str(result), str(name), str(message)],
        ) if interface == MANAGER_INTERFACE:
            error = {"name": name, "message": message} if name else None
            end = {"id": number, "path": job, "kind": kind, "result": result, "error": error}
            return Event(now(), "job-removed", end)
    return None


class Narrator:
    """Events as lines for people: what they know already, such as the same percent, is not said again."""

    def __init__(self) -> None:
        self._percents: dict[str, int] = {}

    def lines(self, event: Event) -> Iterator[str]:
        """The lines that tell ``event``, made ``printable``; none for what another event tells better."""
        for text in self._texts(event):
            yield f"{timestamp(event.time)}  {printable(text)}"

    def _texts(self, event: Event) -> Iterator[str]:
        details = event.details
        if event.name == "service":
            yield "hostimaged runs" if details["running"] else "hostimaged does not run"
        elif event.name == "job-new":
            yield f"job {details['id']}: new, {details['kind']}"
        elif event.name == "job-removed":
            self._percents.pop(details["path"], None)
            error = details["error"]
            reason = f": {error['message']}" if error else ""
            yield f"job {details['id']}: {details['result']}{reason}"
        elif event.name == "changed":
            yield from self._changed(details)
        elif not job_id(details["path"]):
            # Jobs tell of themselves by job-new and job-removed.
            yield f"{details['path']}: {event.name}"

    def _changed(self, details: Mapping[str, Any]) -> Iterator[str]:
        path, properties = details["path"], details["properties"]
        if details["interface"] == JOB_INTERFACE:
            yield from self._job_changed(path, properties)
            return
        subject = details["interface"].rpartition(".")[2] if path.count("/") <= 2 else path
        for name, value in properties.items():
            yield f"{subject}: {name} is {_shown(value)}"
        for name in details["invalidated"]:
            yield f"{subject}: {name} changed"

    def _job_changed(self, path: str, properties: Mapping[str, Any]) -> Iterator[str]:
        parts = [
            text_of(value) if name in ("State", "Phase", "Message") else f"{name} is {_shown(value)}"
            for name, value in properties.items()
            if name not in _FIGURES | _UNTOLD
        ]
        progress = properties.get("Progress")
        if isinstance(progress, int | float) and 0 <= progress <= 1:
            percent = int(progress * 100)
            if self._percents.get(path) != percent:
                self._percents[path] = percent
                parts.append(f"{percent}%")
        if parts := list(filter(None, parts)):
            yield f"job {job_id(path)}: {', '.join(parts)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in ("", "/", [], {}):
        return "empty"
    return printable(value, _VALUE_LIMIT)


def _finite(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for name, value in properties.items()
    }
