"""Client of skopeo's image proxy: the wire protocol, nothing of images (skopeo-experimental-image-proxy(1)).

JSON requests and replies, one per packet of a SOCK_SEQPACKET socket pair; bulk data through pipes whose read
ends come with the replies. The proxy serves one request at a time, in order, while data flows through any
number of pipes. Its side of a pipe is closed only by ``FinishPipe``, which it answers once all data has been
taken: so that request is sent when the expected bytes are in, or when the pipe falls silent, and the pipe is
read on meanwhile. Sent earlier it would keep the proxy from serving the other threads until this one's data
is through.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import Unavailable, UnsupportedImage
from hostimaged.system.process import widen_pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

#: skopeo limits its own messages to 32 KiB.
_MAX_MESSAGE: Final = 64 * 1024
_MAX_FDS: Final = 4
_CHUNK: Final = 1 << 20
#: A pipe this long without data is asked how it is doing.
_QUIET: Final = 1.0
#: How often a waiting thread looks whether it is still wanted.
_SLICE: Final = 0.5
#: A peer that sends nothing for so long is given up. containers-image's own connection attempts end earlier.
SILENCE: Final = 120.0
#: Less than this within ``silence`` seconds of waiting is nothing (1 KiB/s): a peer that sends a byte now and
#: then would hold up the repository for years.
_SIGN_OF_LIFE: Final = 128 << 10


@dataclass(slots=True)
class Reply:
    """An answer of the proxy; ``fds`` belong to whoever holds it."""

    value: Any
    pipe_id: int
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class ProxyError(Exception):
    """The proxy answered a request with an error: ``text`` is containers-image's, ``code`` may be empty."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class ProxyGone(Exception):
    """The proxy ended, or does not speak the protocol."""


class ImageProxy:
    """One proxy, spoken to over ``connection``, which it takes over. Any thread may call anything but
    ``close``.

    ``waiting`` is called every half second of waiting and may raise to give up. ``silence`` is the number of
    seconds without any sign of life, be it a reply or data in a pipe, after which ``Unavailable`` is raised.
    """

    def __init__(
        self, connection: socket.socket, waiting: Callable[[], None], *, silence: float = SILENCE
    ) -> None:
        self.waiting = waiting
        self.silence = silence
        self._connection = connection
        self._lock = threading.Lock()
        self._pending: deque[Future[Reply]] = deque()
        self._gone = False
        self._alive_at = time.monotonic()
        self._receiver = threading.Thread(target=self._receive, name="image-proxy", daemon=True)
        self._receiver.start()

    def send(self, method: str, *args: object) -> Future[Reply]:
        """Send a request; its reply, a ``ProxyError`` or ``ProxyGone`` comes through the future."""
        packet = json.dumps({"method": method, "args": args}).encode()
        future: Future[Reply] = Future()
        with self._lock:
            if self._gone:
                raise ProxyGone
            self._pending.append(future)
            try:
                self._connection.send(packet)
            except OSError:
                # The receiver sees the end of the connection and fails what is pending.
                self._shut()
        return future

    def alive(self) -> None:
        """The proxy gave a sign of life."""
        self._alive_at = time.monotonic()

    def wait(self, future: Future[Reply], *, limit: float | None = None) -> Reply:
        """The reply a future holds; raises what it holds, or ``Unavailable`` after ``limit`` seconds.

        The proxy may be busy with another thread's pipe, which it has to see the end of first: the time
        counts from its last sign of life.
        """
        patience = self.silence if limit is None else limit
        begin = time.monotonic()
        try:
            while not _settled(future, _SLICE):
                self.waiting()
                if time.monotonic() - max(begin, self._alive_at) > patience:
                    raise Unavailable(f"skopeo did not answer for {patience:.0f} s")
        except BaseException:
            future.add_done_callback(_discard)
            raise
        return future.result()

    def call(self, method: str, *args: object, limit: float | None = None) -> Reply:
        """Send a request and wait for its reply; the caller closes it."""
        return self.wait(self.send(method, *args), limit=limit)

    def open_pipe(self, method: str, *args: object, size: int | None) -> Pipe:
        """Send a request whose reply brings a pipe, of ``size`` bytes where that is known."""
        reply = self.call(method, *args)
        if len(reply.fds) != 1 or reply.pipe_id == 0:
            reply.close()
            raise ProxyGone
        return Pipe(self, reply, size)

    def close(self) -> bool:
        """Ask the proxy to end, and hang up; says whether it did so itself. The process is the caller's."""
        with contextlib.suppress(ProxyGone):
            self.send("Shutdown").add_done_callback(_discard)
        self._receiver.join(_SLICE)
        ended = not self._receiver.is_alive()
        with self._lock:
            self._shut()
        self._receiver.join()
        self._connection.close()
        return ended

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        """Body of the receiving thread: hand each reply to the oldest request."""
        try:
            while self._receive_one():
                pass
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            # Not the protocol: nothing after this can be trusted to belong to its request.
            pass
        finally:
            with self._lock:
                self._gone = True
                self._shut()
                while self._pending:
                    self._pending.popleft().set_exception(ProxyGone())

    def _receive_one(self) -> bool:
        data, fds, flags, _address = socket.recv_fds(
            self._connection, _MAX_MESSAGE, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
        )
        reply = Reply(None, 0, list(fds))
        try:
            if not data:
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError
            message = json.loads(data)
            reply.value, reply.pipe_id = message.get("value"), message.get("pipeid") or 0
            if not isinstance(reply.pipe_id, int):
                raise TypeError
            with self._lock:
                future = self._pending.popleft() if self._pending else None
            if future is None:
                raise ValueError
            self.alive()
            if message.get("success") is True:
                future.set_result(Reply(reply.value, reply.pipe_id, reply.fds))
                reply = Reply(None, 0)
            else:
                text, code = str(message.get("error") or ""), str(message.get("error_code") or "")
                future.set_exception(ProxyError(text, code))
            return True
        finally:
            reply.close()


class Pipe:
    """Data on its way through a pipe; a context manager that abandons what was not read.

    ``value`` is what the reply said beside it.
    """

    def __init__(self, proxy: ImageProxy, reply: Reply, size: int | None) -> None:
        self.value = reply.value
        self._proxy = proxy
        self._id = reply.pipe_id
        self._fd = reply.fds.pop()
        self._size = size
        self._finishing: Future[Reply] | None = None
        self._finished = False
        widen_pipe(self._fd, _CHUNK)

    def chunks(self) -> Iterator[bytes]:
        """The data as it comes, in pieces of up to 1 MiB; ends when the proxy confirmed that it was all.

        Raises ``ProxyError`` when it says otherwise, and ``Unavailable`` after too long a silence.
        """
        received = 0
        arrival = _Arrival(self._fd, self._proxy)
        while True:
            if self._finishing is None and (self._size is None or received >= self._size):
                self._finish()
            if not arrival.wait():
                if arrival.quiet >= _QUIET:
                    # A transfer that failed leaves the pipe open and silent: asking is the only way to learn
                    # of it.
                    self._finish()
                continue
            chunk = os.read(self._fd, _CHUNK)
            if not chunk:
                break
            received += len(chunk)
            arrival.received(len(chunk))
            yield chunk
        self._confirm()

    def read(self, limit: int, what: str) -> bytes:
        """All data; raises ``UnsupportedImage`` when there are more than ``limit`` bytes."""
        found = bytearray()
        for chunk in self.chunks():
            found += chunk
            if len(found) > limit:
                raise UnsupportedImage(f"{what} is larger than {limit} bytes")
        return bytes(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if not self._finished:
            # The proxy's writer ends now, having nobody to write to; it is told to forget the pipe, and what
            # it answers concerns nobody.
            with contextlib.suppress(ProxyGone):
                self._finish()
            if self._finishing is not None:
                self._finishing.add_done_callback(_discard)

    def _finish(self) -> None:
        if self._finishing is None:
            self._finishing = self._proxy.send("FinishPipe", self._id)

    def _confirm(self) -> None:
        if self._finishing is None:
            raise ProxyGone
        self._finished = True
        self._proxy.wait(self._finishing).close()


class _Arrival:
    """Waits for the data of a pipe, and counts the time that takes, without the reader's time with it."""

    def __init__(self, fd: int, proxy: ImageProxy) -> None:
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN | select.POLLHUP)
        self._proxy = proxy
        #: Seconds of waiting since the last byte.
        self.quiet = 0.0
        self._since_sign = self._since_asked = 0.0
        self._fresh = 0

    def wait(self) -> bool:
        """Wait half a second at most; says whether there is data, or its end.

        Raises ``Unavailable`` after too long a silence.
        """
        begin = time.monotonic()
        ready = bool(self._poller.poll(_SLICE * 1000))
        waited = time.monotonic() - begin
        self.quiet += waited
        self._since_sign += waited
        self._since_asked += waited
        if self._since_asked >= _SLICE:
            self._since_asked = 0.0
            self._proxy.waiting()
        if self._since_sign >= self._proxy.silence:
            raise Unavailable(f"no data came for {self._proxy.silence:.0f} s")
        return ready

    def received(self, count: int) -> None:
        """So many bytes came."""
        self.quiet = 0.0
        self._fresh += count
        if self._fresh >= _SIGN_OF_LIFE:
            self._fresh, self._since_sign = 0, 0.0
            self._proxy.alive()


def _settled(future: Future[Reply], seconds: float) -> bool:
    return bool(wait_for([future], seconds).done)


def _discard(future: Future[Reply]) -> None:
    """Nobody waits for this reply any more: close what came with it."""
    if future.exception() is None:
        future.result().close()
