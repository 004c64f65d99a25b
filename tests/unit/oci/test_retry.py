"""Trying again: what, how often, with which pauses, and what comes out of transfers that broke off."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hostimaged.errors import (
    Cancelled,
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    NetworkError,
    RegistryAuth,
    Unavailable,
    UnsupportedImage,
)
from hostimaged.ids import SourceDigest
from hostimaged.oci.models import Descriptor
from hostimaged.oci.retry import PAUSING, RetryingSource
from hostimaged.oci.source import FetchedManifest, Patience
from hostimaged.progress import Silent

QUICK = Patience(pause=0.001)
DATA = bytes(range(256)) * 20_000
BLOB = Descriptor(mediaType="x", digest="sha256:" + hashlib.sha256(DATA).hexdigest(), size=len(DATA))
MANIFEST = FetchedManifest(b"{}", SourceDigest("sha256:" + "0" * 64))
BUSY = Unavailable("the registry is busy")


class Fake:
    """A source whose every call does the next step of the plan: some bytes, then an error or the end."""

    def __init__(self, peer: FakePeer) -> None:
        self.usable = True
        self.closed = False
        self.thread = threading.current_thread()
        self._peer = peer

    def manifest(self) -> FetchedManifest:
        self._peer.step()
        return MANIFEST

    def config(self, descriptor: Descriptor) -> bytes:
        self._peer.step()
        return b"config"

    def transfer(self, descriptor: Descriptor) -> Generator[bytes, None, None]:
        count, error = self._peer.next()
        for at in range(0, count, 100_000):
            yield self._peer.data[at : min(at + 100_000, count)]
        if error is not None:
            self.usable = self._peer.survives
            raise error

    def abandon(self) -> None:
        self.usable = False

    def close(self) -> None:
        self.closed = True


class FakePeer:
    def __init__(self, *plan: tuple[int, Exception | None] | Exception | None, survives: bool = True) -> None:
        self._plan = list(plan)
        self.opened: list[Fake] = []
        self.survives = survives
        self.data = DATA
        self.opening: list[Exception] = []

    def open(self) -> Fake:
        if self.opening:
            raise self.opening.pop(0)
        self.opened.append(Fake(self))
        return self.opened[-1]

    def next(self) -> tuple[int, Exception | None]:
        step = self._plan.pop(0) if self._plan else None
        if isinstance(step, tuple):
            return step
        return (0, step) if step else (len(self.data), None)

    def step(self) -> None:
        if (error := self.next()[1]) is not None:
            raise error

    @property
    def left(self) -> int:
        return len(self._plan)


class Listener(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def source(peer: FakePeer, patience: Patience = QUICK, reporter: Silent | None = None) -> RetryingSource:
    return RetryingSource(peer.open, reporter or Silent(), patience)


def fetched(opened: RetryingSource) -> bytes:
    with opened.blob(BLOB) as chunks:
        return b"".join(chunks)


Ask = Callable[[RetryingSource], object]
ASKS: dict[str, Ask] = {
    "manifest": lambda opened: opened.manifest(),
    "config": lambda opened: opened.config(BLOB),
    "blob": fetched,
}


@pytest.mark.parametrize("ask", ASKS)
def test_what_passes_is_tried_again_and_told(ask: str) -> None:
    peer, listener = FakePeer(BUSY, BUSY, BUSY), Listener()
    with source(peer, reporter=listener) as opened:
        expected = {"manifest": MANIFEST, "config": b"config", "blob": DATA}[ask]
        assert ASKS[ask](opened) == expected
    told = [f"the registry is busy; trying again in 0 s ({n} of 3)" for n in (1, 2, 3)]
    assert listener.messages == [*told, "the registry answers again"]
    assert len(peer.opened) == 1, "it is still good"
    assert peer.opened[0].closed


@pytest.mark.parametrize("ask", ASKS)
def test_patience_ends(ask: str) -> None:
    peer = FakePeer(*[BUSY] * 10)
    with source(peer) as opened, pytest.raises(Unavailable, match="busy"):
        ASKS[ask](opened)
    assert peer.left == 6


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(
    "error",
    [
        ImageNotFound("no"),
        RegistryAuth("no"),
        DigestMismatch(what="x", expected="a", actual="b"),
        UnsupportedImage("no"),
        NetworkError("x509: certificate signed by unknown authority"),
        Cancelled(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_rest_is_final(ask: str, error: HostimageError) -> None:
    peer, listener = FakePeer(error, None), Listener()
    with source(peer, reporter=listener) as opened, pytest.raises(type(error)):
        ASKS[ask](opened)
    assert peer.left == 1
    assert listener.messages == []


def test_opening_is_tried_again() -> None:
    peer = FakePeer()
    peer.opening = [BUSY, BUSY]
    with source(peer) as opened:
        assert opened.manifest() == MANIFEST
    peer.opening = [BUSY] * 4
    with pytest.raises(Unavailable):
        source(peer)
    peer.opening = [ImageNotFound("no"), BUSY]
    with pytest.raises(ImageNotFound):
        source(peer)
    assert len(peer.opening) == 1


@pytest.mark.parametrize("survives", [True, False])
def test_broken_transfers_add_up(survives: bool) -> None:
    """What came before is not passed on again, whether pieces begin where the last transfer ended or not."""
    peer = FakePeer((1_000_000, BUSY), (0, BUSY), (1_000_001, BUSY), (50_000, BUSY), survives=survives)
    with source(peer, Patience(pause=0.001, tries=5)) as opened, opened.blob(BLOB) as chunks:
        assert b"".join(chunks) == DATA
    assert len(peer.opened) == (1 if survives else 5)
    assert all(fake.closed for fake in peer.opened)


def test_headway_begins_the_count_anew() -> None:
    step = 2 << 20
    peer = FakePeer(*[BUSY] * 3, (step, BUSY), *[(step, BUSY)] * 2, (2 * step, BUSY), *[BUSY] * 2)
    with source(peer) as opened:
        assert fetched(opened) == DATA
    assert peer.left == 0
    peer = FakePeer(*[(100 * n, BUSY) for n in range(9)])
    with source(peer) as opened, pytest.raises(Unavailable):
        fetched(opened)
    assert peer.left == 5, "a few bytes are no headway"


def test_retries_of_a_pull_are_bounded() -> None:
    peer = FakePeer(*[BUSY, None] * 10)
    with source(peer, Patience(pause=0.001, retries=7)) as opened:
        for _ in range(7):
            opened.manifest()
        with pytest.raises(Unavailable):
            opened.manifest()


def test_parts_of_different_blobs_are_no_blob() -> None:
    """What is verified is what was passed on, from however many transfers it came."""
    peer = FakePeer((1_000_000, BUSY))

    class Swapping(Listener):
        def message(self, text: str) -> None:
            peer.data = DATA[:-1] + b"!"

    with source(peer, reporter=Swapping()) as opened, pytest.raises(DigestMismatch):
        fetched(opened)

    peer = FakePeer((1_000_000, BUSY))
    peer.data = b"!" + DATA[1:]

    class Repenting(Listener):
        def message(self, text: str) -> None:
            peer.data = DATA

    with source(peer, reporter=Repenting()) as opened, pytest.raises(DigestMismatch):
        fetched(opened)


def test_sizes_that_change() -> None:
    for second in (DATA[:500_000], DATA + b"more"):
        peer = FakePeer((1_000_000, BUSY))

        class Swapping(Listener):
            def message(self, text: str, peer: FakePeer = peer, second: bytes = second) -> None:
                peer.data = second

        with source(peer, reporter=Swapping()) as opened, pytest.raises(DigestMismatch):
            fetched(opened)


def test_all_bytes_there_is_enough() -> None:
    """An end that nobody confirmed does not matter: the digest does."""
    peer = FakePeer((len(DATA), BUSY))
    with source(peer) as opened:
        assert fetched(opened) == DATA
    peer = FakePeer((len(DATA), BUSY))
    peer.data = DATA[:-1] + b"!"
    with source(peer) as opened, pytest.raises(DigestMismatch):
        fetched(opened)


def test_pauses_grow_and_can_be_cancelled() -> None:
    class Waiting(Listener):
        points = 0

        def at(self, point: str) -> None:
            assert point == PAUSING
            self.points += 1
            if self.points == 3:
                raise Cancelled

    peer, listener = FakePeer(*[BUSY] * 4), Waiting()
    begin = time.monotonic()
    with source(peer, Patience(pause=100), listener) as opened, pytest.raises(Cancelled):
        opened.manifest()
    assert 0.3 < time.monotonic() - begin < 10
    seconds = int(listener.messages[0].split(" s (")[0].rpartition(" ")[2])
    assert 50 <= seconds <= 150

    peer, listener = FakePeer(*[BUSY] * 4), Waiting()
    listener.points = -100_000
    begin = time.monotonic()
    with source(peer, Patience(pause=0.1, growth=3), listener) as opened, pytest.raises(Unavailable):
        opened.manifest()
    assert 1.3 / 2 <= time.monotonic() - begin < 10


def test_threads_share_the_source_that_replaces_a_dead_one() -> None:
    """One of many opens it, in a thread that outlives them: helper processes die with theirs."""
    peer = FakePeer(*[(1000, BUSY)] * 4, survives=False)
    with source(peer, Patience(pause=0.05, tries=9)) as opened:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: fetched(opened), range(4)))
        assert found == [DATA] * 4
        assert 2 <= len(peer.opened) <= 5
        assert len({fake.thread for fake in peer.opened}) == 1
        assert peer.opened[0].thread.is_alive()
    assert not peer.opened[0].thread.is_alive()


def test_leaving_a_blob_early_leaves_nothing_behind() -> None:
    peer = FakePeer()
    with source(peer) as opened, opened.blob(BLOB) as chunks:
        assert next(iter(chunks))
