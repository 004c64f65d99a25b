"""The worker's end of the socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimaged.errors import Cancelled, Internal, InvalidArgs
from hostimaged.jobs.channel import CANCEL, Channel
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


def test_cancellation_is_seen_at_the_next_point(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    channel.at("somewhere")
    channel._cancelled.set()
    with pytest.raises(Cancelled):
        channel.at("elsewhere")


def test_cancel_message_sets_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("hostimaged.jobs.channel._end_now", ended.set)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        watch = threading.Thread(target=channel._watch)
        watch.start()
        ours.sendall(CANCEL)
        assert channel._cancelled.wait(10)
        assert not ended.is_set()
        ours.shutdown(socket.SHUT_WR)
        assert ended.wait(10)
        watch.join()
        channel._input.close()


def test_texts_are_one_printable_line(pair: tuple[Channel, socket.socket]) -> None:
    channel, ours = pair
    channel.message("a\nb\x1b[31m" + "x" * 5000)
    channel.error(ErrorName.INTERNAL, "c\nd")
    message, error = received(ours)
    assert message["text"].startswith("a\\nb\\x1b")
    assert len(message["text"]) <= 1000
    assert error["message"] == "c\\nd"
