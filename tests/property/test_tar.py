"""Random archives, as tarfile writes them and as nobody does: bit for bit back, and well understood."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimage_testing import tars
from hostimaged.composefs import splitstream
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import BlockDevice, CharDevice, External, Fifo, Inline, Symlink, makedev
from hostimaged.errors import HostimageError, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.entries import Entry, HardLink, KeptEntries, read_entries
from hostimaged.oci.layer_import import ImportedLayer, import_layer
from hostimaged.oci.paths import split_path
from hostimaged.oci.tar import HeaderReader
from hostimaged.progress import Silent


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(tmp_path / "repo", algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)[
        0
    ] as made:
        yield made


def imported(repository: Repository, data: bytes, step: int) -> ImportedLayer:
    """Import; what is kept of the entries is what is read back."""
    pieces = (data[at : at + step] for at in range(0, len(data), step))
    diff_id = DiffId.of_hash(hashlib.sha256(data).hexdigest())
    kept = KeptEntries()
    layer = import_layer(repository, pieces, diff_id, Silent(), kept=kept)
    taken = kept.take(layer.stream_id)
    assert taken is not None
    assert list(taken) == entries(repository, layer)
    return layer


def cat(repository: Repository, layer: ImportedLayer) -> bytes:
    parts: list[bytes] = []
    with repository.open_stream("", layer.stream_id, ContentType.LAYER) as stream:
        splitstream.cat(stream, repository, lambda piece: parts.append(bytes(piece)))
    return b"".join(parts)


def entries(repository: Repository, layer: ImportedLayer) -> list[Entry]:
    with repository.open_stream("", layer.stream_id, ContentType.LAYER) as stream:
        return list(read_entries(stream.chunks()))


# Names as tarfile takes them: text, with bytes that are not UTF-8 as lone surrogates.
NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: name not in (b".", b"..") and not set(name) & {0, 47}
)
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(b"/".join)
LONG_PATHS = st.lists(NAMES, min_size=4, max_size=12).map(b"/".join)
KINDS = [
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
]
SIZES = st.sampled_from([0, 1, 63, 64, 65, 511, 512, 513, 5000])


@st.composite
def members(draw: st.DrawFn, format_: int) -> tuple[tarfile.TarInfo, bytes]:
    """A member with its content, within what ``format_`` can say."""
    ustar = format_ == tarfile.USTAR_FORMAT
    info = tarfile.TarInfo(draw(PATHS if ustar else PATHS | LONG_PATHS).decode("utf-8", "surrogateescape"))
    info.type = draw(st.sampled_from(KINDS))
    largest = 0o7777777 if ustar else 2**32 - 1
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, largest)), draw(st.integers(0, largest))
    info.mtime = draw(st.integers(0, 0o77777777777 if ustar else 2**40))
    if format_ == tarfile.PAX_FORMAT and draw(st.booleans()):
        info.pax_headers = {"SCHILY.xattr.user.x": draw(st.text(max_size=20)), "mtime": f"{info.mtime}.25"}
    content = b""
    if info.type == tarfile.REGTYPE:
        content = draw(st.binary(min_size=1, max_size=3)) * draw(SIZES)
    elif info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = draw(PATHS if ustar else PATHS | LONG_PATHS).decode("utf-8", "surrogateescape")
    elif info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 0o777777))
    info.size = len(content)
    return info, content


@st.composite
def archives(draw: st.DrawFn) -> tuple[bytes, list[tuple[tarfile.TarInfo, bytes]]]:
    format_ = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    found: list[tuple[tarfile.TarInfo, bytes]] = []
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format_, errors="surrogateescape") as archive:
        for info, content in draw(st.lists(members(format_), max_size=8)):
            try:
                archive.addfile(info, io.BytesIO(content))
            except ValueError:
                continue  # a path that ustar cannot split
            found.append((info, content))
    return raw.getvalue(), found


def expected_item(info: tarfile.TarInfo, content: bytes) -> object:
    link = info.linkname.encode("utf-8", "surrogateescape")
    match info.type:
        case tarfile.DIRTYPE:
            return None
        case tarfile.REGTYPE if len(content) > 64:
            return External(digest(Algorithm.SHA256, content), len(content))
        case tarfile.REGTYPE:
            return Inline(content)
        case tarfile.SYMTYPE:
            return Symlink(link)
        case tarfile.LNKTYPE:
            return HardLink(tuple(split_path(link)))
        case tarfile.FIFOTYPE:
            return Fifo()
        case tarfile.CHRTYPE:
            return CharDevice(makedev(info.devmajor, info.devminor))
        case _:
            return BlockDevice(makedev(info.devmajor, info.devminor))


@settings(max_examples=60)
@given(archives(), st.sampled_from([513, 10_000, 1 << 20]))
def test_archives_of_tarfile(
    repository: Repository, archive: tuple[bytes, list[tuple[tarfile.TarInfo, bytes]]], step: int
) -> None:
    data, found = archive
    layer = imported(repository, data, step)
    assert cat(repository, layer) == data
    read = entries(repository, layer)
    assert len(read) == len(found)
    for entry, (info, content) in zip(read, found, strict=True):
        assert entry.path == tuple(split_path(info.name.encode("utf-8", "surrogateescape")))
        assert entry.item == expected_item(info, content)
        stat = entry.stat
        assert (stat.mode & 0o7777, stat.uid, stat.gid) == (info.mode, info.uid, info.gid)
        assert (stat.mtime, stat.nsec) == (info.mtime, 250_000_000 if "mtime" in info.pax_headers else 0)
        xattr = info.pax_headers.get("SCHILY.xattr.user.x")
        assert stat.xattrs == ({} if xattr is None else {b"user.x": xattr.encode()})


FILL = st.sampled_from([b"\0", b"\xff", b"x"])
ENTRIES = st.one_of(
    st.builds(tars.directory, PATHS),
    st.builds(
        tars.file,
        NAMES,
        st.binary(max_size=1200),
        FILL,
        magic=st.sampled_from([tars.USTAR, tars.GNU, tars.OLD]),
    ),
    st.builds(lambda name, target: tars.header(name, 0, b"2", link=target), NAMES, NAMES),
    st.builds(
        lambda name, content: tars.gnu_long(b"L", name) + tars.file(b"x", content),
        PATHS,
        st.binary(max_size=99),
    ),
    st.builds(lambda text: tars.pax((b"comment", text), kind=b"g"), st.binary(max_size=2000)),
    st.builds(lambda name: tars.pax((b"path", name), (b"mtime", b"1.5")) + tars.file(b"x", b"y" * 99), PATHS),
)
ENDS = st.one_of(
    st.just(b""),
    st.just(tars.END),
    st.integers(0, 40).map(lambda blocks: tars.END + bytes(512 * blocks)),
    st.binary(max_size=1500).map(lambda rest: tars.END + rest),
)


@settings(max_examples=60)
@given(st.lists(ENTRIES, max_size=10).map(b"".join), ENDS, st.integers(100, 3000))
def test_archives_that_no_tool_writes(repository: Repository, body: bytes, end: bytes, step: int) -> None:
    # Without an end marker the last entry has content.
    data = body + (end or tars.file(b"last", b"x"))
    assert cat(repository, imported(repository, data, step)) == data


@settings(max_examples=150)
@given(st.lists(ENTRIES, min_size=1, max_size=4).map(b"".join), st.data())
def test_damaged_archives_are_refused_or_come_back(
    repository: Repository, good: bytes, draw: st.DataObject
) -> None:
    data = bytearray(good + tars.END)
    for at in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[at] = draw.draw(st.integers(0, 255))
    del data[draw.draw(st.integers(len(data) // 2, len(data))) :]
    try:
        layer = imported(repository, bytes(data), 1000)
    except UnsupportedImage:
        return
    assert cat(repository, layer) == data
    assert len(entries(repository, layer)) == layer.entries


@given(st.binary(max_size=3000))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    file = io.BytesIO(data)
    reader = HeaderReader(file.read)
    try:
        while reader.read() is not None:
            pass
    except HostimageError:
        pass


def header_with(kind: bytes, content: bytes) -> bytes:
    return tars.header(b"x", len(content), kind) + tars.padded(content) + tars.header(b"y")


@given(st.sampled_from([b"x", b"g", b"L", b"K"]), st.binary(max_size=600))
def test_any_extension_is_understood_or_refused(kind: bytes, content: bytes) -> None:
    file = io.BytesIO(header_with(kind, content))
    try:
        header = HeaderReader(file.read).read()
    except UnsupportedImage:
        return
    assert header is not None
    assert header.path
