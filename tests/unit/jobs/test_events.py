"""What a worker may say, and what is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import Phase
from hostimaged.jobs.events import (
    MAX_TEXT,
    BytesEvent,
    ErrorEvent,
    Event,
    GeneratingEvent,
    ImportingEvent,
    InvalidEvent,
    MessageEvent,
    PhaseEvent,
    ResultEvent,
    StatusEvent,
    TotalsEvent,
    encode_event,
    parse_event,
)

EVENTS: list[Event] = [
    PhaseEvent(phase=Phase.PULLING),
    TotalsEvent(total=10, cached=5),
    BytesEvent(done=7),
    ImportingEvent(done=1, total=2),
    GeneratingEvent(done=1, total=2),
    MessageEvent(text="héllo"),
    StatusEvent(status={"images": [{"a": 1}]}),
    ResultEvent(result={"tag": "x", "changed": True, "size": 5, "ids": ["a"]}),
    ErrorEvent(name=ErrorName.NO_SPACE, message="full"),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_survive_the_wire(event: Event) -> None:
    line = encode_event(event)
    assert line.count(b"\n") == 1
    parsed = parse_event(line)
    assert parsed == event
    assert type(parsed) is type(event)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"[]",
        b'"phase"',
        b"{}",
        b'{"event": "unknown"}',
        b'{"event": "phase", "phase": "dancing"}',
        b'{"event": "phase", "phase": "pulling", "more": 1}',
        b'{"event": "totals", "total": -1, "cached": 0}',
        b'{"event": "totals", "total": 1e300, "cached": 0}',
        b'{"event": "bytes", "done": 9007199254740992}',
        b'{"event": "bytes", "done": "x"}',
        b'{"event": "message", "text": "' + b"x" * (MAX_TEXT + 1) + b'"}',
        b'{"event": "error", "name": "org.example.Foreign", "message": ""}',
        b'{"event": "result", "result": {"x": {"deep": 1}}}',
        b'{"event": "result", "result": {"x": null}}',
        b'{"event": "status", "status": []}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_nonsense_is_refused(line: bytes) -> None:
    with pytest.raises(InvalidEvent):
        parse_event(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_refused(line: bytes) -> None:
    try:
        event = parse_event(line)
    except InvalidEvent:
        return
    assert parse_event(encode_event(event)) == event


def test_booleans_of_results_stay_booleans() -> None:
    event = parse_event(b'{"event": "result", "result": {"changed": true, "size": 1}}')
    assert isinstance(event, ResultEvent)
    assert event.result["changed"] is True
    assert event.result["size"] == 1
    assert not isinstance(event.result["size"], bool)
