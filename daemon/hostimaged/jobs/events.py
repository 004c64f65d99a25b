"""What a worker tells the daemon: one JSON object per line, validated, bounded."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hostimage_dbus.errors import ErrorName  # noqa: TC001 (pydantic reads annotations)
from hostimage_dbus.names import Phase  # noqa: TC001 (pydantic reads annotations)

#: Longest line: the status of a repository with a few thousand images. The daemon reads it in one piece.
MAX_EVENT: Final = 4 << 20
MAX_TEXT: Final = 1000

# Sizes are D-Bus "t", and JSON numbers beyond 2**53 are not exact everywhere.
_Size = Annotated[int, Field(ge=0, lt=1 << 53)]
_Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhaseEvent(_Event):
    """The job entered a phase."""

    event: Literal["phase"] = "phase"
    phase: Phase


class TotalsEvent(_Event):
    """How many bytes there are, and how many of them need not be read."""

    event: Literal["totals"] = "totals"
    total: _Size
    cached: _Size


class BytesEvent(_Event):
    """How many bytes were read so far."""

    event: Literal["bytes"] = "bytes"
    done: _Size


class ImportingEvent(_Event):
    """``done`` of ``total`` bytes that were fetched into containers-storage are in the repository too."""

    event: Literal["importing"] = "importing"
    done: _Size
    total: _Size


class GeneratingEvent(_Event):
    """``done`` of ``total`` images are made."""

    event: Literal["generating"] = "generating"
    done: _Count
    total: _Count


class MessageEvent(_Event):
    """A line for people."""

    event: Literal["message"] = "message"
    text: str = Field(max_length=MAX_TEXT)


class StatusEvent(_Event):
    """What a scan found (``hostimaged.oci.scan``)."""

    event: Literal["status"] = "status"
    status: dict[str, Any]


class SizesEvent(_Event):
    """How much space is taken (``hostimaged.host.sizes.Sizes``), by the ids of deployments."""

    event: Literal["sizes"] = "sizes"
    contents: str = Field(max_length=128)
    used: _Size
    exclusive: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")], _Size]


class AloneEvent(_Event):
    """The job needs the repository alone, or does not any more; it waits until it is told that it has it."""

    event: Literal["alone"] = "alone"
    wanted: bool


class PausedEvent(_Event):
    """The job, which was asked to pause, holds no lock now; or it goes on."""

    event: Literal["paused"] = "paused"
    paused: bool


class ResultEvent(_Event):
    """The work is done; the last event."""

    event: Literal["result"] = "result"
    result: dict[str, bool | _Size | str | list[str]]


class ErrorEvent(_Event):
    """The work failed; the last event."""

    event: Literal["error"] = "error"
    name: ErrorName
    message: str = Field(max_length=MAX_TEXT)


Event = (
    PhaseEvent
    | TotalsEvent
    | BytesEvent
    | ImportingEvent
    | GeneratingEvent
    | MessageEvent
    | StatusEvent
    | SizesEvent
    | AloneEvent
    | PausedEvent
    | ResultEvent
    | ErrorEvent
)

_event: Final[TypeAdapter[Event]] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


class InvalidEvent(Exception):
    """A worker sent something that is not an event; it is not to be believed any more."""


def parse_event(line: bytes) -> Event:
    """The event in ``line``; raises ``InvalidEvent``."""
    try:
        return _event.validate_json(line)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InvalidEvent(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None


def encode_event(event: Event) -> bytes:
    """``event`` as a line."""
    return event.model_dump_json().encode() + b"\n"
