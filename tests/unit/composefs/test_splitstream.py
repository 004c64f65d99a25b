"""Splitstreams: recorded bytes of composefs-rs 0.9, and every way a file can be malformed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from hostimaged.composefs import fsverity, splitstream
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.splitstream import ContentType, SplitStream, SplitStreamError, Writer, cat
from hostimaged.errors import NoSpace
from hostimaged.ids import ObjectId

SHA256 = Algorithm.SHA256

EMPTY = bytes.fromhex(
    "53706c697453747265616d00 0000 01 0c 2000000000000000 7000000000000000"
    "7000000000000000 7000000000000000 7000000000000000 7000000000000000"
    "7900000000000000 8200000000000000 7000000000000000 7900000000000000"
    "3412000000000000 0000000000000000 28b52ffd2000010000 28b52ffd2000010000"
)
SMALL = bytes.fromhex(
    "53706c697453747265616d000000010c20000000000000007000000000000000"
    "7000000000000000b000000000000000b000000000000000d000000000000000"
    "e7000000000000001101000000000000d000000000000000e700000000000000"
    "6f63696c61796572d300000000000000"
    "2222222222222222222222222222222222222222222222222222222222222222"
    "1111111111111111111111111111111111111111111111111111111111111111"
    "dac5f3c6c05fd30c02ab06d9447b03e0a0e7cbf3353d05b86a67eee17fb1c818"
    "28b52ffd0058710000313a613a3100303a6200303a6300"
    "28b52ffd00580d0100c0fbff68656c6c6f00faff20776f726c640000000000000000"
    "03100003e7326001"
)
ALPHA = bytes.fromhex(
    "53706c697453747265616d000000010c20000000000000007000000000000000"
    "7000000000000000700000000000000070000000000000009000000000000000"
    "9900000000000000ed0000000000000090000000000000009900000000000000"
    "6f63696c61796572000a000000000000"
    "f6fa43bbc0a7908e2ef77438244159e9dec289dfc4c49d229237f9797a6a9b79"
    "28b52ffd2000010000"
    "28b52ffd00585d0200440200feff616c70686100303030303730303031373536373531003075737461"
    "72003030e8fb0e00144105c080186e2898200624e7a80000831b3463660d45c0cd6280df95d62c98d28221"
)
XS = ObjectId.fromhex("dac5f3c6c05fd30c02ab06d9447b03e0a0e7cbf3353d05b86a67eee17fb1c818")
TWOS, ONES = ObjectId(b"\x22" * 32), ObjectId(b"\x11" * 32)


def write(writer: Writer) -> bytes:
    with writer:
        data = b"".join(writer.finish())
        assert writer.stored_size == len(data)
        return data


def small() -> Writer:
    writer = Writer(SHA256, ContentType.LAYER)
    writer.inline(b"hel")
    writer.inline(memoryview(b"lo"))
    writer.external(XS, 100)
    writer.inline(bytearray(b" world"))
    writer.external(XS, 100)
    writer.named_ref("b", TWOS)
    writer.named_ref("a:1", ONES)
    writer.named_ref("c", TWOS)
    return writer


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., SplitStream]]:
    """Opens bytes as a stream, and closes it at the end."""
    streams: list[SplitStream] = []

    def open_(data: bytes, expected: int | None = None, algorithm: Algorithm = SHA256) -> SplitStream:
        path = tmp_path / "stream"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        stream = SplitStream(fd, algorithm, name="stream x", expected=expected)
        streams.append(stream)
        return stream

    yield open_
    for stream in streams:
        stream.close()


Open = Callable[..., SplitStream]


# --- vectors of the specification ---------------------------------------------------------------------------


def test_empty_stream() -> None:
    data = write(Writer(SHA256, 0x1234))
    assert data == EMPTY
    assert (
        fsverity.digest(SHA256, data).hex()
        == "f2c3146d3ef5e3715f4adb4f273d73029ddb8cb97fa6643b76a263508d2396e3"
    )


def test_small_stream() -> None:
    writer = small()
    assert writer.size == 211
    assert writer.object_refs == (XS,)
    data = write(writer)
    assert data == SMALL
    assert (
        fsverity.digest(SHA256, data).hex()
        == "ab464f6f5962e611d0e5c8263669ccba2b9f90872df7c33b59624fdbfddb409e"
    )


def header(name: str, size: int) -> bytes:
    """The ustar header of the pinned layers."""
    fields = [
        (name.encode(), 100),
        (b"0000700\0" + b"0000000\0" * 2, 24),
        (b"%011o\0" % size + b"00000000000\0", 24),
        (b"        0", 109),
        (b"ustar\x0000", 255),
    ]
    block = b"".join(value.ljust(length, b"\0") for value, length in fields)
    assert len(block) == 512
    return block[:148] + b"%07o\0" % sum(block) + block[156:]


def layer(name: str, size: int) -> tuple[Writer, bytes]:
    content, padding = bytes(size), bytes(-size % 512)
    writer = Writer(SHA256, ContentType.LAYER)
    writer.inline(header(name, size))
    writer.external(fsverity.digest(SHA256, content), size)
    writer.inline(padding + bytes(1024))
    return writer, header(name, size) + content + padding + bytes(1024)


def test_pinned_layers_and_config() -> None:
    """The value that composefs-rs pins for a whole image."""
    expected = {
        ("alpha", 1000): (
            "757d6903198804b6ed96421a93a9973f5facc0e445a2a6c61cb0129eb67026e2",
            "61c07629b8a41273f190744a8545c132e6b784dcb2235bb31ade307a83e092ff",
            237,
        ),
        ("beta", 2000): (
            "77dd145166ef191089dabd4d2c52d32143850a3c81a074fedf48dca360e2dcb9",
            "ce472620ab69da46e385b0936865ef22f940e6bf55a083d3be37b1003795e221",
            236,
        ),
        ("gamma", 3000): (
            "9b57f0e91c403b650e9391fd5e4154cac5dc1469acc0f3312e6149aa34f160ef",
            "99ce11df4bb808a1e80ce69425dae527b64aa7a270bf99c4a6e24d66be270f3f",
            237,
        ),
    }
    named: list[tuple[str, ObjectId]] = []
    for (name, size), (diff_id, stream_id, length) in expected.items():
        writer, tar = layer(name, size)
        data = write(writer)
        if name == "alpha":
            assert data == ALPHA
        assert hashlib.sha256(tar).hexdigest() == diff_id
        assert len(data) == length
        assert fsverity.digest(SHA256, data).hex() == stream_id
        named.append((f"sha256:{diff_id}", ObjectId.fromhex(stream_id)))
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [name for name, _ in named]},
        },
        separators=(",", ":"),
    ).encode()
    assert (
        hashlib.sha256(config).hexdigest()
        == "5118919cc453352968579aeed8fcc26c7a75759de579722a0f90ed5aaf85bd7d"
    )
    config_id = fsverity.digest(SHA256, config)
    assert config_id.hex() == "1dc5a7ea2c7a2d322c8ab613e8427bfe3fec9e6775b3c85896421a588d7c0e17"
    writer = Writer(SHA256, ContentType.CONFIG)
    for name, id_ in named:
        writer.named_ref(name, id_)
    writer.external(config_id, len(config))
    assert (
        fsverity.digest(SHA256, write(writer)).hex()
        == "4839518dea22749f8ff233e7f7baec65f23dd5336462f46ad6884769af84bf95"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ContentType.LAYER, 0x726579616C69636F),
        (ContentType.CONFIG, 0x67666E6F6369636F),
        (ContentType.MANIFEST, 0x66696E616D69636F),
        (ContentType.BLOB, 0x626F6C625F69636F),
    ],
)
def test_content_types(kind: ContentType, text: int) -> None:
    assert kind == text


# --- writing ------------------------------------------------------------------------------------------------


def test_the_cut_into_calls_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does it matter what went to a temporary file."""
    rng = random.Random(1)
    data = bytes(rng.choice(b"abcdefgh") for _ in range(300_000))
    results = set()
    for pending, compressed in ((1 << 20, 4 << 20), (100, 1000), (0, 0)):
        monkeypatch.setattr(splitstream, "_PENDING_LIMIT", pending)
        monkeypatch.setattr(splitstream, "_COMPRESSED_LIMIT", compressed)
        for step in (len(data), 4099, 512):
            writer = Writer(SHA256, 7, lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
            for part in range(3):
                for at in range(0, len(data), step):
                    writer.inline(data[at : at + step])
                writer.external(ObjectId(bytes([part]) * 32), 5)
            results.add(write(writer))
    assert len(results) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_neighbouring_and_no_empty_inline_chunks(opened: Open) -> None:
    writer = Writer(SHA256, 7)
    writer.inline(b"")
    writer.external(ONES, 1)
    writer.inline(b"")
    writer.external(TWOS, 1)
    writer.inline(b"a")
    writer.inline(b"")
    writer.inline(b"b")
    assert list(opened(write(writer)).chunks()) == [ONES, TWOS, b"ab"]


def test_a_name_set_twice_keeps_the_later_value(opened: Open) -> None:
    writer = Writer(SHA256, 7)
    writer.named_ref("name", ONES)
    writer.named_ref("name", TWOS)
    stream = opened(write(writer))
    assert stream.named_refs == {"name": TWOS}
    assert stream.stream_refs == (ONES, TWOS)


def test_names_are_sorted_by_bytes(opened: Open) -> None:
    writer = Writer(SHA256, 7)
    for name in ("\U00010000", "\uffff", "é", "z", "Z"):
        writer.named_ref(name, ONES)
    assert list(opened(write(writer)).named_refs) == ["Z", "z", "é", "\uffff", "\U00010000"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Inline data and compressed data of any size go to temporary files."""
    noise = random.Random(2).randbytes(1 << 16)
    writer = Writer(SHA256, 7, lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    with writer:
        writer.inline(b"first")
        tracemalloc.start()
        try:
            for _ in range(600):
                writer.inline(noise)
            for number in range(200):
                writer.external(ONES, 1)
                writer.inline(hashlib.sha256(b"%d" % number).digest() * 10 + noise[:5000])
            size = sum(len(part) for part in writer.finish())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert size == writer.stored_size
    assert peak < 12 << 20


def test_wrong_arguments() -> None:
    with Writer(SHA256, 7) as writer:
        with pytest.raises(ValueError, match="another hash"):
            writer.external(ObjectId(bytes(64)), 1)
        with pytest.raises(ValueError, match="NUL"):
            writer.named_ref("a\0b", ONES)


def test_full_disk_while_spooling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitstream, "_PENDING_LIMIT", 10)

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(SHA256, 7, lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)) as writer:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(NoSpace):
            writer.inline(b"more than ten bytes")


# --- reading ------------------------------------------------------------------------------------------------


def old_form(data: bytes) -> bytes:
    """The same stream as bootc up to 1.15 wrote it."""
    magic, version, flags, algorithm, bits, start, end = struct.unpack_from("<11sBHBB2Q", data)
    return struct.pack("<2QH11sBBB", start, end, flags, magic, version, algorithm, bits) + data[32:]


@pytest.mark.parametrize("convert", [bytes, old_form])
def test_reading(opened: Open, convert: Callable[[bytes], bytes]) -> None:
    stream = opened(convert(SMALL), ContentType.LAYER)
    assert stream.content_type == ContentType.LAYER
    assert stream.size == 211
    assert stream.object_refs == (XS,)
    assert stream.stream_refs == (TWOS, ONES)
    assert stream.named_refs == {"a:1": ONES, "b": TWOS, "c": TWOS}
    for _ in range(2):
        chunks = list(stream.chunks())
        assert chunks == [b"hello", XS, b" world", XS]
        assert [isinstance(chunk, ObjectId) for chunk in chunks] == [False, True, False, True]


def test_reading_sha512(opened: Open) -> None:
    writer = Writer(Algorithm.SHA512, 7)
    writer.external(ObjectId(b"x" * 64), 1)
    stream = opened(write(writer), algorithm=Algorithm.SHA512)
    assert list(stream.chunks()) == [ObjectId(b"x" * 64)]


def test_long_inline_chunks_come_in_pieces(opened: Open) -> None:
    data = random.Random(3).randbytes(3_000_000)
    writer = Writer(SHA256, 7)
    writer.inline(data)
    pieces = list(opened(write(writer)).chunks())
    assert [len(piece) for piece in pieces] == [1 << 20, 1 << 20, 3_000_000 - (2 << 20)]
    assert b"".join(pieces) == data


def test_chunks_of_up_to_a_mebibyte_come_whole(opened: Open) -> None:
    rng = random.Random(4)
    sizes = [rng.randrange(1, 200_000) for _ in range(30)]
    writer = Writer(SHA256, 7)
    for size in sizes:
        writer.inline(rng.randbytes(size))
        writer.external(ONES, 1)
    pieces = [piece for piece in opened(write(writer)).chunks() if not isinstance(piece, ObjectId)]
    assert [len(piece) for piece in pieces] == sizes


def test_several_frames(opened: Open) -> None:
    """As the Rust reader, we read frame after frame."""
    plain = [struct.pack("<q", -3) + b"a", b"bc", struct.pack("<q", -1), b"d"]
    frames = b"".join(zstandard.compress(part) for part in plain)
    assert list(opened(with_stream(frames)).chunks()) == [b"abc", b"d"]


def test_cat(opened: Open, tmp_path: Path) -> None:
    class Opener:
        def open_object(self, id_: ObjectId, /) -> int:
            assert id_ == XS
            (tmp_path / "object").write_bytes(b"x" * 100)
            return os.open(tmp_path / "object", os.O_RDONLY)

    out = bytearray()
    cat(opened(SMALL), Opener(), out.extend)
    assert bytes(out) == b"hello" + b"x" * 100 + b" world" + b"x" * 100


# --- malformed files ----------------------------------------------------------------------------------------


def with_stream(frames: bytes) -> bytes:
    """The small stream with another stream section."""
    return with_info(SMALL[:0xE7] + frames, stream=(0xE7, 0xE7 + len(frames)))


def with_info(data: bytes, **changes: tuple[int, int] | int) -> bytes:
    offsets = {"streams": 32, "objects": 48, "stream": 64, "names": 80, "content_type": 96, "size": 104}
    changed = bytearray(data)
    for name, value in changes.items():
        if isinstance(value, int):
            struct.pack_into("<Q", changed, offsets[name], value)
        else:
            struct.pack_into("<QQ", changed, offsets[name], *value)
    return bytes(changed)


def with_names(text: bytes, *, frame: bytes | None = None) -> bytes:
    frame = zstandard.compress(text) if frame is None else frame
    return with_info(SMALL + frame, names=(len(SMALL), len(SMALL) + len(frame)))


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (SMALL[:31], "too short"),
        (SMALL[:111], "outside the file"),
        (b"X" + SMALL[1:], "not a splitstream"),
        (SMALL[:11] + b"\1" + SMALL[12:], "unknown version 1"),
        (old_form(SMALL)[:29] + b"\1" + old_form(SMALL)[30:], "unknown version 1"),
        (SMALL[:14] + b"\2" + SMALL[15:], "another hash"),
        (SMALL[:15] + b"\x10" + SMALL[16:], "another block size"),
        (SMALL[:16] + struct.pack("<QQ", 112, 32) + SMALL[32:], "outside the file"),
        (SMALL[:16] + struct.pack("<QQ", 32, 111) + SMALL[32:], "too short"),
        (SMALL[:16] + struct.pack("<QQ", 32, HUGE) + SMALL[32:], "outside the file"),
        (SMALL[:16] + struct.pack("<QQ", HUGE, HUGE) + SMALL[32:], "outside the file"),
        (with_info(SMALL, streams=(112, 112 + 63)), "whole number of digests"),
        (with_info(SMALL, objects=(112, HUGE)), "outside the file"),
        (with_info(SMALL, objects=(200, 190)), "outside the file"),
        (with_info(SMALL, stream=(0, len(SMALL) + 1)), "outside the file"),
        (with_info(SMALL, names=(0, len(SMALL) + 1)), "outside the file"),
        (with_names(b"0:a\0junk"), "in the middle"),
        (with_names(b"0a\0"), "malformed"),
        (with_names(b"2:a\0"), "malformed"),
        (with_names(b"-1:a\0"), "malformed"),
        (with_names(b":a\0"), "malformed"),
        (with_names(b" 1:a\0"), "malformed"),
        (with_names(b"99999999999999999999999999:a\0"), "malformed"),
        (with_names("١:a\0".encode()), "malformed"),
        (with_names(b"\0"), "malformed"),
        (with_names(b"0:\xff\0"), "not UTF-8"),
        (with_names(b"", frame=b"not zstd"), "compression is damaged"),
        (with_names(b"", frame=zstandard.compress(b"0:a\0")[:-1]), "cut off"),
    ],
)
def test_malformed_tables(opened: Open, data: bytes, message: str) -> None:
    with pytest.raises(SplitStreamError, match=message) as caught:
        opened(data)
    assert caught.value.message.startswith("stream x is damaged: ")


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (struct.pack("<q", -6) + b"hello", "in the middle of a chunk"),
        (b"\1\2\3", "in the middle of a chunk"),
        (struct.pack("<q", 1), "not in the table"),
        (struct.pack("<q", (1 << 63) - 1), "not in the table"),
        (struct.pack("<q", -(1 << 63)) + b"hello", "in the middle of a chunk"),
    ],
)
def test_malformed_chunks(opened: Open, plain: bytes, message: str) -> None:
    stream = opened(with_stream(zstandard.compress(plain)))
    with pytest.raises(SplitStreamError, match=message):
        list(stream.chunks())


def test_a_frame_cut_off_at_a_chunk_boundary_is_noticed(opened: Open) -> None:
    """The Rust reader reports it too; the plain text alone would look complete."""
    stream = opened(with_info(SMALL[:-1], stream=(0xE7, len(SMALL) - 1)))
    with pytest.raises(SplitStreamError, match="cut off"):
        list(stream.chunks())


def test_unexpected_content_type(opened: Open) -> None:
    with pytest.raises(SplitStreamError, match="holds content type LAYER, not content type CONFIG"):
        opened(SMALL, ContentType.CONFIG)
    with pytest.raises(SplitStreamError, match="holds content type 0x1234"):
        opened(EMPTY, ContentType.CONFIG)


def test_a_longer_info_section_is_accepted(opened: Open) -> None:
    data = SMALL[:16] + struct.pack("<QQ", 32, 150) + SMALL[32:]
    assert opened(data).size == 211


def bomb(size: int) -> bytes:
    """A zstd frame of ``size`` MiB of zero bytes, in blocks of four bytes for 128 KiB."""
    block = struct.pack("<I", (128 << 10) << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", (128 << 10) << 3 | 1 << 1 | 1)[:3] + b"\0"
    return bytes.fromhex("28b52ffd0058") + block * (size * 8 - 1) + last


def test_bombs_do_not_fill_memory(opened: Open) -> None:
    assert len(zstandard.ZstdDecompressor().decompressobj().decompress(bomb(2))) == 2 << 20
    stream = opened(with_stream(bomb(1024)))
    tracemalloc.start()
    try:
        # A run of zero chunks: each refers to object 0.
        for count, chunk in enumerate(stream.chunks()):
            assert chunk == XS
            if count > 100_000:
                break
        with pytest.raises(SplitStreamError, match="named references are longer"):
            opened(with_names(b"", frame=bomb(1024)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 << 20


def test_huge_tables_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    size = 1 << 40
    with path.open("wb") as file:
        file.write(with_info(SMALL, objects=(512, size)))
        file.truncate(size)
    with pytest.raises(SplitStreamError, match="longer than"):
        SplitStream(os.open(path, os.O_RDONLY), SHA256)


def test_huge_windows_are_refused(opened: Open) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(b"x" * 1000) + compressor.flush()
    with pytest.raises(SplitStreamError, match="damaged"):
        opened(with_names(b"", frame=frame))
