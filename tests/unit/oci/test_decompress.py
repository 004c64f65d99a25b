"""Decompression: every member and frame, nothing but members and frames, bounded pieces."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from collections.abc import Iterable, Iterator
from types import ModuleType

import pytest
import zstandard

from hostimaged.errors import DigestMismatch, UnsupportedImage
from hostimaged.oci import gunzip as gunzip_module
from hostimaged.oci.decompress import DEFAULT_LIMIT, TAR_LAYERS, Compression, decompressed

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
NONE = "application/vnd.oci.image.layer.v1.tar"
PIECE = 1 << 20

NOISE = random.Random(7).randbytes(300_000)
TEXT = b"All work and no play makes Jack a dull boy. " * 40_000
SKIPPABLE = struct.pack("<II", 0x184D2A53, 70) + bytes(range(70))


@pytest.fixture(params=["zlib", "isal"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both gzip libraries, whatever the other tests use."""
    module = zlib if request.param == "zlib" else pytest.importorskip("isal.isal_zlib")
    monkeypatch.setattr(gunzip_module, "_library", module)
    return module


def run(media_type: str, data: bytes, step: int = 70_000, limit: int = DEFAULT_LIMIT) -> bytes:
    pieces = list(decompressed(media_type, cut(data, step), limit=limit))
    assert all(len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


def cut(data: bytes, step: int) -> Iterator[memoryview]:
    view = memoryview(data)
    for at in range(0, len(data), step):
        yield view[at : at + step]


def member(data: bytes, flags: int = 0) -> bytes:
    """A gzip member with the optional header fields that ``flags`` asks for."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff"
    if flags & 4:
        head += struct.pack("<H", 300) + bytes(300)
    if flags & 8:
        head += b"layer.tar\0"
    if flags & 16:
        head += b"comment \xff\0"
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    return head + body + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def frame(data: bytes, **parameters: bool) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(data)  # type: ignore[arg-type]


def streamed(data: bytes) -> bytes:
    """A frame whose header does not tell the size, as skopeo writes them."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


GOOD = {
    "gzip": (GZIP, gzip.compress(TEXT), TEXT),
    "gzip of noise": (GZIP, gzip.compress(NOISE), NOISE),
    "gzip of nothing": (GZIP, gzip.compress(b""), b""),
    "gzip members": (GZIP, b"".join(member(NOISE[at : at + 9999]) for at in range(0, 300_000, 9999)), NOISE),
    "gzip header fields": (
        GZIP,
        b"".join(member(b"abc" * 99, flags) for flags in range(0, 32, 2)),
        b"abc" * 99 * 16,
    ),
    "tiny gzip members": (GZIP, member(b"") * 500 + member(b"x"), b"x"),
    "zstd": (ZSTD, frame(TEXT), TEXT),
    "zstd of noise": (ZSTD, frame(NOISE), NOISE),
    "zstd of nothing": (ZSTD, frame(b""), b""),
    "zstd streamed": (ZSTD, streamed(TEXT), TEXT),
    "zstd with checksum": (ZSTD, frame(NOISE, write_checksum=True), NOISE),
    "zstd frames": (ZSTD, b"".join(frame(NOISE[at : at + 9999]) for at in range(0, 300_000, 9999)), NOISE),
    "zstd skippable": (
        ZSTD,
        SKIPPABLE + frame(b"a") + SKIPPABLE * 2 + streamed(TEXT) + SKIPPABLE,
        b"a" + TEXT,
    ),
    "zstd only skippable": (ZSTD, SKIPPABLE, b""),
    "tar": (NONE, NOISE, NOISE),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("step", [300, 70_000, 1 << 30])
def test_all_of_the_data_comes_out(case: str, step: int) -> None:
    media_type, data, expected = GOOD[case]
    assert run(media_type, data, step) == expected


@pytest.mark.parametrize("case", ["gzip header fields", "zstd skippable"])
def test_structure_may_be_cut_at_every_byte(case: str) -> None:
    media_type, data, expected = GOOD[case]
    data = data[:2000]
    whole = list(decompressed(media_type, [*cut(GOOD[case][1], 1 << 30)]))
    assert b"".join(whole) == expected
    for at in range(len(data)):
        pieces = decompressed(media_type, [GOOD[case][1][:at], b"", GOOD[case][1][at:]])
        assert b"".join(pieces) == expected, at


def test_every_single_byte_alone() -> None:
    data = member(b"abc" * 1000, 30) + member(b"", 2)
    assert run(GZIP, data, 1) == b"abc" * 1000
    data = SKIPPABLE + streamed(b"abc" * 1000) + frame(b"def", write_checksum=True)
    assert run(ZSTD, data, 1) == b"abc" * 1000 + b"def"


TRUNCATED = {case: GOOD[case] for case in ("gzip", "gzip members", "zstd", "zstd streamed", "zstd frames")}


@pytest.mark.parametrize("case", TRUNCATED)
@pytest.mark.parametrize("missing", [1, 2, 4, 7, 8, 9, 100])
def test_truncation_is_refused(case: str, missing: int) -> None:
    media_type, data, _ = GOOD[case]
    with pytest.raises(UnsupportedImage, match=r"ends early|damaged"):
        run(media_type, data[:-missing])


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
def test_no_data_at_all_is_refused(media_type: str) -> None:
    with pytest.raises(UnsupportedImage, match="ends early"):
        run(media_type, b"")


@pytest.mark.parametrize(
    "junk", [b"\0", b"\0" * 512, b"\x1f", b"\x1f\x8b", b"junk", b"\x28\xb5\x2f\xfd", b"P*M\x18"]
)
@pytest.mark.parametrize("case", ["gzip", "gzip members", "zstd", "zstd frames", "zstd skippable"])
def test_bytes_after_the_last_member_are_refused(case: str, junk: bytes) -> None:
    media_type, data, _ = GOOD[case]
    with pytest.raises(UnsupportedImage, match=r"no member|no frame|ends early"):
        run(media_type, data + junk)


@pytest.mark.parametrize("case", ["gzip", "gzip of noise", "zstd with checksum", "zstd streamed"])
def test_a_flipped_bit_is_noticed(case: str) -> None:
    media_type, data, expected = GOOD[case]
    rng = random.Random(case)
    places = [
        *range(1, 24),
        *(rng.randrange(len(data)) for _ in range(100)),
        *range(len(data) - 8, len(data)),
    ]
    for at in places:
        bad = bytearray(data)
        bad[at] ^= 1 << rng.randrange(8)
        try:
            result = run(media_type, bytes(bad))
        except UnsupportedImage:
            continue
        # Time and operating system in a gzip header mean nothing, a larger window does no harm.
        assert result == expected
        assert at < 10


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
def test_what_is_not_compressed_is_refused(media_type: str) -> None:
    with pytest.raises(UnsupportedImage, match=r"not (gzip|zstd) data"):
        run(media_type, NOISE)


def test_other_header_values_of_gzip_are_refused() -> None:
    for at, value in ((2, 7), (3, 0x20), (3, 0x80)):
        data = bytearray(member(b"x"))
        data[at] = value
        with pytest.raises(UnsupportedImage, match="unknown"):
            run(GZIP, bytes(data))


def test_an_endless_name_in_a_gzip_header_is_refused() -> None:
    with pytest.raises(UnsupportedImage, match="name or comment"):
        run(GZIP, b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 200_000)


def test_a_window_over_the_limit_is_refused() -> None:
    wide = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    data = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    with pytest.raises(UnsupportedImage, match="window of 268435456 bytes"):
        run(ZSTD, data.compress(b"x" * 1000) + data.flush())


def test_the_largest_window_is_accepted() -> None:
    wide = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    data = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    assert run(ZSTD, data.compress(TEXT) + data.flush()) == TEXT


def test_a_dictionary_is_refused() -> None:
    dictionary = zstandard.ZstdCompressionDict(NOISE[:1000], dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    data = bytearray(frame(b"x" * 100))
    assert dictionary is not None
    data[4] |= 1
    with pytest.raises(UnsupportedImage, match="dictionary"):
        run(ZSTD, bytes(data))


@pytest.mark.parametrize("size", [0, 7, 200])
def test_a_frame_of_another_length_than_it_says_is_refused(size: int) -> None:
    # With an empty block at its end: for the last block alone the library does not compare.
    text = (6 << 3).to_bytes(3, "little") + b"abcdef"
    blocks = (text if size else b"") + (1).to_bytes(3, "little")
    with pytest.raises(UnsupportedImage, match="not as long"):
        run(ZSTD, b"\x28\xb5\x2f\xfd\x20" + bytes([size or 45]) + blocks)
    good = b"\x28\xb5\x2f\xfd\x20" + bytes([6 if size else 0]) + blocks
    assert run(ZSTD, good) == (b"abcdef" if size else b"")


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_compressed_block_without_bytes_is_refused(step: int) -> None:
    """The library's own answer depends on where the input is cut."""
    for last in (0, 1):
        block = (2 << 1 | last).to_bytes(3, "little")
        blob = b"\x28\xb5\x2f\xfd\x20\0" + block
        with pytest.raises(UnsupportedImage, match="no bytes"):
            run(ZSTD, blob, step)


def bomb(blocks: int) -> bytes:
    """A zstd frame of 128 KiB for every four bytes: run-length blocks."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = (1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * blocks + last


def test_a_bomb_comes_in_bounded_pieces_and_ends_at_the_limit() -> None:
    sizes: list[int] = []
    with pytest.raises(UnsupportedImage, match="more than 50000000 bytes"):
        sizes.extend(map(len, decompressed(ZSTD, [bomb(100_000)], limit=50_000_000)))
    assert max(sizes) <= PIECE
    assert 40_000_000 < sum(sizes) <= 50_000_000


def test_a_gzip_bomb_ends_at_the_limit() -> None:
    with pytest.raises(UnsupportedImage, match="more than 3000000 bytes"):
        run(GZIP, gzip.compress(bytes(30_000_000)), limit=3_000_000)


@pytest.mark.parametrize("case", GOOD)
def test_the_limit_itself_is_allowed(case: str) -> None:
    media_type, data, expected = GOOD[case]
    assert run(media_type, data, limit=len(expected)) == expected
    if expected:
        with pytest.raises(UnsupportedImage, match="more than"):
            run(media_type, data, limit=len(expected) - 1)


def test_a_wrong_blob_is_told_from_a_bad_one() -> None:
    def chunks() -> Iterable[bytes]:
        yield from cut(b"\x1f\x8b\x08" + NOISE, 1000)
        raise DigestMismatch(what="blob", expected="a", actual="b")

    with pytest.raises(DigestMismatch):
        list(decompressed(GZIP, chunks()))


def test_media_types() -> None:
    assert {TAR_LAYERS[kind] for kind in (GZIP, ZSTD, NONE)} == set(Compression)
    with pytest.raises(UnsupportedImage, match="octet-stream"):
        run("application/octet-stream", b"")
