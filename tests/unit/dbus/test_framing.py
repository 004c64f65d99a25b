"""Bytes of a D-Bus stream: addresses, authentication, and where messages end."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimage_dbus.framing import (
    FIXED_HEADER,
    MAX_HEADER,
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


def message(
    kind: int = 1, body: bytes = b"", fields: bytes = b"", *, big: bool = False, flags: int = 0
) -> bytes:
    mark, order = (b"B", ">") if big else (b"l", "<")
    head = mark + bytes([kind, flags, 1]) + struct.pack(order + "III", len(body), 7, len(fields))
    return head + fields + bytes(-len(fields) % 8) + body


def drain(framer: Framer) -> list[Frame]:
    return list(iter(framer.next, None))


@given(
    st.lists(
        st.tuples(st.sampled_from(Kind), st.binary(max_size=40), st.binary(max_size=20), st.booleans()),
        max_size=6,
    ),
    st.integers(1, 50),
)
def test_messages_come_out_whole_however_the_stream_is_cut(
    parts: list[tuple[Kind, bytes, bytes, bool]], piece: int
) -> None:
    whole = [message(kind, body, fields, big=big) for kind, body, fields, big in parts]
    stream = b"".join(whole)
    framer = Framer(Limits())
    frames = []
    for start in range(0, len(stream), piece):
        framer.feed(stream[start : start + piece])
        frames += drain(framer)
    assert [bytes(frame.data) for frame in frames] == whole
    assert not any(frame.oversize for frame in frames)
    assert framer.backlog == 0


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("big", [False, True])
def test_body_over_the_limit_is_never_held(piece: int, *, big: bool) -> None:
    framer = Framer(Limits(call=100))
    stream = message(1, b"x" * 5000, b"abc", big=big) + message(1, b"after")
    frames = []
    for start in range(0, len(stream), piece):
        framer.feed(stream[start : start + piece])
        assert framer.backlog <= FIXED_HEADER + 8 + max(piece, 100)
        frames += drain(framer)
    first, second = frames
    assert first.oversize
    # What is left is a message that says it has no body.
    assert bytes(first.data) == message(1, b"", b"abc", big=big)
    assert bytes(second.data) == message(1, b"after")


def test_limit_depends_on_the_kind() -> None:
    framer = Framer(Limits(call=10, signal=20, reply=30))
    framer.feed(b"".join(message(kind, b"x" * 25) for kind in Kind))
    assert [(frame.kind, frame.oversize) for frame in drain(framer)] == [
        (Kind.METHOD_CALL, True),
        (Kind.METHOD_RETURN, False),
        (Kind.ERROR, False),
        (Kind.SIGNAL, True),
    ]


def test_endless_header_is_skipped_with_its_message() -> None:
    framer = Framer(Limits())
    framer.feed(message(1, b"body", bytes(MAX_HEADER + 8)) + message(4, b"next"))
    assert [frame.kind for frame in drain(framer)] == [Kind.SIGNAL]


def test_unknown_flags_are_ignored() -> None:
    framer = Framer(Limits())
    framer.feed(message(1, flags=0xFD))
    (frame,) = drain(framer)
    assert frame.data[2] == 0x05


@pytest.mark.parametrize("stream", [b"x" * 16, b"l\1\0\1" + struct.pack("<III", 1 << 31, 1, 0)])
def test_what_is_no_message_ends_the_connection(stream: bytes) -> None:
    framer = Framer(Limits())
    framer.feed(stream)
    with pytest.raises(ProtocolError):
        framer.next()


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("unix:path=/run/bus", ["/run/bus"]),
        ("unix:path=/run/bus,guid=12", ["/run/bus"]),
        ("unix:abstract=name,guid=12", ["\0name"]),
        ("unix:path=/a%20b%2cc", ["/a b,c"]),
        ("tcp:host=localhost,port=1;unix:path=/run/bus;unix:path=/b", ["/run/bus", "/b"]),
    ],
)
def test_addresses(address: str, names: list[str]) -> None:
    assert parse_address(address) == names


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:tmpdir=/tmp", "tcp:host=localhost,port=1", "nonsense"]
)
def test_addresses_without_a_socket(address: str) -> None:
    with pytest.raises(ValueError, match="names no unix socket"):
        parse_address(address)


def test_authentication() -> None:
    assert auth_request(1000) == b"\0AUTH EXTERNAL 31303030\r\n"
    assert auth_answer(b"OK 1234deadbeef") == b"BEGIN\r\n"
    for refusal in (b"REJECTED EXTERNAL", b"ERROR", b"", b"OK not hex"):
        with pytest.raises(ProtocolError):
            auth_answer(refusal)


# header fields


def field(code: int, kind: bytes, value: bytes) -> bytes:
    return bytes([code, len(kind)]) + kind + b"\0" + value


@pytest.mark.parametrize("big", [False, True])
def test_header_fields(big: bool) -> None:
    order = ">" if big else "<"
    path = field(1, b"o", struct.pack(order + "I", 2) + b"/x\0")
    path += bytes(-len(path) % 8)
    fields = path + field(8, b"g", b"\2as\0") + field(9, b"u", struct.pack(order + "I", 3))
    assert header_fields(message(4, b"body", fields, big=big)) == {1: "/x", 8: "as", 9: 3}


@pytest.mark.parametrize(
    "fields",
    [
        field(1, b"v", b"\1u\0"),
        field(1, b"", b""),
        field(1, b"o", struct.pack("<I", 1 << 31) + b"/x\0"),
        field(1, b"o", struct.pack("<I", 2) + b"\xff\xfe\0"),
        field(9, b"u", b"\0"),
    ],
)
def test_header_fields_that_are_none(fields: bytes) -> None:
    with pytest.raises(ProtocolError):
        header_fields(message(4, b"", fields))


@given(st.binary(max_size=80), st.booleans())
def test_no_header_breaks_the_parser(fields: bytes, cut: bool) -> None:
    data = message(4, b"", fields)
    try:
        found = header_fields(data[: len(data) // 2] if cut else data)
    except ProtocolError:
        return
    assert all(isinstance(value, int | str) for value in found.values())


def test_descriptors_are_negotiated_where_they_are_wanted() -> None:
    assert auth_answer(b"OK 0123", descriptors=True) == b"NEGOTIATE_UNIX_FD\r\n"
    assert auth_answer(b"AGREE_UNIX_FD", descriptors=True) == b"BEGIN\r\n"
    for line in (b"ERROR", b"REJECTED EXTERNAL"):
        with pytest.raises(ProtocolError):
            auth_answer(line, descriptors=True)
    with pytest.raises(ProtocolError):
        auth_answer(b"AGREE_UNIX_FD")
