"""A registry on loopback that fails as it is told to; everything else it serves from an image layout.

Only what a pull asks for (distribution-spec 1.1, pull): the API's root, manifests by tag and digest, blobs,
ranges of blobs. Faults are planned for requests before they come, and each request is recorded.
"""

from __future__ import annotations

import contextlib
import enum
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from hostimage_testing.layout import MANIFEST_TYPE, Layout

_PIECE = 64 * 1024
_RANGE = re.compile(r"bytes=(\d+)-\Z")
_LINGER_RESET = struct.pack("ii", 1, 0)


class Then(enum.Enum):
    """What happens to the connection in the middle of an answer."""

    RESET = "reset"
    CLOSE = "close"
    STALL = "stall"
    TRICKLE = "trickle"
    ENDLESS = "endless"


@dataclass(frozen=True)
class Fault:
    """How a request is answered. By default rightly: change what is to be wrong.

    ``body`` stands in for the right one. ``declared`` is the length told, whatever is sent; -1 tells none.
    After ``after`` bytes of the body, ``then`` happens. ``silent``: not even a status line comes.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    declared: int | None = None
    after: int | None = None
    then: Then = Then.RESET
    silent: bool = False

    @classmethod
    def refusing(cls, status: int, code: str = "", **headers: str) -> Fault:
        """An error as registries answer it; ``code`` is the distribution-spec's."""
        errors = {"errors": [{"code": code, "message": code.lower().replace("_", " ")}]} if code else {}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        body = json.dumps(errors).encode() if errors else b""
        return cls(status=status, headers={"Content-Type": "application/json"} | names, body=body)


@dataclass(frozen=True)
class Request:
    """A request that came: ``start`` is the first byte it asked for."""

    method: str
    path: str
    start: int = 0


@dataclass
class _Plan:
    pattern: re.Pattern[str]
    fault: Fault
    left: int | None
    skip: int


class _Server(http.server.ThreadingHTTPServer):
    # The threads are joined when the server closes.
    daemon_threads = False
    registry: FaultyRegistry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up in the middle, and so do we."""


class FaultyRegistry:
    """Serves ``layout``; a context manager. ``host`` stays the same over ``stop`` and ``start``."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._plans: list[_Plan] = []
        self._port = 0
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._connections: set[socket.socket] = set()
        self._reached = threading.Condition()
        self._in_fault = 0
        self.stopping = threading.Event()

    # --- life ----------------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self._port}"

    @property
    def registries_conf(self) -> str:
        """Allows it over plain http."""
        return f'[[registry]]\nlocation = "{self.host}"\ninsecure = true\n'

    def start(self) -> None:
        """Listen."""
        self.stopping.clear()
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.registry = self
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="registry")
        self._thread.start()

    def stop(self) -> None:
        """Hang up on everybody and listen no more."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        self._server = None
        self.stopping.set()
        server.shutdown()
        thread.join()
        server.socket.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- faults --------------------------------------------------------------------------------------------

    def plan(self, pattern: str, fault: Fault, *, times: int | None = None, skip: int = 0) -> None:
        """Let requests whose path ``pattern`` (a regular expression) is found in meet ``fault``.

        The first ``skip`` of them are served, then ``times`` of them fail (None: all). Plans are asked in the
        order they were made.
        """
        with self._lock:
            self._plans.append(_Plan(re.compile(pattern), fault, times, skip))

    def heal(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._plans.clear()

    def await_fault(self, patience: float = 20.0) -> None:
        """Wait until a request stalls, trickles or is met with silence."""
        with self._reached:
            assert self._reached.wait_for(lambda: self._in_fault, patience), "no request met a fault"

    @property
    def in_trouble(self) -> bool:
        """Whether a request stalls, trickles or is met with silence now."""
        return self._in_fault > 0

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        """The requests so far whose path ``pattern`` is found in."""
        with self._lock:
            return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    # --- for the handler -----------------------------------------------------------------------------------

    def take(self, request: Request) -> Fault:
        """Record a request, and give what it meets."""
        with self._lock:
            self.requests.append(request)
            for plan in self._plans:
                if not plan.pattern.search(request.path):
                    continue
                if plan.skip:
                    plan.skip -= 1
                    continue
                if plan.left == 0:
                    continue
                if plan.left is not None:
                    plan.left -= 1
                return plan.fault
        return Fault()

    def connected(self, connection: socket.socket, *, there: bool) -> None:
        """A connection comes or goes."""
        with self._lock:
            (self._connections.add if there else self._connections.discard)(connection)

    @contextlib.contextmanager
    def in_fault(self) -> Iterator[None]:
        """Let ``await_fault`` know."""
        with self._reached:
            self._in_fault += 1
            self._reached.notify_all()
        try:
            yield
        finally:
            with self._reached:
                self._in_fault -= 1

    def content(self, path: str) -> tuple[bytes, str] | None:
        """What is rightly at ``path``, and its type."""
        if path == "/v2/":
            return b"{}", "application/json"
        kind, _, name = path.rpartition("/")
        descriptor = None
        if kind.endswith("/manifests"):
            key = "org.opencontainers.image.ref.name"
            entries = self.layout.manifests
            named = [e for e in entries if name in (e["digest"], e.get("annotations", {}).get(key))]
            descriptor = named[0]["digest"] if named else name
        elif kind.endswith("/blobs"):
            descriptor = name
        if descriptor is None or not self.layout.blob_path(descriptor).is_file():
            return None
        data = self.layout.blob_path(descriptor).read_bytes()
        if kind.endswith("/blobs"):
            return data, "application/octet-stream"
        media_type = json.loads(data).get("mediaType", MANIFEST_TYPE)
        return data, media_type


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.registry.connected(self.connection, there=True)

    def finish(self) -> None:
        self.server.registry.connected(self.connection, there=False)
        super().finish()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        registry = self.server.registry
        path = self.path.partition("?")[0]
        asked = _RANGE.match(self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        fault = registry.take(Request(self.command, path, start))
        if fault.silent:
            with registry.in_fault():
                registry.stopping.wait()
            self.close_connection = True
            return
        found = registry.content(path)
        status = 200 if found else 404
        body, media_type = found or (b'{"errors":[{"code":"NOT_FOUND"}]}', "application/json")
        if fault.body is not None:
            body = fault.body
        headers = {"Content-Type": media_type}
        if asked and status == 200 and fault.status is None:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        self._answer(fault, fault.status or status, headers | dict(fault.headers), body)

    def _answer(self, fault: Fault, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = len(body) if fault.declared is None else fault.declared
        if length >= 0:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
        self.close_connection = length != len(body) or fault.after is not None
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body if fault.after is None else body[: fault.after]
        self.wfile.write(sent)
        if fault.after is not None:
            self._break(fault.then, body[fault.after :])

    def _break(self, then: Then, rest: bytes) -> None:
        registry = self.server.registry
        match then:
            case Then.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                self.connection.close()
            case Then.STALL:
                with registry.in_fault():
                    registry.stopping.wait()
            case Then.TRICKLE:
                with registry.in_fault():
                    for at in range(len(rest)):
                        self.wfile.write(rest[at : at + 1])
                        if registry.stopping.wait(0.2):
                            break
            case Then.ENDLESS:
                while not registry.stopping.is_set():
                    self.wfile.write(bytes(_PIECE))

    def log_message(self, *_args: object) -> None:
        """Requests are recorded by the registry."""
