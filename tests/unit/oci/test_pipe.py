"""The queue between the two threads of an import: order, bounds, both ways of ending."""

from __future__ import annotations

import threading

import pytest

from hostimaged.oci.pipe import Pipe


def test_buffers_come_in_order_then_the_end() -> None:
    pipe = Pipe(100)
    for piece in (b"a", memoryview(b"b"), bytearray(b"c")):
        assert pipe.put(piece)
    pipe.end()
    assert [pipe.get() for _ in range(3)] == [b"a", b"b", b"c"]
    assert pipe.get() is None
    assert pipe.get() is None


def test_the_error_comes_after_the_data_and_stays() -> None:
    pipe = Pipe(100)
    pipe.put(b"a")
    pipe.end(KeyError("x"))
    assert pipe.get() == b"a"
    for _ in range(2):
        with pytest.raises(KeyError):
            pipe.get()


def test_the_writer_waits_for_room() -> None:
    pipe = Pipe(10)
    held: list[int] = []

    def write() -> None:
        for _ in range(50):
            assert pipe.put(b"12345")
            held.append(pipe._held)
        pipe.end()

    writer = threading.Thread(target=write)
    writer.start()
    received = 0
    while (piece := pipe.get()) is not None:
        received += len(piece)
    writer.join()
    assert received == 250
    assert max(held) <= 14


def test_a_buffer_larger_than_the_capacity_passes() -> None:
    pipe = Pipe(10)
    assert pipe.put(bytes(1000))
    assert len(pipe.get() or b"") == 1000


def test_a_waiting_writer_is_told_that_the_reader_went() -> None:
    pipe = Pipe(1)
    results: list[bool] = []
    pipe.put(b"full")
    writer = threading.Thread(target=lambda: results.append(pipe.put(b"more")))
    writer.start()
    pipe.abandon()
    writer.join(10)
    assert results == [False]
    assert not pipe.put(b"again")
