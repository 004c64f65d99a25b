"""Tar headers: each form of each field, and everything that is refused."""

from __future__ import annotations

import io

import pytest

from hostimage_testing import tars
from hostimaged.errors import UnsupportedImage
from hostimaged.oci import pax
from hostimaged.oci.tar import (
    BLOCK_DEVICE,
    CHAR,
    CONTIGUOUS,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    REGULAR,
    SYMLINK,
    HeaderReader,
    TarHeader,
    padding,
)


def headers(data: bytes) -> list[TarHeader]:
    """All entries of an archive."""
    file = io.BytesIO(data)

    def take(count: int) -> bytes:
        taken = file.read(count)
        if taken and len(taken) < count:
            raise UnsupportedImage("short")
        return taken

    reader = HeaderReader(take)
    found = []
    while (header := reader.read()) is not None:
        found.append(header)
        file.seek(header.size + padding(header.size), 1)
    assert reader.count == len(found)
    return found


def one(data: bytes) -> TarHeader:
    (header,) = headers(data + tars.END)
    return header


def refused(data: bytes, why: str) -> None:
    with pytest.raises(UnsupportedImage, match=why):
        headers(data + tars.END)


@pytest.mark.parametrize("magic", [tars.USTAR, tars.GNU, tars.OLD])
def test_plain_fields(magic: bytes) -> None:
    header = one(
        tars.header(b"a/b", 65, mode=0o104755, uid=12, gid=34, mtime=1234567890, magic=magic, device=(8, 1))
        + bytes(512)
    )
    assert header == TarHeader(
        kind=REGULAR,
        path=b"a/b",
        link=b"",
        size=65,
        mode=0o104755,
        uid=12,
        gid=34,
        mtime=1234567890,
        nsec=0,
        xattrs={},
        device=None if magic == tars.OLD else (8, 1),
    )
    assert header.is_external


def test_contents_up_to_64_bytes_are_not_external() -> None:
    found = headers(tars.file(b"a", b"x" * 64) + tars.file(b"b", b"x" * 65) + tars.file(b"c", b"") + tars.END)
    assert [header.is_external for header in found] == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (b"0", REGULAR),
        (b"\0", REGULAR),
        (b"1", HARD_LINK),
        (b"2", SYMLINK),
        (b"3", CHAR),
        (b"4", BLOCK_DEVICE),
        (b"5", DIRECTORY),
        (b"6", FIFO),
        (b"7", CONTIGUOUS),
    ],
)
def test_types(kind: bytes, expected: int) -> None:
    assert one(tars.header(b"name", 0, kind, link=b"target")).kind == expected


@pytest.mark.parametrize("kind", [b"8", b"A", b"D", b"M", b"V", b"X", b"\xff", b" "])
def test_unknown_types_are_refused(kind: bytes) -> None:
    refused(tars.header(b"name", 0, kind), "entries of type")


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"S"])
def test_old_headers_have_no_extensions(kind: bytes) -> None:
    refused(tars.header(b"name", 0, kind, magic=tars.OLD), r"entries of type|sparse")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"644\0junk", 0o644),
        (b"\t\v644\r\n ", 0o644),
        (b"+0000644", 0o644),
        (b"77777777", 0o77777777),
        (b"        ", 0),
        (b"\0" * 8, 0),
        (tars.base256(0o644, 8), 0o644),
        (tars.base256(2**31, 8), 2**31),
        (tars.base256(-2, 8), 2**32 - 2),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    header = one(tars.header(b"f", mode=field, uid=field, gid=field))
    assert (header.mode, header.uid, header.gid) == (value, value, value)


@pytest.mark.parametrize(
    "field", [b"0000648\0", b"-0000644", b"64 4\0", b"0x1a4\0", b"6\xc3\xa9\0", b"++1\0"]
)
def test_numbers_that_are_none_are_refused(field: bytes) -> None:
    for name in ("mode", "uid", "gid", "mtime", "size"):
        refused(tars.header(b"f", **{"size": 0, name: field}), "invalid number")  # type: ignore[arg-type]
    refused(tars.header(b"f", device=field.ljust(8, b"\0")), "invalid number")


def test_device_numbers_are_always_octal() -> None:
    refused(tars.header(b"f", 0, b"3", device=tars.base256(5, 8) * 2), "invalid number")


@pytest.mark.parametrize("mtime", [0, 2**31, 2**33 + 7, 2**62, -1, -1234567890, -(2**62)])
def test_times_in_binary(mtime: int) -> None:
    assert one(tars.header(b"f", mtime=tars.base256(mtime, 12))).mtime == mtime


def test_large_sizes() -> None:
    file = io.BytesIO(tars.header(b"big", tars.base256(1 << 40, 12)))
    header = HeaderReader(file.read).read()
    assert header is not None
    assert header.size == 1 << 40


@pytest.mark.parametrize(
    "size",
    [tars.base256(-1, 12), tars.base256(1 << 64, 12), tars.base256(1 << 63, 12), b"\xff" + bytes(11)],
)
def test_sizes_beyond_any_file_are_refused(size: bytes) -> None:
    refused(tars.header(b"f", size), "invalid size")
    refused(tars.header(b"f", size, b"g"), r"invalid size|extension headers of over")


def test_the_checksum_is_verified() -> None:
    good = tars.file(b"name", b"")
    for at in (0, 50, 99, 105, 148, 257, 300, 400, 511):
        bad = bytearray(good)
        bad[at] ^= 1
        refused(bytes(bad), "checksum")
    total = int(good[148:154], 8)
    for wrong in (total + 1, total - 1, total + 65521, total - 65521 if total > 65521 else total + 2):
        refused(tars.header(b"name", checksum=wrong), "checksum")


def test_the_checksum_of_a_full_block() -> None:
    name = b"\xff" * 100
    assert (
        one(tars.header(name, prefix=b"\xff" * 155, link=b"\xfe" * 100)).path == b"\xff" * 155 + b"/" + name
    )


def test_paths() -> None:
    assert one(tars.header(b"n" * 100)).path == b"n" * 100
    assert one(tars.header(b"name", prefix=b"some/prefix")).path == b"some/prefix/name"
    assert one(tars.header(b"name", prefix=b"123", magic=tars.GNU)).path == b"name"
    assert one(tars.header(b"name", prefix=b"123", magic=tars.OLD)).path == b"name"
    assert one(tars.gnu_long(b"L", b"l" * 200) + tars.header(b"x", prefix=b"p")).path == b"l" * 200
    assert one(tars.gnu_long(b"L", b"long") + tars.pax((b"path", b"pax")) + tars.header(b"x")).path == b"pax"
    assert one(tars.pax((b"path", b"\xff\xfe")) + tars.header(b"x")).path == b"\xff\xfe"
    assert one(tars.pax((b"path", b"a"), (b"path", b"b")) + tars.header(b"x")).path == b"b"
    assert one(tars.header(b"/abs//./file/")).path == b"/abs//./file/"


def test_link_targets() -> None:
    def link(before: bytes = b"", target: bytes = b"t") -> bytes:
        return one(before + tars.header(b"x", 0, b"2", link=target)).link

    assert link() == b"t"
    assert link(target=b"t" * 100) == b"t" * 100
    assert link(tars.gnu_long(b"K", b"k" * 300)) == b"k" * 300
    assert link(tars.gnu_long(b"K", b"k") + tars.pax((b"linkpath", b"p"))) == b"p"
    assert link(tars.pax((b"linkpath", b"../../up"))) == b"../../up"
    both = tars.gnu_long(b"K", b"k" * 150) + tars.gnu_long(b"L", b"l" * 150)
    assert one(both + tars.header(b"x", 0, b"2")).path == b"l" * 150


def test_pax_numbers() -> None:
    records = [
        (b"uid", b"2147483648"),
        (b"gid", b"4294967297"),
        (b"mtime", b"99999999999.25"),
        (b"size", b"3"),
    ]
    header = one(tars.pax(*records) + tars.header(b"x", 99) + bytes(512))
    assert (header.uid, header.gid, header.size) == (2**31, 1, 3)
    assert (header.mtime, header.nsec) == (99999999999, 250_000_000)


@pytest.mark.parametrize(
    ("text", "nsec"),
    [
        (b"1234567890.123456789", 123456789),
        (b"1234567890.5", 500000000),
        (b"1234567890.000000001", 1),
        (b"1234567890.1234567899", 123456789),
        (b"1234567890", 0),
        (b"1234567890.", 0),
        (b"1234567890.12x", 0),
        (b"1234567890.1.2", 0),
    ],
)
def test_fractions_of_a_second(text: bytes, nsec: int) -> None:
    header = one(tars.pax((b"mtime", text)) + tars.header(b"x"))
    assert (header.mtime, header.nsec) == (1234567890, nsec)


def test_a_repeated_time_has_the_last_seconds_and_the_first_fraction() -> None:
    header = one(tars.pax((b"mtime", b"1.25"), (b"mtime", b"2.5")) + tars.header(b"x"))
    assert (header.mtime, header.nsec) == (2, 250_000_000)


@pytest.mark.parametrize("key", [b"uid", b"gid", b"size", b"mtime"])
@pytest.mark.parametrize(
    "value", [b"", b"-1", b"x", b"1x", b" 1", b"18446744073709551616", b"9" * 5000, b"\xff"]
)
def test_bad_pax_numbers_are_refused(key: bytes, value: bytes) -> None:
    refused(tars.pax((key, value)) + tars.header(b"x"), r"invalid|malformed")


def test_attributes() -> None:
    records = [
        (b"SCHILY.xattr.user.a", b"old"),
        (b"SCHILY.xattr.security.capability", b"\x01\0=\n\xff"),
        (b"SCHILY.xattr.user.a", b"new"),
        (b"LIBARCHIVE.xattr.user.b", b"AA=="),
        (b"comment", b"\xff"),
    ]
    header = one(tars.pax(*records) + tars.header(b"x"))
    assert header.xattrs == {b"user.a": b"new", b"security.capability": b"\x01\0=\n\xff"}
    largest = tars.pax((b"SCHILY.xattr." + b"n" * 255, b"v" * 65535))
    assert one(largest + tars.header(b"x")).xattrs == {b"n" * 255: b"v" * 65535}


@pytest.mark.parametrize("record", [(b"n" * 256, b""), (b"user.x", b"v" * 65536)])
def test_attributes_that_cannot_exist_are_refused(record: tuple[bytes, bytes]) -> None:
    refused(tars.pax((b"SCHILY.xattr." + record[0], record[1])) + tars.header(b"x"), "attribute is larger")


def pax_raw(content: bytes) -> bytes:
    return tars.header(b"PaxHeader", len(content), b"x") + tars.padded(content)


@pytest.mark.parametrize(
    "content",
    [
        b"9 a=b\n",
        b"7 a=b\n",
        b"5 a=b\n",
        b"0 a=b\n",
        b"6 ab\n\n",
        b"4 a\n",
        b"3 \n",
        b"8 \xff\xfe=b\n",
        b"99999999999999999999 a=b\n",
    ],
)
def test_malformed_pax_headers_are_refused(content: bytes) -> None:
    refused(pax_raw(content) + tars.header(b"x"), "malformed pax header")


@pytest.mark.parametrize("junk", [b"junk", b"x a=b\n", b"-6 a=b\n", b"\0" * 20, b"1" * 60])
def test_what_is_no_record_ends_the_list(junk: bytes) -> None:
    assert one(pax_raw(tars.pax_record(b"path", b"new") + junk) + tars.header(b"x")).path == b"new"
    assert list(pax.records(junk)) == []


def test_global_headers_have_no_effect() -> None:
    everything = tars.pax((b"path", b"no"), (b"mtime", b"5"), (b"size", b"7"), kind=b"g")
    header = one(everything + tars.header(b"x", mtime=3))
    assert (header.path, header.mtime, header.size) == (b"x", 3, 0)


def test_a_global_header_ends_what_came_before_it() -> None:
    header = one(
        tars.pax((b"path", b"forgotten")) + tars.pax((b"comment", b"c"), kind=b"g") + tars.header(b"x")
    )
    assert header.path == b"x"


@pytest.mark.parametrize("kind", [b"x", b"L", b"K"])
def test_two_extensions_of_one_kind_are_refused(kind: bytes) -> None:
    extension = {
        b"x": tars.pax((b"comment", b"c")),
        b"L": tars.gnu_long(b"L", b"name"),
        b"K": tars.gnu_long(b"K", b"name"),
    }[kind]
    refused(extension * 2 + tars.header(b"x"), "two extension headers")


def test_extensions_over_a_mebibyte_are_refused() -> None:
    for kind in (b"L", b"x", b"g"):
        refused(tars.header(b"x", (1 << 20) + 1, kind), "extension headers of over")
    half = tars.gnu_long(b"K", b"k" * (1 << 19))
    refused(half + tars.header(b"x", (1 << 19) + 1, b"L"), "extension headers of over")


def test_an_extension_with_nothing_to_extend_is_refused() -> None:
    refused(tars.pax((b"path", b"p")), "ends after an extension header")
    with pytest.raises(UnsupportedImage, match="ends after an extension header"):
        headers(tars.pax((b"path", b"p")))
    with pytest.raises(UnsupportedImage, match="ends inside an extension header"):
        headers(tars.pax((b"path", b"p"))[:512])


@pytest.mark.parametrize(
    "records",
    [
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")],
        [(b"GNU.sparse.map", b"0,1")],
        [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"1")],
        [(b"GNU.sparse.name", b"other")],
        [(b"GNU.sparse.realsize", b"5")],
    ],
)
def test_pax_sparse_files_are_refused(records: list[tuple[bytes, bytes]]) -> None:
    refused(tars.pax(*records) + tars.header(b"x"), "sparse files")


@pytest.mark.parametrize("magic", [tars.GNU, tars.USTAR])
def test_gnu_sparse_files_are_refused(magic: bytes) -> None:
    refused(tars.header(b"x", 0, b"S", magic=magic), "sparse files")


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_content_of_what_has_none_is_refused(kind: bytes) -> None:
    refused(tars.header(b"x", 5, kind, link=b"t") + bytes(512), "has content")
    refused(tars.pax((b"size", b"5")) + tars.header(b"x", 0, kind, link=b"t") + bytes(512), "has content")


def test_devices_need_numbers() -> None:
    assert one(tars.header(b"null", 0, b"3", device=(1, 3))).device == (1, 3)
    refused(tars.header(b"null", 0, b"3", magic=tars.OLD), "device without a number")


@pytest.mark.parametrize(
    "path",
    [
        b"..",
        b"../x",
        b"a/../b",
        b"a/..",
        b"/..",
        b"a/b/../../../c",
        b"a\0b",
        b"n" * 256,
        b"d/" * 2001,
        b"d/" * 2048 + b"d",
    ],
)
def test_paths_that_are_refused(path: bytes) -> None:
    refused(tars.pax((b"path", path)) + tars.header(b"x"), r"upwards|NUL|a name of|levels|path of")
    link = tars.pax((b"linkpath", path)) + tars.header(b"x", 0, b"1")
    refused(link, r"upwards|NUL|a name of|levels|path of")


@pytest.mark.parametrize(
    "path", [b"...", b"..a/b..", b"n" * 255, b".wh." + b"n" * 255, b"d/" * 2000, b"/" * 4096]
)
def test_paths_at_the_limits(path: bytes) -> None:
    assert one(tars.pax((b"path", path)) + tars.header(b"x")).path == path


def test_a_whiteout_of_a_longer_name_is_refused() -> None:
    refused(tars.pax((b"path", b".wh." + b"n" * 256)) + tars.header(b"x"), "a name of")
    refused(tars.pax((b"path", b".wh." + b"n" * 255 + b"/x")) + tars.header(b"x"), "a name of")


def test_empty_paths_are_refused() -> None:
    refused(tars.header(b""), "an empty path")
    refused(tars.pax((b"path", b"")) + tars.header(b"x"), "an empty path")
    refused(tars.header(b"x", 0, b"1"), "an empty path")


def test_symlink_targets_are_bounded() -> None:
    longest = tars.pax((b"linkpath", b"t" * 4095)) + tars.header(b"x", 0, b"2")
    assert one(longest).link == b"t" * 4095
    refused(tars.pax((b"linkpath", b"t" * 4096)) + tars.header(b"x", 0, b"2"), "invalid link target")
    refused(tars.pax((b"linkpath", b"t\0t")) + tars.header(b"x", 0, b"2"), "invalid link target")
    refused(tars.header(b"x", 0, b"2"), "invalid link target")
    refused(tars.pax((b"linkpath", b"")) + tars.header(b"x", 0, b"2", link=b"t"), "invalid link target")


def test_ends() -> None:
    file = tars.file(b"f", b"content")
    assert len(headers(file)) == 1
    assert len(headers(file + tars.END)) == 1
    assert len(headers(file + tars.END + b"anything")) == 1
    assert len(headers(file + tars.END + file)) == 1
    assert headers(b"") == []
    for lone in (bytes(512), bytes(512) + file):
        with pytest.raises(UnsupportedImage, match="lone block"):
            headers(file + lone)


def test_without_an_end_marker_the_last_entry_needs_content() -> None:
    """As composefs-rs, which cannot read an archive back that ends with an entry of no size."""
    assert headers(tars.file(b"a", b"") + tars.file(b"b", b"x"))[-1].path == b"b"
    assert headers(tars.file(b"a", b"") + tars.pax(kind=b"g"))[-1].path == b"a"
    for last in (tars.file(b"b", b""), tars.directory(b"d")):
        with pytest.raises(UnsupportedImage, match="without an end marker"):
            headers(tars.file(b"a", b"x") + last)
