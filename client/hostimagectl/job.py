"""A job as the client sees it: its properties, read defensively and frozen."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimage_dbus.names import JOBS_PATH, JobState
from hostimagectl.output import number_of, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_PATH: Final = re.compile(re.escape(JOBS_PATH) + "/_([0-9]{1,20})")


def job_id(path: str) -> int:
    """The id in a job's object path, 0 for a path that is not a job's."""
    match = _PATH.fullmatch(path)
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: D-Bus error name and the message for people."""

    name: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """``{"name": …, "message": …}``."""
        return {"name": self.name, "message": self.message}


@dataclass(frozen=True, slots=True)
class Job:
    """One moment of a job.

    Bytes count compressed data: ``bytes_total`` of config and layers together, ``bytes_cached`` of them
    stored before, ``bytes_done`` read so far. ``rate`` is bytes per second and ``eta`` microseconds,
    both 0 while unknown; ``progress`` runs from 0 to 1, None while unknown. Times are microseconds since the
    epoch or 0.
    """

    id: int
    path: str
    kind: str = ""
    target: str = ""
    state: str = ""
    phase: str = ""
    progress: float | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_cached: int = 0
    rate: int = 0
    eta: int = 0
    message: str = ""
    cancellable: bool = False
    hold_reasons: tuple[str, ...] = ()
    created: int = 0
    started: int = 0
    finished: int = 0
    error: JobError | None = None
    result: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_properties(cls, path: str, properties: Mapping[str, object]) -> Job:
        """From unwrapped D-Bus properties; one that is absent or of the wrong type counts as unknown."""

        def text(name: str) -> str:
            return text_of(properties.get(name))

        def number(name: str) -> int:
            return number_of(properties.get(name))

        progress = properties.get("Progress")
        result = properties.get("Result")
        return cls(
            id=number("Id") or job_id(path),
            path=path,
            kind=text("Kind"),
            target=text("Target"),
            state=text("State"),
            phase=text("Phase"),
            progress=_fraction(progress),
            bytes_done=number("BytesDone"),
            bytes_total=number("BytesTotal"),
            bytes_cached=number("BytesCached"),
            rate=number("Rate"),
            eta=number("Eta"),
            message=text("Message"),
            cancellable=properties.get("Cancellable") is True,
            hold_reasons=_texts(properties.get("HoldReasons")),
            created=number("Created"),
            started=number("Started"),
            finished=number("Finished"),
            error=_error(properties.get("Error")),
            result=result if isinstance(result, dict) else {},
        )

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        try:
            return JobState(self.state).finished
        except ValueError:
            return False

    @property
    def succeeded(self) -> bool:
        """Whether the job did what it was for."""
        return self.state == JobState.DONE

    @property
    def cancelled(self) -> bool:
        """Whether the job was stopped on request."""
        return self.state == JobState.CANCELLED

    def as_dict(self) -> dict[str, object]:
        """The JSON shape of a job, without its result."""
        return {
            "id": self.id,
            "path": self.path,
            "kind": self.kind,
            "target": self.target,
            "state": self.state,
            "phase": self.phase,
            "progress": self.progress,
            "bytesDone": self.bytes_done,
            "bytesTotal": self.bytes_total,
            "bytesCached": self.bytes_cached,
            "rate": self.rate,
            "eta": self.eta,
            "message": self.message,
            "cancellable": self.cancellable,
            "holdReasons": list(self.hold_reasons),
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
        }


def _fraction(value: object) -> float | None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    return float(value)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(filter(None, map(text_of, value))) if isinstance(value, list) else ()


def _error(value: object) -> JobError | None:
    match value:
        case [str(name), str(message)] if name:
            return JobError(name, message)
        case _:
            return None
