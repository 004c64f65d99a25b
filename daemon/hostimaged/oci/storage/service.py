"""podman's API for one request: a pull that tells its bytes (podman 5.9 and later).

Facts: podman's API reference (libpod, images/pull) and bootc. The answer is a JSON object a line: ``stream``,
a line for people; ``pullProgress`` with ``status`` (pulling, success, skipped), ``current``, ``total`` and
``progressComponentID``; ``error``; at the end ``id``.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import socket
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, Final, Self

from hostimaged.errors import StorageError
from hostimaged.oci.storage.podman import LifeSigns, private_file, tail
from hostimaged.system.process import stop

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.podman import Podman
    from hostimaged.oci.storage.transfer import Count

#: Seconds that the service may take to listen (bootc).
STARTING: Final = 90.0
#: Bytes of a line of the answer: one event, or the ids of an image.
MAX_LINE: Final = 1 << 20
_SOCKET: Final = "podman-api.sock"
_PULL: Final = "/v5.0.0/libpod/images/pull"
_SLICE: Final = 0.1
_PATIENCE: Final = 5.0
_DONE: Final = frozenset({"success", "skipped"})
#: Lines that may wait: podman is not to run ahead without end.
_WAITING: Final = 1000


def pull(podman: Podman, name: str, reference: ImageReference, count: Count) -> str:
    """Have podman pull ``name``, which is ``reference``; gives the id of the image.

    Raises as ``Podman.run`` does with a reference.
    """
    with private_file(podman.work_dir) as out, private_file(podman.work_dir) as log:
        # From its directory the path of the socket is short enough.
        service = podman.start(
            ["system", "service", "--time=0", f"unix://{podman.shared_place / _SOCKET}"],
            stdout=out,
            stderr=log,
        )
        try:
            connection = _connected(podman, service)
            with _Answer(connection, name) as answer:
                image_id = _follow(podman, service, answer, count)
        except _Failed as failed:
            raise podman.failure(str(failed) or tail(log) or "podman ended unexpectedly", reference) from None
        finally:
            stop(service, _PATIENCE)
    return image_id


class _Failed(Exception):
    """podman says so; without a text it ended."""


def _connected(podman: Podman, service: subprocess.Popen[bytes]) -> socket.socket:
    """A connection to the service, once it listens."""
    directory = os.open(podman.work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + STARTING
    try:
        while True:
            podman.check()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{_SOCKET}")
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
            else:
                return sock
            if service.poll() is not None:
                raise _Failed
            if time.monotonic() > deadline:
                raise StorageError("podman's service did not start")
            time.sleep(_SLICE)
    finally:
        os.close(directory)


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket that is connected."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__("podman")
        self.sock = sock


class _Answer:
    """The lines of the answer, read by a thread: nobody who waits for one could be told to stop."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._ended = threading.Event()
        query = urllib.parse.urlencode({"reference": name, "pullProgress": "true", "policy": "always"})
        self._thread = threading.Thread(target=self._read, args=(f"{_PULL}?{query}",), name="podman-api")
        self._thread.start()

    def _read(self, path: str) -> None:
        connection = _Connection(self._sock)
        try:
            connection.request("POST", path)
            with connection.getresponse() as response:
                while (line := response.readline(MAX_LINE + 1)) and self._put(line):
                    pass
        except (OSError, http.client.HTTPException):
            # podman ended, or was ended.
            pass
        finally:
            self._put(None)

    def _put(self, line: bytes | None) -> bool:
        while not self._ended.is_set():
            try:
                self._lines.put(line, timeout=_SLICE)
            except queue.Full:
                continue
            return True
        return False

    def take(self) -> bytes | None:
        """The next line; None after the last. Raises ``queue.Empty`` if it does not come soon."""
        return self._lines.get(timeout=_SLICE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # Who reads gets an end.
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()


def _follow(podman: Podman, service: subprocess.Popen[bytes], answer: _Answer, count: Count) -> str:
    image_id = ""
    for event in _events(podman, service, answer):
        if isinstance(error := event.get("error") or event.get("cause"), str):
            message = event.get("message")
            raise _Failed(message if isinstance(message, str) and message else error)
        if isinstance(line := event.get("stream"), str):
            count.line(line)
        if isinstance(progress := event.get("pullProgress"), dict):
            _advance(progress, count)
        if isinstance(found := event.get("id"), str) and found:
            image_id = found
    if not image_id:
        raise _Failed
    return image_id


def _advance(progress: dict[str, Any], count: Count) -> None:
    digest, current = progress.get("progressComponentID"), progress.get("current")
    if isinstance(digest, str):
        known = current if isinstance(current, int) else 0
        count.component(digest, known, whole=progress.get("status") in _DONE)


def _events(podman: Podman, service: subprocess.Popen[bytes], answer: _Answer) -> Iterator[dict[str, Any]]:
    life = LifeSigns(service.pid)
    while True:
        podman.check()
        life.require()
        try:
            line = answer.take()
        except queue.Empty:
            continue
        if line is None:
            return
        if len(line) > MAX_LINE:
            raise StorageError(f"podman's service wrote a line of more than {MAX_LINE} bytes")
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            raise StorageError("podman's service wrote something that is no JSON") from None
        if isinstance(event, dict):
            yield event
