"""The parts of the D-Bus protocol below messages: addresses, authentication, and where a message ends.

Bytes in, values out: no I/O here, and no D-Bus library. (D-Bus specification 0.43, "Server Addresses",
"Authentication Protocol", "Message Format".)
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from urllib.parse import unquote_to_bytes

#: Fixed part of a header: endianness, type, flags, version, body length, serial, length of the field array.
FIXED_HEADER: Final = 16
#: A message may not be longer than this (specification, "Message Format").
MAX_MESSAGE: Final = 128 << 20
#: A header longer than this is not parsed: names are at most 255 bytes and paths are short.
MAX_HEADER: Final = 64 << 10
#: No authentication line is longer than this.
MAX_AUTH_LINE: Final = 16 << 10

_BIG_ENDIAN: Final = ord("B")
_LITTLE_ENDIAN: Final = ord("l")
_KNOWN_FLAGS: Final = 0x07
_OK_LINE: Final = re.compile(rb"OK [0-9a-fA-F]*\Z")


_FIXED_TYPES: Final = {
    "y": "B",
    "n": "h",
    "q": "H",
    "i": "i",
    "u": "I",
    "b": "I",
    "h": "I",
    "x": "q",
    "t": "Q",
}
_TEXT_TYPES: Final = {"s": 4, "o": 4, "g": 1}


class ProtocolError(Exception):
    """The peer does not speak D-Bus as the specification says; the connection cannot go on."""


class Kind(IntEnum):
    """Message types."""

    METHOD_CALL = 1
    METHOD_RETURN = 2
    ERROR = 3
    SIGNAL = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Longest body, in bytes, that is unmarshalled for each kind of message.

    Unmarshalling holds up the event loop, so the limit of a service is low: 32 KiB of one-byte variants take
    some tens of milliseconds. A longer body is skipped as it comes in and never held.
    """

    call: int = 32 << 10
    signal: int = 4 << 20
    reply: int = 16 << 20

    def of(self, kind: int) -> int:
        """The limit for messages of type ``kind``."""
        if kind == Kind.METHOD_CALL:
            return self.call
        return self.signal if kind == Kind.SIGNAL else self.reply


@dataclass(slots=True)
class Frame:
    """One message as bytes. ``oversize``: the body was over the limit and is missing, the header is whole."""

    kind: int
    data: bytearray
    oversize: bool


class Framer:
    """Cuts a stream of bytes into messages without parsing them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._skip = 0
        #: Messages that were dropped without being handed out, because their header was too long.
        self.unseen = 0

    def feed(self, data: bytes) -> None:
        """Take in bytes of the stream."""
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:]
        self._buffer += data

    @property
    def backlog(self) -> int:
        """Bytes taken in that were not handed out yet."""
        return len(self._buffer)

    def next(self) -> Frame | None:
        """The next whole message, or None until more bytes came. Raises ``ProtocolError``."""
        buffer = self._buffer
        if len(buffer) < FIXED_HEADER:
            return None
        endian = buffer[0]
        if endian not in (_LITTLE_ENDIAN, _BIG_ENDIAN):
            raise ProtocolError("message without endianness mark")
        order = "<" if endian == _LITTLE_ENDIAN else ">"
        body, _serial, fields = struct.unpack_from(order + "III", buffer, 4)
        header = FIXED_HEADER + fields + (-fields & 7)
        total = header + body
        if total > MAX_MESSAGE:
            raise ProtocolError("message over 128 MiB")
        kind = buffer[1]
        if body <= self._limits.of(kind) and header <= MAX_HEADER:
            if len(buffer) < total:
                return None
            return Frame(kind, self._take(total), oversize=False)
        if header > MAX_HEADER:
            self._drop(total)
            self.unseen += 1
            return self.next()
        if len(buffer) < header:
            return None
        data = self._take(header)
        self._drop(body)
        # Without its body the message is well-formed again if it says that it has none.
        struct.pack_into(order + "I", data, 4, 0)
        return Frame(kind, data, oversize=True)

    def _take(self, count: int) -> bytearray:
        data = self._buffer[:count]
        del self._buffer[:count]
        # Flags of later versions of the protocol are to be ignored; the library may refuse them.
        data[2] &= _KNOWN_FLAGS
        return data

    def _drop(self, count: int) -> None:
        here = min(count, len(self._buffer))
        del self._buffer[:here]
        self._skip += count - here


class Field(IntEnum):
    """Header fields that are read or written without the library."""

    ERROR_NAME = 4
    REPLY_SERIAL = 5
    DESTINATION = 6
    SIGNATURE = 8
    UNIX_FDS = 9


def header_fields(data: bytes | bytearray) -> dict[int, int | str]:
    """The header fields of the message that begins with ``data``: numbers and texts.

    Raises ``ProtocolError`` for a header that is not as the specification says ("Message Format"), or has a
    field of a type that no known field has.
    """
    order = {_LITTLE_ENDIAN: "<", _BIG_ENDIAN: ">"}.get(data[0] if data else 0)
    if order is None or len(data) < FIXED_HEADER:
        raise ProtocolError("message without endianness mark")
    try:
        (length,) = struct.unpack_from(order + "I", data, FIXED_HEADER - 4)
        end, position = FIXED_HEADER + length, FIXED_HEADER
        fields: dict[int, int | str] = {}
        while position < end:
            position = _aligned(position, 8)
            code = data[position]
            kind, position = _text(data, position + 1, 1, order)
            if kind in _FIXED_TYPES:
                size = struct.calcsize(_FIXED_TYPES[kind])
                position = _aligned(position, size)
                (fields[code],) = struct.unpack_from(order + _FIXED_TYPES[kind], data, position)
                position += size
            elif kind in _TEXT_TYPES:
                fields[code], position = _text(data, position, _TEXT_TYPES[kind], order)
            else:
                raise ProtocolError("header field of an unknown type")
    except (IndexError, struct.error, UnicodeDecodeError):
        raise ProtocolError("header that is cut short or not text") from None
    if position > end or end > len(data):
        raise ProtocolError("header fields beyond the header")
    return fields


def _aligned(position: int, to: int) -> int:
    return position + (-position & (to - 1))


def _text(data: bytes | bytearray, position: int, width: int, order: str) -> tuple[str, int]:
    """A string or signature, whose length has ``width`` bytes, and the position behind it."""
    position = _aligned(position, width)
    (length,) = struct.unpack_from(order + ("B" if width == 1 else "I"), data, position)
    position += width
    return bytes(data[position : position + length]).decode(), position + length + 1


def return_header(serial: int, reply_serial: int, destination: str, signature: str, body: int) -> bytes:
    """The header of a METHOD_RETURN whose body has ``body`` bytes, in little endian."""
    name = destination.encode()
    fields = struct.pack("<BBcBI", Field.REPLY_SERIAL, 1, b"u", 0, reply_serial)
    fields += struct.pack("<BBcBI", Field.DESTINATION, 1, b"s", 0, len(name)) + name + b"\0"
    fields += bytes(-len(fields) & 7)
    fields += struct.pack("<BBcBB", Field.SIGNATURE, 1, b"g", 0, len(signature)) + signature.encode() + b"\0"
    no_reply_expected = 1
    head = struct.pack("<cBBBIII", b"l", Kind.METHOD_RETURN, no_reply_expected, 1, body, serial, len(fields))
    return head + fields + bytes(-len(fields) & 7)


def parse_address(address: str) -> list[str]:
    """Socket names to try for a server address, in order; an abstract one begins with NUL.

    Only ``unix:path=`` and ``unix:abstract=`` are understood: a system bus is nothing else. Raises
    ``ValueError`` if no part of the address is usable.
    """
    names = []
    for entry in address.split(";"):
        transport, _, options = entry.partition(":")
        if transport != "unix":
            continue
        pairs = dict(pair.partition("=")[::2] for pair in options.split(","))
        for key, prefix in (("path", ""), ("abstract", "\0")):
            if pairs.get(key):
                names.append(prefix + unquote_to_bytes(pairs[key]).decode("utf-8", "surrogateescape"))
                break
    if not names:
        raise ValueError(f"bus address {address!r} names no unix socket")
    return names


def auth_request(uid: int) -> bytes:
    """First bytes of a connection: the credentials byte and EXTERNAL authentication."""
    return b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n"


def auth_answer(line: bytes, *, descriptors: bool = False) -> bytes:
    """What to send after the server's answer; with ``descriptors``, those are negotiated first.

    Raises ``ProtocolError`` if the server refuses.
    """
    if line == b"AGREE_UNIX_FD" and descriptors:
        return b"BEGIN\r\n"
    if not _OK_LINE.match(line):
        raise ProtocolError("the bus refused the authentication")
    return b"NEGOTIATE_UNIX_FD\r\n" if descriptors else b"BEGIN\r\n"
