"""One connection to a message bus. The only module that imports the D-Bus library.

The library (dbus-next, or its fork dbus-fast where that no longer imports) marshals messages and nothing
else; its connection class is not used, because it cannot be repaired from outside where a service
exposed to unprivileged users needs it:

* it drops the connection when the socket is full. Here asyncio's transport queues; progress signals are
  dropped when the queue grows, replies never; a bus that takes nothing for 64 MiB is given up.
* one message that it cannot parse ends the connection. Here messages are framed first: a bad one is
  ignored alone.
* it unmarshals whatever comes. Here a body over the limit (``Limits``) is skipped unread, and a burst of
  messages is handled in slices, so that the loop stays free.
* it leaks file descriptors sent to it. Here they are not negotiated, and the bus refuses to deliver them.
* its calls hang when the bus dies, its cache of signatures grows for ever, its own answers show
  tracebacks.

HOSTIMAGE_DBUS_LIBRARY=dbus-fast chooses the fork anywhere; the tests run with both.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.framing import (
    MAX_AUTH_LINE,
    Frame,
    Framer,
    Kind,
    Limits,
    ProtocolError,
    auth_answer,
    auth_request,
    parse_address,
)

if sys.version_info >= (3, 15) or os.environ.get("HOSTIMAGE_DBUS_LIBRARY") == "dbus-fast":
    from dbus_fast import Message, MessageFlag, MessageType, Variant
    from dbus_fast._private.unmarshaller import Unmarshaller

    _SIGNATURES: dict[str, object] = {}  # dbus-fast bounds its cache itself
else:
    try:
        from dbus_next import Message, MessageFlag, MessageType, Variant
        from dbus_next._private.unmarshaller import Unmarshaller
        from dbus_next.signature import SignatureTree

        _SIGNATURES = SignatureTree._cache  # noqa: SLF001 (it has no other handle)
    except ImportError:
        from dbus_fast import Message, MessageFlag, MessageType, Variant
        from dbus_fast._private.unmarshaller import Unmarshaller

        _SIGNATURES = {}

__all__ = ["BusClosed", "BusError", "Connection", "Limits", "MethodCall", "SignalCallback", "Variant"]

BUS: Final = "org.freedesktop.DBus"
BUS_PATH: Final = "/org/freedesktop/DBus"
SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket;unix:path=/var/run/dbus/system_bus_socket"

#: Seconds for the whole of connecting, and the default for one call.
CALL_TIMEOUT: Final = 25.0
#: Messages are handled for this long before other callbacks of the loop get a turn.
_SLICE: Final = 0.01
#: Reading pauses while more than this is waiting to be handled.
_READ_AHEAD: Final = 1 << 20
#: From here on the connection counts as congested, and droppable signals are dropped.
_CONGESTED: Final = 256 << 10
#: A bus that leaves this much unread does not live any more.
_WRITE_LIMIT: Final = 64 << 20
#: Method calls that may wait until a handler is set.
_EARLY_CALLS: Final = 256
#: The library keeps every signature it ever saw, and callers choose signatures.
_SIGNATURE_CACHE: Final = 4096
_CLOSE_TIMEOUT: Final = 2.0

_logger = logging.getLogger("hostimage_dbus")

SignalCallback = Callable[[str, str, str, list[Any], str], None]


class BusError(Exception):
    """A D-Bus error: ``name`` is the error name, ``message`` the text for people."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, message)
        self.name = name
        self.message = message

    def __str__(self) -> str:
        return self.message


class BusClosed(BusError):
    """There is no connection to the bus: it cannot be reached, or it was lost."""

    def __init__(self, message: str) -> None:
        super().__init__("org.freedesktop.DBus.Error.Disconnected", message)


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A method call that was received.

    ``interactive``: the caller allows that somebody is asked (ALLOW_INTERACTIVE_AUTHORIZATION).
    ``oversize``: the body was over the limit; ``body`` is empty then.
    """

    path: str
    interface: str | None
    member: str
    signature: str
    body: list[Any]
    sender: str
    serial: int
    no_reply: bool
    interactive: bool
    oversize: bool


class Connection(asyncio.Protocol):
    """A connection to a bus; made by ``connect``. Not safe for use from other threads than the loop's."""

    def __init__(self, limits: Limits) -> None:
        self.unique_name = ""
        self._limits = limits
        self._framer = Framer(limits)
        self._auth = bytearray()
        self._transport: asyncio.Transport | None = None
        self._authenticated: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()
        self._reason: BusClosed | None = None
        self._serial = 0
        self._pending: dict[int, asyncio.Future[list[Any]]] = {}
        self._signal_callbacks: list[SignalCallback] = []
        self._handler: Callable[[MethodCall], None] | None = None
        self._early: deque[MethodCall] = deque()
        self._scheduled = False
        self._congested = False

    @classmethod
    async def connect(cls, address: str | None = None, *, limits: Limits | None = None) -> Self:
        """Connect to the bus at ``address`` and say hello.

        Without ``address``: DBUS_SYSTEM_BUS_ADDRESS, else the system bus. Raises ``BusClosed``.
        """
        address = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS
        try:
            names = parse_address(address)
        except ValueError as error:
            raise BusClosed(str(error)) from None
        connection = cls(limits or Limits())
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                await connection._open(names)
                await connection._authenticated
                reply = await connection.call(BUS, BUS_PATH, BUS, "Hello")
        except TimeoutError:
            connection._abort("the bus did not answer in time")
            raise BusClosed("the bus did not answer in time") from None
        except BaseException:
            connection._abort("connecting failed")
            raise
        connection.unique_name = reply[0]
        return connection

    async def _open(self, names: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        for name in names:
            try:
                await loop.create_unix_connection(lambda: self, name)
                return
            except OSError as error:
                failure = failure or error
        reason = failure.strerror if failure else "no address"
        raise BusClosed(f"cannot connect to the bus: {reason}")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the authentication (called by asyncio)."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_CONGESTED)
        transport.write(auth_request(os.geteuid()))

    def data_received(self, data: bytes) -> None:
        """Take in bytes from the bus (called by asyncio)."""
        if not self._authenticated.done():
            self._authenticate(data)
            return
        self._framer.feed(data)
        if not self._scheduled:
            self._process()

    def eof_received(self) -> None:
        """The bus closed the connection (called by asyncio)."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits (called by asyncio)."""
        detail = getattr(exc, "strerror", None) or "the bus closed it"
        self._reason = self._reason or BusClosed(f"the connection to the bus is lost: {detail}")
        if not self._authenticated.done():
            self._authenticated.set_exception(self._reason)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._reason)
        self._pending.clear()
        self._early.clear()
        self._closed.set()

    def pause_writing(self) -> None:
        """The outgoing queue is long (called by asyncio)."""
        self._congested = True

    def resume_writing(self) -> None:
        """The outgoing queue is short again (called by asyncio)."""
        self._congested = False

    def _authenticate(self, data: bytes) -> None:
        assert self._transport is not None
        self._auth += data
        line, end, rest = bytes(self._auth).partition(b"\r\n")
        if not end:
            if len(self._auth) > MAX_AUTH_LINE:
                self._abort("the bus does not speak D-Bus")
            return
        try:
            self._transport.write(auth_answer(line))
        except ProtocolError as error:
            self._abort(str(error))
            return
        self._framer.feed(rest)
        self._authenticated.set_result(None)

    # incoming messages

    def _process(self) -> None:
        """Handle what is waiting, in slices of the loop's time."""
        self._scheduled = False
        if self._closed.is_set() or self._transport is None:
            return
        end = time.monotonic() + _SLICE
        try:
            while (frame := self._framer.next()) is not None:
                self._receive(frame)
                if time.monotonic() > end:
                    self._scheduled = True
                    asyncio.get_running_loop().call_soon(self._process)
                    break
        except ProtocolError as error:
            self._abort(str(error))
            return
        if self._framer.backlog > _READ_AHEAD and self._scheduled:
            self._transport.pause_reading()
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _receive(self, frame: Frame) -> None:
        if frame.kind not in Kind.__members__.values():
            return
        if frame.kind == Kind.SIGNAL and (frame.oversize or not self._signal_callbacks):
            return
        if len(_SIGNATURES) > _SIGNATURE_CACHE:
            _SIGNATURES.clear()
        try:
            message = Unmarshaller(io.BytesIO(frame.data)).unmarshall()
        except Exception as error:  # noqa: BLE001 (whatever the library trips over, only this message is lost)
            _logger.warning("a message that cannot be parsed was ignored: %s", type(error).__name__)
            return
        if message is None:
            _logger.warning("a message that is cut short was ignored")
        elif frame.kind == Kind.METHOD_CALL:
            self._receive_call(_view(message, oversize=frame.oversize))
        elif frame.kind == Kind.SIGNAL:
            self._receive_signal(message)
        else:
            self._receive_reply(message, oversize=frame.oversize)

    def _receive_call(self, call: MethodCall) -> None:
        if self._handler is None:
            if len(self._early) < _EARLY_CALLS:
                self._early.append(call)
            else:
                self.reply_error(call, ErrorName.LIMITS_EXCEEDED, "too many calls while starting")
            return
        try:
            self._handler(call)
        except Exception:
            _logger.exception("the handler of method calls failed")
            self.reply_error(call, ErrorName.INTERNAL, "internal error; the journal has the details")

    def _receive_signal(self, message: Any) -> None:
        for callback in tuple(self._signal_callbacks):
            try:
                callback(message.path, message.interface, message.member, message.body, message.sender or "")
            except Exception:
                _logger.exception("a handler of signals failed")

    def _receive_reply(self, message: Any, *, oversize: bool) -> None:
        future = self._pending.pop(message.reply_serial, None)
        if future is None or future.done():
            return
        if oversize:
            future.set_exception(BusError(ErrorName.LIMITS_EXCEEDED, "the answer is too long"))
        elif message.message_type is MessageType.ERROR:
            text = (
                message.body[0] if message.body and isinstance(message.body[0], str) else message.error_name
            )
            future.set_exception(BusError(message.error_name, text))
        else:
            future.set_result(message.body)

    # outgoing messages

    @property
    def congested(self) -> bool:
        """Whether the bus is slow in taking our messages, so that less important ones should not be sent."""
        return self._congested

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float = CALL_TIMEOUT,  # noqa: ASYNC109 (part of the protocol: no call without a limit)
        interactive: bool = False,
    ) -> list[Any]:
        """Call a method and return the body of its answer. Structs are lists.

        Raises ``BusError`` for an error answer or none within ``timeout`` seconds, ``BusClosed`` if there
        is no connection.
        """
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE,
        )
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        serial = self._send(message, future)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise BusError(ErrorName.TIMEOUT, f"{destination} did not answer within {timeout:g} s") from None
        finally:
            self._pending.pop(serial, None)

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        droppable: bool = False,
    ) -> bool:
        """Send a signal, a ``droppable`` one only on a connection that is not congested; tells if it went."""
        if self._closed.is_set() or (droppable and self._congested):
            return False
        self._send(Message.new_signal(path, interface, member, signature, list(body)))
        return True

    def reply(self, call: MethodCall, signature: str = "", body: Sequence[Any] = ()) -> None:
        """Answer ``call``; nothing is sent if the caller wants no answer or the bus is gone."""
        if not call.no_reply and not self._closed.is_set():
            self._send(
                Message(
                    message_type=MessageType.METHOD_RETURN,
                    reply_serial=call.serial,
                    destination=call.sender,
                    signature=signature,
                    body=list(body),
                )
            )

    def reply_error(self, call: MethodCall, name: str, text: str) -> None:
        """Answer ``call`` with an error."""
        if not call.no_reply and not self._closed.is_set():
            self._send(
                Message(
                    message_type=MessageType.ERROR,
                    reply_serial=call.serial,
                    destination=call.sender,
                    error_name=str(name),
                    signature="s",
                    body=[text],
                )
            )

    def _send(self, message: Any, future: asyncio.Future[list[Any]] | None = None) -> int:
        if self._closed.is_set() or self._transport is None:
            raise self._reason or BusClosed("there is no connection to the bus")
        self._serial = self._serial % 0xFFFFFFFF + 1
        message.serial = self._serial
        data = message._marshall(False)  # noqa: SLF001 (the library's only marshalling door)
        if future is not None:
            self._pending[self._serial] = future
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > _WRITE_LIMIT:
            self._abort("the bus takes no messages")
        return self._serial

    # the bus itself

    def set_handler(self, handler: Callable[[MethodCall], None]) -> None:
        """Give every method call to ``handler``, also those received before; it answers by ``reply``."""
        self._handler = handler
        while self._early:
            self._receive_call(self._early.popleft())

    def on_signal(self, callback: SignalCallback) -> Callable[[], None]:
        """Call ``callback(path, interface, member, body, sender)`` for every signal; returns what ends it."""
        self._signal_callbacks.append(callback)

        def unsubscribe() -> None:
            with suppress(ValueError):
                self._signal_callbacks.remove(callback)

        return unsubscribe

    async def add_match(self, rule: str) -> None:
        """Ask the bus for the signals that ``rule`` describes."""
        await self.call(BUS, BUS_PATH, BUS, "AddMatch", "s", [rule])

    async def remove_match(self, rule: str) -> None:
        """Take back ``add_match``."""
        await self.call(BUS, BUS_PATH, BUS, "RemoveMatch", "s", [rule])

    async def request_name(self, name: str) -> None:
        """Become the owner of ``name`` at once, or raise ``BusError``."""
        do_not_queue = 4
        (answer,) = await self.call(BUS, BUS_PATH, BUS, "RequestName", "su", [name, do_not_queue])
        if answer not in (1, 4):
            raise BusError("org.freedesktop.DBus.Error.AddressInUse", f"{name} is owned by another process")

    async def unix_user(self, name: str, timeout: float = 5.0) -> int:  # noqa: ASYNC109
        """uid of the process that owns the bus name ``name``, as the bus knows it."""
        (uid,) = await self.call(BUS, BUS_PATH, BUS, "GetConnectionUnixUser", "s", [name], timeout=timeout)
        return int(uid)

    async def closed(self) -> BusClosed:
        """Wait until the connection is lost or closed; returns why."""
        await self._closed.wait()
        assert self._reason is not None
        return self._reason

    async def close(self) -> None:
        """Send what is queued (for a short time) and close."""
        if self._transport is None or self._closed.is_set():
            return
        self._reason = self._reason or BusClosed("the connection to the bus is closed")
        self._transport.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._closed.wait()
        except TimeoutError:
            self._transport.abort()
            await self._closed.wait()

    def _abort(self, reason: str) -> None:
        self._reason = self._reason or BusClosed(reason)
        if self._transport is not None:
            self._transport.abort()


def _view(message: Any, *, oversize: bool) -> MethodCall:
    return MethodCall(
        path=message.path,
        interface=message.interface,
        member=message.member,
        signature=message.signature,
        body=message.body,
        sender=message.sender or "",
        serial=message.serial,
        no_reply=bool(message.flags & MessageFlag.NO_REPLY_EXPECTED),
        interactive=bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
        oversize=oversize,
    )
