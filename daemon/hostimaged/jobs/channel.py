"""The worker's end of the socket: events go up, a cancellation comes down, the daemon's end is noticed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hostimaged.errors import Cancelled, Internal, printable
from hostimaged.jobs.events import (
    MAX_EVENT,
    MAX_TEXT,
    BytesEvent,
    ErrorEvent,
    Event,
    GeneratingEvent,
    MessageEvent,
    PhaseEvent,
    ResultEvent,
    StatusEvent,
    TotalsEvent,
    encode_event,
)
from hostimaged.jobs.operations import MAX_ORDER, Order, parse_order

if TYPE_CHECKING:
    import socket

    from hostimage_dbus.errors import ErrorName
    from hostimaged.progress import Phase

#: Seconds between two events about bytes: the daemon announces progress five times per second.
_BYTES_INTERVAL: Final = 0.1
CANCEL: Final = b"cancel\n"


class Channel:
    """Implements ``hostimaged.progress.Reporter`` over the socket; may be used from all threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._input = sock.makefile("rb")
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._bytes = 0
        self._bytes_sent = 0
        self._sent_at = 0.0

    def read_order(self) -> Order:
        """Wait for the order; raises ``InvalidArgs`` for a bad one, ``Internal`` if none comes."""
        line = self._input.readline(MAX_ORDER)
        if not line.endswith(b"\n"):
            raise Internal
        return parse_order(line)

    def watch(self) -> None:
        """From now on take cancellations, and end this process at once when the daemon is gone."""
        threading.Thread(target=self._watch, name="daemon-watch", daemon=True).start()

    def _watch(self) -> None:
        while self._input.readline(64) == CANCEL:
            self._cancelled.set()
        _end_now()

    # Reporter

    def phase(self, phase: Phase) -> None:
        """The job enters ``phase``."""
        self._send(PhaseEvent(phase=phase))

    def totals(self, total: int, cached: int) -> None:
        """Bytes there are, and bytes that are stored already."""
        self._send(TotalsEvent(total=total, cached=cached))

    def advance(self, count: int) -> None:
        """``count`` more bytes were read."""
        with self._lock:
            self._bytes += count
            if time.monotonic() - self._sent_at >= _BYTES_INTERVAL:
                self._send_bytes()

    def generating(self, done: int, total: int) -> None:
        """``done`` of ``total`` EROFS images are made."""
        self._send(GeneratingEvent(done=done, total=total))

    def message(self, text: str) -> None:
        """One line for people."""
        self._send(MessageEvent(text=printable(text)[:MAX_TEXT]))

    def at(self, point: str) -> None:
        """Raise ``Cancelled`` if the job is to stop."""
        self.check()

    # the rest of a worker's life

    def check(self) -> None:
        """Raise ``Cancelled`` if the job is to stop."""
        if self._cancelled.is_set():
            raise Cancelled

    def status(self, status: dict[str, Any]) -> None:
        """What a scan found."""
        self._send(StatusEvent(status=status))

    def result(self, result: dict[str, Any]) -> None:
        """The work is done."""
        self._send(ResultEvent(result=result))

    def error(self, name: ErrorName, message: str) -> None:
        """The work failed."""
        self._send(ErrorEvent(name=name, message=printable(message)[:MAX_TEXT]))

    def _send(self, event: Event) -> None:
        line = encode_event(event)
        if len(line) > MAX_EVENT:
            raise Internal
        with self._lock:
            if self._bytes != self._bytes_sent:
                self._send_bytes()
            self._write(line)

    def _send_bytes(self) -> None:
        self._bytes_sent = self._bytes
        self._sent_at = time.monotonic()
        self._write(encode_event(BytesEvent(done=self._bytes)))

    def _write(self, line: bytes) -> None:
        try:
            self._socket.sendall(line)
        except OSError:
            _end_now()


def _end_now() -> NoReturn:
    """The daemon is gone: end this process and what it started. Operations may be killed at any point."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(os.EX_UNAVAILABLE)
