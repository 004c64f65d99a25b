"""A method call whose answer is a file descriptor, over a connection of its own.

Whoever knows the unique name of a connection that takes descriptors can send it some, even as signals, and
each counts against the limit of the process. So the service's own connection takes none. This one has no
other name, lives for one call, and every descriptor that comes is closed unless it is in the answer.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.framing import (
    MAX_AUTH_LINE,
    Field,
    Frame,
    Framer,
    Kind,
    Limits,
    ProtocolError,
    auth_answer,
    auth_request,
    header_fields,
    parse_address,
)
from hostimage_dbus.transport import BUS, BUS_PATH, SYSTEM_BUS, BusClosed, BusError, encode_call

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Descriptors that the kernel passes at once (SCM_MAX_FD).
_MAX_AT_ONCE: Final = 253
#: Nothing that is wanted here is longer; longer bodies are skipped.
_LIMITS: Final = Limits(call=4096, signal=4096, reply=4096)
_PIECE: Final = 64 << 10
#: Bytes that may come before the answer: others may send, but not for ever.
_PATIENCE: Final = 16 << 20
_HELLO, _CALL = 1, 2


async def call_for_descriptor(
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: Sequence[Any] = (),
    *,
    address: str | None = None,
    timeout: float,  # noqa: ASYNC109 (part of the protocol: no call without a limit)
) -> int:
    """Call a method that returns one file descriptor, and return that; the caller closes it.

    Without ``address``: as ``Connection.connect``. Raises ``BusError`` for an error answer, none within
    ``timeout`` seconds, or one of another form; ``BusClosed`` if there is no connection.
    """
    message = encode_call(_CALL, destination, path, interface, member, signature, body)
    try:
        names = parse_address(address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS)
    except ValueError as error:
        raise BusClosed(str(error)) from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        peer = _Peer(sock)
        try:
            async with asyncio.timeout(timeout):
                await _connect(sock, names)
                await peer.authenticate()
                hello = encode_call(_HELLO, BUS, BUS_PATH, BUS, "Hello", "", ())
                await asyncio.get_running_loop().sock_sendall(sock, hello + message)
                return await peer.answer()
        except TimeoutError:
            raise BusError(ErrorName.TIMEOUT, f"{destination} did not answer within {timeout:g} s") from None
        except ProtocolError as error:
            raise BusClosed(str(error)) from None
        except OSError as error:
            raise BusClosed(f"the connection to the bus is lost: {error.strerror}") from None
        finally:
            peer.close()


async def _connect(sock: socket.socket, names: Sequence[str]) -> None:
    connect = asyncio.get_running_loop().sock_connect
    for name in names[:-1]:
        with suppress(OSError):
            await connect(sock, name)
            return
    await connect(sock, names[-1])


class _Peer:
    """What comes in on ``sock``. Descriptors belong to messages in the order in which both come."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._framer = Framer(_LIMITS)
        self._descriptors: deque[int] = deque()

    def close(self) -> None:
        """Close every descriptor that nobody got."""
        while self._descriptors:
            os.close(self._descriptors.popleft())

    async def authenticate(self) -> None:
        send = asyncio.get_running_loop().sock_sendall
        await send(self._socket, auth_request(os.geteuid()))
        received = bytearray()
        answer = b""
        while answer != b"BEGIN\r\n":
            while b"\r\n" not in received:
                if len(received) > MAX_AUTH_LINE:
                    raise ProtocolError("the bus does not speak D-Bus")
                received += await self._receive()
            line, _, received = received.partition(b"\r\n")
            answer = auth_answer(bytes(line), descriptors=True)
            await send(self._socket, answer)
        self._framer.feed(bytes(received))

    async def answer(self) -> int:
        """Wait for the answer to the call; the descriptor in it."""
        received = 0
        while True:
            while (frame := self._framer.next()) is not None:
                if (found := self._take(frame)) is not None:
                    return found
            if self._framer.unseen or received > _PATIENCE:
                raise ProtocolError("others send too much")
            piece = await self._receive()
            received += len(piece)
            self._framer.feed(piece)

    def _take(self, frame: Frame) -> int | None:
        """The descriptor if the message is the answer; those of any other message are closed."""
        fields = header_fields(frame.data)
        count = fields.get(Field.UNIX_FDS, 0)
        if not isinstance(count, int) or count > len(self._descriptors):
            raise ProtocolError("descriptors are missing")
        own = [self._descriptors.popleft() for _ in range(count)]
        wanted = fields.get(Field.REPLY_SERIAL) == _CALL and frame.kind in (Kind.METHOD_RETURN, Kind.ERROR)
        good = wanted and frame.kind == Kind.METHOD_RETURN and fields.get(Field.SIGNATURE) == "h"
        kept = own.pop(0) if good and len(own) == 1 and _body(frame) == 0 else None
        for descriptor in own:
            os.close(descriptor)
        if wanted and kept is None:
            name = fields.get(Field.ERROR_NAME, ErrorName.INVALID_ARGS)
            raise BusError(str(name), "no descriptor was given")
        if fields.get(Field.REPLY_SERIAL) == _HELLO and frame.kind == Kind.ERROR:
            raise ProtocolError("the bus refused the connection")
        return kept

    async def _receive(self) -> bytes:
        """More bytes; their descriptors are queued."""
        size = socket.CMSG_SPACE(_MAX_AT_ONCE * array.array("i").itemsize)
        while True:
            try:
                data, control, flags, _ = self._socket.recvmsg(_PIECE, size, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await _readable(self._socket)
        for level, kind, content in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                got = array.array("i")
                got.frombytes(content[: len(content) - len(content) % got.itemsize])
                self._descriptors.extend(got)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost")
        if not data:
            raise ProtocolError("the bus closed the connection")
        return data


def _body(frame: Frame) -> int:
    """The number that is the body of a message with the signature u or h."""
    order = "<" if frame.data[0] == ord("l") else ">"
    return int(struct.unpack_from(order + "I", frame.data, len(frame.data) - 4)[0])


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
