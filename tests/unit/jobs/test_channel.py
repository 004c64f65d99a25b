"""The worker's end of the socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimaged.errors import Cancelled, Internal, InvalidArgs
from hostimaged.jobs.channel import ALONE, CANCEL, PAUSE, RESUME, Channel
from hostimaged.jobs.operations import MAX_ORDER, Order, Scan
from hostimaged.progress import Phase


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    with ours, theirs:
        yield channel, ours
        channel._input.close()


def received(sock: socket.socket) -> list[dict[str, Any]]:
    sock.setblocking(False)
    data = b""
    try:
        while part := sock.recv(1 << 20):
            data += part
    except BlockingIOError:
        pass
    return [json.loads(line) for line in data.splitlines()]


def test_order(pair: tuple[Channel, socket.socket]) -> None:
    channel, ours = pair
    order = Order(root="/x", operation=Scan())
    ours.sendall(order.model_dump_json().encode() + b"\n")
    assert channel.read_order() == order


@pytest.mark.parametrize(
    ("line", "error"), [(b"{}\n", InvalidArgs), (b"", Internal), (b"x" * (MAX_ORDER + 5) + b"\n", Internal)]
)
def test_bad_orders(pair: tuple[Channel, socket.socket], line: bytes, error: type[Exception]) -> None:
    channel, ours = pair
    ours.sendall(line)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        channel.read_order()


def test_bytes_are_counted_and_told_before_anything_else(pair: tuple[Channel, socket.socket]) -> None:
    channel, ours = pair
    for _ in range(1000):
        channel.advance(5)
    channel.phase(Phase.VERIFYING)
    events = received(ours)
    assert 2 <= len(events) < 100
    assert events[-2:] == [{"event": "bytes", "done": 5000}, {"event": "phase", "phase": "verifying"}]
    counts = [event["done"] for event in events[:-1]]
    assert counts == sorted(counts)


def test_threads_do_not_mix_lines(pair: tuple[Channel, socket.socket]) -> None:
    channel, ours = pair

    def work() -> None:
        for _ in range(200):
            channel.advance(1)
            channel.message("text")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    events: list[dict[str, Any]] = []
    with ours.makefile("rb") as lines:
        while sum(event["event"] == "message" for event in events) < 800:
            events.append(json.loads(lines.readline()))
    for thread in threads:
        thread.join()
    assert max(event["done"] for event in events if event["event"] == "bytes") == 800


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel that takes requests; at the end of the daemon the worker would end."""
    ended = threading.Event()
    monkeypatch.setattr("hostimaged.jobs.channel._end_now", ended.set)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        watch = threading.Thread(target=channel._watch)
        watch.start()
        yield channel, ours
        assert not ended.is_set()
        ours.shutdown(socket.SHUT_WR)
        assert ended.wait(10)
        watch.join()
        channel._input.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def cancelled(channel: Channel) -> bool:
    try:
        channel.at("somewhere")
    except Cancelled:
        return True
    return False


def test_cancellation_is_seen_at_the_next_point(watched: tuple[Channel, socket.socket]) -> None:
    channel, ours = watched
    assert not cancelled(channel)
    ours.sendall(CANCEL)
    until(lambda: cancelled(channel))


def test_a_request_that_is_none_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("hostimaged.jobs.channel._end_now", ended.set)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        ours.sendall(b"dance\n")
        channel._watch()
        assert ended.is_set()
        channel._input.close()


def test_pausing(watched: tuple[Channel, socket.socket]) -> None:
    channel, ours = watched
    channel.rest()
    assert received(ours) == []
    ours.sendall(PAUSE)
    until(lambda: channel.pausing)
    resting = threading.Thread(target=channel.rest)
    resting.start()
    ours.setblocking(True)
    assert json.loads(ours.recv(1000)) == {"event": "paused", "paused": True}
    resting.join(0.05)
    assert resting.is_alive()
    ours.sendall(RESUME)
    resting.join()
    assert received(ours) == [{"event": "paused", "paused": False}]
    assert not channel.pausing


def test_every_pause_is_answered(watched: tuple[Channel, socket.socket]) -> None:
    channel, ours = watched
    ours.sendall(PAUSE)
    until(lambda: channel.pausing)
    resting = threading.Thread(target=channel.rest)
    resting.start()
    ours.settimeout(10)
    with ours.makefile("rb") as lines:
        assert json.loads(lines.readline()) == {"event": "paused", "paused": True}
        # The thread that rests sees nothing of the end of the first pause.
        with channel._requests:
            assert channel._take(RESUME)
            assert channel._take(PAUSE)
        try:
            assert json.loads(lines.readline()) == {"event": "paused", "paused": True}
        finally:
            ours.sendall(RESUME)
            resting.join()
        assert json.loads(lines.readline()) == {"event": "paused", "paused": False}


def test_a_pause_ends_with_a_cancellation(watched: tuple[Channel, socket.socket]) -> None:
    channel, ours = watched
    ours.sendall(PAUSE + CANCEL)
    until(lambda: channel.pausing and cancelled(channel))
    for wait in (channel.rest, channel.alone().__enter__):
        with pytest.raises(Cancelled):
            wait()


def test_having_the_repository_alone(watched: tuple[Channel, socket.socket]) -> None:
    channel, ours = watched
    for _ in range(2):
        entered = threading.Event()
        leave = threading.Event()

        def work(entered: threading.Event = entered, leave: threading.Event = leave) -> None:
            with channel.alone():
                entered.set()
                leave.wait(10)

        working = threading.Thread(target=work)
        working.start()
        ours.setblocking(True)
        assert json.loads(ours.recv(1000)) == {"event": "alone", "wanted": True}
        assert not entered.wait(0.05)
        ours.sendall(ALONE)
        assert entered.wait(10)
        leave.set()
        working.join()
        assert received(ours) == [{"event": "alone", "wanted": False}]


def test_texts_are_one_printable_line(pair: tuple[Channel, socket.socket]) -> None:
    channel, ours = pair
    channel.message("a\nb\x1b[31m" + "x" * 5000)
    channel.error(ErrorName.INTERNAL, "c\nd")
    message, error = received(ours)
    assert message["text"].startswith("a\\nb\\x1b")
    assert len(message["text"]) <= 1000
    assert error["message"] == "c\\nd"
