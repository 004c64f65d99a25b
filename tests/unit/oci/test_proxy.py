"""The image proxy's protocol, against a peer that can do what a real one does rarely."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hostimaged.errors import Cancelled, Unavailable, UnsupportedImage
from hostimaged.oci.proxy import ImageProxy, ProxyError, ProxyGone

Handler = Callable[[dict[str, Any]], None]


class Peer:
    """The other side of the socket pair: runs ``handle`` for each request, in a thread of its own."""

    def __init__(self, connection: socket.socket, handle: Callable[[Peer, dict[str, Any]], None]) -> None:
        self.connection = connection
        self.requests: list[dict[str, Any]] = []
        self.writers: dict[int, int] = {}
        self._handle = handle
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while packet := self.connection.recv(1 << 16):
                request = json.loads(packet)
                self.requests.append(request)
                if request["method"] == "Shutdown":
                    break
                self._handle(self, request)
        self.connection.close()
        for writer in self.writers.values():
            os.close(writer)

    def reply(self, value: Any = None, *, error: str = "", pipe: bool = False) -> int:
        """Answer the request; with ``pipe``, give a pipe and return our end."""
        message: dict[str, Any] = {"success": not error, "value": value, "pipeid": 0, "error": error}
        if not pipe:
            self.connection.send(json.dumps(message).encode())
            return -1
        reader, writer = os.pipe()
        self.writers[writer] = writer
        message["pipeid"] = writer
        socket.send_fds(self.connection, [json.dumps(message).encode()], [reader])
        os.close(reader)
        return writer

    def finish(self, pipe_id: int) -> None:
        os.close(self.writers.pop(pipe_id))

    def join(self) -> None:
        self._thread.join(10)


@contextlib.contextmanager
def proxy_to(
    handle: Callable[[Peer, dict[str, Any]], None],
    waiting: Callable[[], None] = lambda: None,
    silence: float = 20,
) -> Iterator[tuple[ImageProxy, Peer]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(theirs, handle)
    proxy = ImageProxy(ours, waiting, silence=silence)
    try:
        yield proxy, peer
    finally:
        proxy.close()
        peer.join()


def serve(data: bytes, finish_error: str = "") -> Callable[[Peer, dict[str, Any]], None]:
    """A peer that sends ``data`` through pipes as the real one does: the end only comes with FinishPipe."""

    def handle(peer: Peer, request: dict[str, Any]) -> None:
        if request["method"] != "FinishPipe":
            writer = peer.reply("value", pipe=True)
            os.write(writer, data)
            return
        peer.finish(request["args"][0])
        peer.reply(error=finish_error)

    return handle


def test_calls_and_errors() -> None:
    def handle(peer: Peer, request: dict[str, Any]) -> None:
        if request["args"]:
            peer.reply(error="it is broken")
        else:
            peer.reply("0.2.3")

    with proxy_to(handle) as (proxy, _):
        assert proxy.call("Initialize").value == "0.2.3"
        with pytest.raises(ProxyError) as caught:
            proxy.call("OpenImage", "docker://x")
        assert caught.value.text == "it is broken"


@pytest.mark.parametrize("size", [5, None])
def test_pipe(size: int | None) -> None:
    with proxy_to(serve(b"hello")) as (proxy, peer):
        with proxy.open_pipe("GetBlob", 1, size=size) as pipe:
            assert pipe.value == "value"
            assert pipe.read(10, "thing") == b"hello"
        assert [r["method"] for r in peer.requests] == ["GetBlob", "FinishPipe"]


def test_short_data_is_noticed_by_asking() -> None:
    """The peer has less than was announced, and says nothing until it is asked."""
    with (
        proxy_to(serve(b"hello", "expected 9 bytes in blob, got 5")) as (proxy, _),
        proxy.open_pipe("GetBlob", size=9) as pipe,
        pytest.raises(ProxyError, match="expected 9 bytes"),
    ):
        pipe.read(10, "thing")


def test_pipe_over_the_limit_is_abandoned() -> None:
    with proxy_to(serve(b"hello")) as (proxy, peer):
        with (
            proxy.open_pipe("GetManifest", size=None) as pipe,
            pytest.raises(UnsupportedImage, match="larger"),
        ):
            pipe.read(4, "thing")
        # The proxy serves on.
        with proxy.open_pipe("GetManifest", size=None) as pipe:
            assert pipe.read(5, "thing") == b"hello"
    assert [r["method"] for r in peer.requests].count("FinishPipe") == 2


def test_one_slow_pipe_does_not_hold_up_another() -> None:
    """While a blob is on its way, no FinishPipe for it keeps the peer from serving the next request."""
    with proxy_to(serve(b"hello")) as (proxy, peer), proxy.open_pipe("GetBlob", "slow", size=6) as slow:
        chunks = slow.chunks()
        assert next(chunks) == b"hello"
        with proxy.open_pipe("GetBlob", "quick", size=5) as quick:
            assert quick.read(5, "thing") == b"hello"
        os.write(min(peer.writers), b"!")
        assert b"".join(chunks) == b"!"


def test_many_threads() -> None:
    found: list[bytes] = []

    def fetch(proxy: ImageProxy) -> None:
        for _ in range(20):
            with proxy.open_pipe("GetBlob", size=5) as pipe:
                found.append(pipe.read(5, "thing"))

    with proxy_to(serve(b"hello")) as (proxy, _):
        threads = [threading.Thread(target=fetch, args=(proxy,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [b"hello"] * 160


def test_silence_ends_waiting() -> None:
    with proxy_to(lambda _peer, _request: None, silence=0.6) as (proxy, _):
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer"):
            proxy.call("OpenImage")
        assert time.monotonic() - begin < 10
    with (
        proxy_to(serve(b"hello", "late"), silence=0.6) as (proxy, peer),
        proxy.open_pipe("GetBlob", size=9) as pipe,
    ):
        peer._handle = lambda _peer, _request: None
        with pytest.raises(Unavailable, match="no data"):
            pipe.read(9, "thing")


def test_a_reply_is_waited_for_while_another_pipe_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer may have to see the end of one transfer before it serves the next request."""
    monkeypatch.setattr("hostimaged.oci.proxy._SIGN_OF_LIFE", 1)

    def handle(peer: Peer, request: dict[str, Any]) -> None:
        if request["method"] != "GetBlob":
            peer.reply("value")
            return
        writer = peer.reply(pipe=True)
        for _ in range(8):
            time.sleep(0.2)
            os.write(writer, b"x")

    with (
        proxy_to(handle, silence=1) as (proxy, peer),
        proxy.open_pipe("GetBlob", size=8) as pipe,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(proxy.call, "OpenImage")
        chunks = pipe.chunks()
        assert b"".join(next(chunks) for _ in range(8)) == b"x" * 8
        assert waiting.result(5).value == "value"
        peer.finish(min(peer.writers))
        assert list(chunks) == []


def test_a_trickle_is_silence() -> None:
    """A byte now and then keeps nobody waiting for ever, and can be cancelled."""

    def handle(peer: Peer, request: dict[str, Any]) -> None:
        if request["method"] == "GetBlob":
            writer = peer.reply(pipe=True)
            with contextlib.suppress(OSError):
                while True:
                    os.write(writer, b"x")
                    time.sleep(0.05)
        else:
            peer.reply()

    def cancel() -> None:
        raise Cancelled

    for waiting, silence, error in ((lambda: None, 1.0, Unavailable), (cancel, 60.0, Cancelled)):
        with (
            proxy_to(handle, waiting, silence) as (proxy, _),
            proxy.open_pipe("GetBlob", size=1 << 40) as pipe,
        ):
            begin = time.monotonic()
            with pytest.raises(error):
                pipe.read(1 << 20, "thing")
            assert time.monotonic() - begin < 10


def test_waiting_can_be_cancelled() -> None:
    def cancel() -> None:
        raise Cancelled

    with proxy_to(lambda _peer, _request: None, cancel) as (proxy, _), pytest.raises(Cancelled):
        proxy.call("OpenImage")


def test_late_reply_leaks_nothing() -> None:
    """A pipe that comes after its request was given up is closed (the fixture looks for leaks)."""
    ready = threading.Event()

    def handle(peer: Peer, request: dict[str, Any]) -> None:
        if request["method"] == "GetBlob":
            ready.wait(10)
            peer.reply(pipe=True)
        else:
            peer.reply("pong")

    def cancel() -> None:
        if not ready.is_set():
            raise Cancelled

    with proxy_to(handle, cancel) as (proxy, _):
        with pytest.raises(Cancelled):
            proxy.call("GetBlob")
        ready.set()
        assert proxy.call("Ping").value == "pong"


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b"null",
        b'{"success": true, "pipeid": "x"}',
        b'{"success": true, "pipeid": 1e999}',
        b"\xff",
        b"[" * 60_000,
        b"x" * 70_000,
    ],
)
def test_nonsense_from_the_peer(packet: bytes) -> None:
    with proxy_to(lambda peer, _request: peer.connection.send(packet) and None) as (proxy, _):
        with pytest.raises(ProxyGone):
            proxy.call("Initialize")
        with pytest.raises(ProxyGone):
            proxy.call("Initialize")


def test_reply_nobody_asked_for() -> None:
    def twice(peer: Peer, _request: dict[str, Any]) -> None:
        peer.reply(1)
        peer.reply(2)

    with proxy_to(twice) as (proxy, _):
        assert proxy.call("Initialize").value == 1
        proxy._receiver.join(10)
        with pytest.raises(ProxyGone):
            proxy.call("Initialize")


def test_peer_that_hangs_up() -> None:
    with proxy_to(lambda peer, _request: peer.connection.shutdown(socket.SHUT_RDWR)) as (proxy, _):
        with pytest.raises(ProxyGone):
            proxy.call("Initialize")
        with pytest.raises(ProxyGone):
            proxy.send("Initialize")


def test_pipe_without_a_descriptor() -> None:
    with proxy_to(lambda peer, _request: peer.reply("x") and None) as (proxy, _), pytest.raises(ProxyGone):
        proxy.open_pipe("GetBlob", size=3)


def test_closing_twice_is_over_at_once() -> None:
    with proxy_to(lambda peer, _request: peer.reply("x") and None) as (proxy, _):
        assert proxy.call("Initialize").value == "x"


def test_descriptors_in_a_reply_that_nobody_reads_are_closed() -> None:
    """As of every test: none is left behind."""

    def handle(peer: Peer, request: dict[str, Any]) -> None:
        # A pipe comes with the answer to FinishPipe as well.
        peer.reply("value", pipe=True)

    with proxy_to(handle) as (proxy, peer):
        with proxy.open_pipe("GetManifest", size=None):
            pass
        proxy.call("Initialize").close()
    assert [r["method"] for r in peer.requests] == ["GetManifest", "FinishPipe", "Initialize", "Shutdown"]
