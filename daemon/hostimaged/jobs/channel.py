"""The worker's end of the socket: events go up, requests come down, and the daemon's end is noticed."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hostimaged.errors import Cancelled, Internal, printable
from hostimaged.jobs.events import (
    MAX_EVENT,
    MAX_TEXT,
    AloneEvent,
    BytesEvent,
    ErrorEvent,
    Event,
    GeneratingEvent,
    ImportingEvent,
    MessageEvent,
    PausedEvent,
    PhaseEvent,
    ResultEvent,
    SizesEvent,
    StatusEvent,
    TotalsEvent,
    encode_event,
)
from hostimaged.jobs.operations import MAX_ORDER, Order, parse_order

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from hostimage_dbus.errors import ErrorName
    from hostimaged.progress import Phase

#: Seconds between two events about bytes: the daemon announces progress five times per second.
_BYTES_INTERVAL: Final = 0.1
#: Requests of the daemon: stop; give up the lock of the repository, and take it again; the repository is the
#: job's alone now, as it asked.
CANCEL: Final = b"cancel\n"
PAUSE: Final = b"pause\n"
RESUME: Final = b"resume\n"
ALONE: Final = b"alone\n"


class Channel:
    """Implements ``hostimaged.progress.Reporter`` over the socket; may be used from all threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._input = sock.makefile("rb")
        self._lock = threading.Lock()
        self._requests = threading.Condition()
        self._cancelled = False
        self._pausing = False
        self._pauses = 0
        self._alone = False
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
        while self._take(self._input.readline(64)):
            pass
        _end_now()

    def _take(self, request: bytes) -> bool:
        with self._requests:
            match request:
                case b"cancel\n":
                    self._cancelled = True
                case b"pause\n":
                    self._pausing = True
                    self._pauses += 1
                case b"resume\n":
                    self._pausing = False
                case b"alone\n":
                    self._alone = True
                case _:
                    return False
            self._requests.notify_all()
        return True

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

    def importing(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of containers-storage are in the repository."""
        self._send(ImportingEvent(done=done, total=total))

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
        if self._cancelled:
            raise Cancelled

    @property
    def pausing(self) -> bool:
        """Whether the job is to give up the lock of the repository until it may go on."""
        return self._pausing

    def rest(self) -> None:
        """Wait as long as the job is to pause, holding no lock of the repository; raises ``Cancelled``.

        Each pause is answered: between two of them this thread may not have run at all.
        """
        self.check()
        rested = False
        while self._pausing:
            rested = True
            answered = self._pauses
            self._send(PausedEvent(paused=True))
            with self._requests:
                self._requests.wait_for(partial(self._may_go_on, answered))
            self.check()
        if rested:
            self._send(PausedEvent(paused=False))

    def _may_go_on(self, answered: int) -> bool:
        return self._cancelled or not self._pausing or self._pauses != answered

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no reader of ours holds the lock of the repository.

        It is waited for without a time-out, which is for other programs: readers pause within about a second.
        The lock itself is taken inside. Raises ``Cancelled``.
        """
        self.check()
        self._send(AloneEvent(wanted=True))
        try:
            with self._requests:
                self._requests.wait_for(lambda: self._cancelled or self._alone)
            self.check()
            yield
        finally:
            self._alone = False
            self._send(AloneEvent(wanted=False))

    def status(self, status: dict[str, Any]) -> None:
        """What a scan found."""
        self._send(StatusEvent(status=status))

    def sizes(self, contents: str, used: int, exclusive: dict[str, int]) -> None:
        """How much space is taken."""
        self._send(SizesEvent(contents=contents, used=used, exclusive=exclusive))

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
