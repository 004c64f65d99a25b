"""A call that returns a descriptor: every other one that comes is closed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from jeepney import HeaderFields, Message, MessageType, new_signal
from jeepney.low_level import Endianness, Header
from jeepney.wrappers import DBusAddress

from hostimage_dbus.descriptors import _PATIENCE, _Peer
from hostimage_dbus.framing import MAX_HEADER, ProtocolError
from hostimage_dbus.transport import BusError

SOMEBODY = DBusAddress("/x", ":1.9", "org.example.Test")


@pytest.fixture
def descriptors() -> Iterator[list[str]]:
    """Nothing is open afterwards that was not before."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield before
    assert sorted(os.listdir("/proc/self/fd")) == before


class Bus:
    """The bus's end of the connection."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self._socket = theirs
        self.peer = _Peer(ours)
        self._file = os.open("/dev/null", os.O_RDONLY)

    def send(self, message: Message, count: int = 0, *, declared: int | None = None) -> None:
        if count or declared:
            message.header.fields[HeaderFields.unix_fds] = count if declared is None else declared
        socket.send_fds(self._socket, [message.serialise(serial=9)], [self._file] * count)

    def raw(self, data: bytes, count: int = 0) -> None:
        socket.send_fds(self._socket, [data], [self._file] * count)

    def close(self) -> None:
        self.peer.close()
        os.close(self._file)


@pytest_asyncio.fixture
async def bus(descriptors: list[str]) -> AsyncIterator[Bus]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        made = Bus(ours, theirs)
        yield made
        made.close()


def reply(serial: int, kind: MessageType, signature: str, *body: Any) -> Message:
    fields: dict[HeaderFields, Any] = {HeaderFields.reply_serial: serial}
    if kind is MessageType.error:
        fields[HeaderFields.error_name] = "org.example.Error"
    if signature:
        fields[HeaderFields.signature] = signature
    return Message(Header(Endianness.little, kind, 0, 1, 0, 9, fields), body)


def hello() -> Message:
    return reply(1, MessageType.method_return, "s", ":1.5")


def answer(count: int = 1, *, signature: str = "h", serial: int = 2, index: int = 0) -> bytes:
    """The answer as bytes: other implementations put in the numbers themselves."""
    body = (index,) * len(signature)
    fields = {HeaderFields.reply_serial: serial, HeaderFields.signature: "u" * len(signature)}
    if count:
        fields[HeaderFields.unix_fds] = count
    message = Message(Header(Endianness.little, MessageType.method_return, 0, 1, 0, 9, fields), body)
    plain = message.serialise(serial=9)
    typed = b"\x01g\x00" + bytes([len(signature)])
    return plain.replace(typed + b"u" * len(signature), typed + signature.encode())


async def test_the_answer(bus: Bus) -> None:
    bus.send(hello())
    bus.raw(answer(), 1)
    found = await bus.peer.answer()
    assert os.readlink(f"/proc/self/fd/{found}") == "/dev/null"
    assert not os.get_inheritable(found)
    os.close(found)


async def test_what_others_send_is_closed(bus: Bus) -> None:
    bus.send(hello())
    for number in range(300):
        bus.send(new_signal(SOMEBODY, "Flood", "s", ("x" * number,)), 1 + number % 16)
        call = reply(2, MessageType.method_call, "")
        call.header.fields |= {HeaderFields.path: "/x", HeaderFields.member: "Take"}
        bus.send(call, 3)
        bus.send(reply(7, MessageType.error, "s", "no"), 2)
        if number % 10 == 0:
            await drain(bus)
    bus.send(new_signal(SOMEBODY, "Large", "s", ("x" * 100_000,)), 5)
    task = asyncio.create_task(bus.peer.answer())
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) < 40, "they are closed as they come"
    bus.raw(answer(), 1)
    os.close(await task)


async def drain(bus: Bus) -> None:
    """Let what was sent be taken in."""
    task = asyncio.create_task(bus.peer.answer())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_in_pieces(bus: Bus) -> None:
    signal = new_signal(SOMEBODY, "Slow")
    signal.header.fields[HeaderFields.unix_fds] = 2
    data = signal.serialise(serial=9) + answer()
    task = asyncio.create_task(bus.peer.answer())
    # Descriptors come with the first byte of their message, and that with the end of the one before.
    split = len(data) - len(answer())
    bus.raw(data[:20], 2)
    for byte in data[20:split]:
        bus.raw(bytes([byte]))
        await asyncio.sleep(0)
    bus.raw(data[split:], 1)
    os.close(await task)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (answer(0, signature="u"), 0),
        (answer(1, signature="u"), 1),
        (answer(2, signature="hh"), 2),
        (answer(2), 2),
        (answer(1, index=1), 1),
        (answer(1, index=0xFFFFFFFF), 1),
        (reply(2, MessageType.error, "s", "no").serialise(serial=9), 0),
        (answer(0), 0),
    ],
)
async def test_an_answer_that_is_none(bus: Bus, data: bytes, count: int) -> None:
    bus.raw(data, count)
    with pytest.raises(BusError):
        await bus.peer.answer()


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (answer(2), 1),
        (b"x" * 64, 3),
        (b"l\x04\x00\x01" + bytes(8) + b"\x03\x00\x00\x00" + b"\xff" * 8, 1),
        (reply(1, MessageType.error, "s", "no").serialise(serial=9), 0),
        (new_signal(DBusAddress("/" + "x" * MAX_HEADER, ":1.9", "a.b"), "X").serialise(serial=9), 4),
    ],
)
async def test_a_peer_that_cheats(bus: Bus, data: bytes, count: int) -> None:
    bus.raw(data, count)
    with pytest.raises(ProtocolError):
        await bus.peer.answer()


async def test_others_cannot_send_for_ever(bus: Bus) -> None:
    task = asyncio.create_task(bus.peer.answer())
    piece = new_signal(SOMEBODY, "Flood", "s", ("x" * 60_000,))
    for _ in range(_PATIENCE // 60_000 + 100):
        if task.done():
            break
        bus.send(piece, 1)
        await asyncio.sleep(0)
    with pytest.raises(ProtocolError, match="others send too much"):
        await task
