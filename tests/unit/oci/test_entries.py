"""Entries of a layer, read back from the chunks of its stream."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    External,
    Fifo,
    Inline,
    Stat,
    Symlink,
    makedev,
)
from hostimaged.errors import CorruptRepository, UnsupportedImage
from hostimaged.ids import DiffId, ObjectId
from hostimaged.oci import tar
from hostimaged.oci.entries import Entry, HardLink, KeptEntries, LayerEntries, read_entries
from hostimaged.oci.layer_import import import_layer
from hostimaged.progress import Silent

ID = ObjectId(bytes(range(32)))


def entries(*chunks: bytes | ObjectId) -> list[Entry]:
    return list(read_entries(chunks))


def one(data: bytes) -> Entry:
    (entry,) = entries(data + tars.END)
    return entry


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (tars.directory(b"x/"), None),
        (tars.file(b"x", b""), Inline(b"")),
        (tars.file(b"x", b"a" * 64), Inline(b"a" * 64)),
        (tars.header(b"x", 0, b"1", link=b"/a//./b/"), HardLink((b"a", b"b"))),
        (tars.header(b"x", 0, b"2", link=b"../a/./b/"), Symlink(b"../a/./b/")),
        (tars.header(b"x", 0, b"3", device=(5, 1)), CharDevice(makedev(5, 1))),
        (
            tars.header(b"x", 0, b"4", device=(0o7777777, 0o7777777)),
            BlockDevice(makedev(0o7777777, 0o7777777)),
        ),
        (tars.header(b"x", 0, b"6"), Fifo()),
        (tars.header(b"x", 3, b"7") + tars.padded(b"abc"), Inline(b"abc")),
    ],
)
def test_items(data: bytes, item: object) -> None:
    assert one(data).item == item


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (b"usr/bin/", (b"usr", b"bin")),
        (b"/x", (b"x",)),
        (b"./", ()),
        (b".", ()),
        (b"/", ()),
        (b"//x", (b"x",)),
        (b"./usr", (b"usr",)),
        (b"a/./b//c/.", (b"a", b"b", b"c")),
    ],
)
def test_paths(path: bytes, names: tuple[bytes, ...]) -> None:
    assert one(tars.directory(path)).path == names


def test_metadata() -> None:
    extended = tars.pax((b"mtime", b"5.25"), (b"SCHILY.xattr.user.a", b"b"), (b"uid", b"4294967297"))
    entry = one(extended + tars.file(b"x", b"", mode=0o104755, gid=7))
    assert entry.stat == Stat(0o104755, 1, 7, 5, 250_000_000, {b"user.a": b"b"})


def test_external_content() -> None:
    data = (
        tars.header(b"x", 65),
        ID,
        bytes(512 - 65) + tars.header(b"y", 1024),
        ID,
        tars.file(b"z", b"1") + tars.END,
    )
    assert [entry.item for entry in entries(*data)] == [External(ID, 65), External(ID, 1024), Inline(b"1")]


def test_chunks_may_be_cut_anywhere() -> None:
    data = tars.gnu_long(b"L", b"n" * 250) + tars.file(b"x", b"abc") + tars.directory(b"d") + tars.END
    whole = entries(data)
    for step in (1, 100, 511, 513):
        assert entries(*(data[at : at + step] for at in range(0, len(data), step))) == whole


def test_nothing_after_the_end_marker_is_looked_at() -> None:
    assert len(entries(tars.file(b"x", b"") + tars.END + b"junk", ID)) == 1


@pytest.mark.parametrize(
    "chunks",
    [
        (tars.header(b"x", 65) + bytes(512),),
        (tars.header(b"x", 65),),
        (tars.header(b"x", 65), ID, bytes(10)),
        (tars.header(b"x", 65), ID),
        (tars.header(b"x", 10), ID),
        (tars.header(b"x", 10) + bytes(100),),
        (tars.header(b"x", 10) + bytes(100), ID),
        (tars.header(b"x", 10),),
        (tars.header(b"x")[:100],),
        (tars.header(b"x")[:100], ID, tars.header(b"x")[100:]),
        (ID,),
    ],
)
def test_streams_that_were_not_split_by_the_rules(chunks: tuple[bytes | ObjectId, ...]) -> None:
    with pytest.raises(CorruptRepository, match="layer"):
        entries(*chunks)


def test_what_no_layer_should_hold() -> None:
    # Another program may have imported it.
    with pytest.raises(UnsupportedImage, match=r"tar entry 2: .*upwards"):
        entries(tars.file(b"x", b"") + tars.file(b"../up", b""))


def test_vectors_of_composefs_rs(tmp_path: Path) -> None:
    # Recorded: the test of composefs-rs 0.9 that reads a layer back.
    ids = {
        4095: "5372beb83c78537c8970c8361e3254119fafdf1763854ecd57d3f0fe2da7c719",
        4096: "babc284ee4ffe7f449377fbf6692715b43aec7bc39c094a95878904d34bac97e",
        4097: "093756e4ea9683329106d4a16982682ed182c14bf076463a9e7f97305cbac743",
    }
    data = b"".join(tars.file(b"file%d" % size, bytes(size), mode=0o700) for size in (0, *ids)) + tars.END
    made, _ = Repository.init(tmp_path / "repo", algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    with made as repository:
        diff_id = DiffId.of_hash(Algorithm.SHA256.new(data).hexdigest())
        layer = import_layer(repository, [data], diff_id, Silent())
        with repository.open_stream("", layer.stream_id) as stream:
            found = list(read_entries(stream.chunks()))
    expected: list[object] = [Inline(b"")]
    expected += [External(ObjectId.fromhex(id_), size) for size, id_ in ids.items()]
    assert [entry.item for entry in found] == expected
    assert [entry.stat.mode for entry in found] == [0o700] * 4
    assert digest(Algorithm.SHA256, bytes(4096)).hex() == ids[4096]


def test_entries_of_an_import_are_kept_within_a_limit(tmp_path: Path) -> None:
    layers = [
        b"".join(tars.file(b"%d" % n, bytes(n * 50)) for n in range(at, at + 3)) + tars.END for at in range(3)
    ]
    made, _ = Repository.init(tmp_path / "repo", algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    kept = KeptEntries(limit=7)
    with made as repository:
        ids = []
        for data in layers:
            diff_id = DiffId.of_hash(Algorithm.SHA256.new(data).hexdigest())
            ids.append(import_layer(repository, [data], diff_id, Silent(), kept=kept).stream_id)
        for id_ in ids[:2]:
            with repository.open_stream("", id_) as stream:
                expected = list(read_entries(stream.chunks()))
            taken = kept.take(id_)
            assert taken is not None
            assert list(taken) == expected
            assert kept.take(id_) is None
        assert kept.take(ids[2]) is None


def gathered(kept: KeptEntries, data: bytes) -> LayerEntries:
    """The entries of a layer without objects, on their way."""
    found = kept.gather()
    reader = tar.HeaderReader(io.BytesIO(data).read)
    while (header := reader.read()) is not None:
        found.add(header, b"")
    return found


def layer_id(number: int) -> ObjectId:
    return ObjectId(bytes([number]) * 32)


def files(count: int) -> bytes:
    return b"".join(tars.file(b"%d" % n, b"") for n in range(count)) + tars.END


def test_layers_at_once_share_the_limit() -> None:
    kept = KeptEntries(limit=3000)
    one, other = gathered(kept, files(1800)), gathered(kept, files(1800))
    assert other.finish() is None, "the first has taken two thousand"
    kept.keep(layer_id(1), one)
    kept.keep(layer_id(2), other)
    assert kept.take(layer_id(2)) is None
    assert len(list(kept.take(layer_id(1)) or ())) == 1800
    # What the other had reserved, and what the first did not need, may be used.
    kept.keep(layer_id(3), gathered(kept, files(1200)))
    assert len(list(kept.take(layer_id(3)) or ())) == 1200


def test_a_layer_that_is_kept_already_takes_no_room() -> None:
    kept = KeptEntries(limit=10)
    for _ in range(3):
        kept.keep(layer_id(1), gathered(kept, files(5)))
    kept.keep(layer_id(2), gathered(kept, files(5)))
    assert kept.take(layer_id(2)) is not None


LARGE = 60_000


@pytest.mark.parametrize(
    "large",
    [
        tars.pax((b"SCHILY.xattr.user.a", b"v" * LARGE)) + tars.file(b"x", b""),
        tars.pax(*((b"SCHILY.xattr.user.%d" % n, b"") for n in range(LARGE // 100))) + tars.file(b"x", b""),
    ],
    ids=["a large value", "many names"],
)
def test_attributes_count(large: bytes) -> None:
    kept = KeptEntries(max_size=3 * LARGE)
    kept.keep(layer_id(1), gathered(kept, large * 2 + tars.END))
    kept.keep(layer_id(2), gathered(kept, large * 2 + tars.END))
    assert kept.take(layer_id(1)) is not None
    assert kept.take(layer_id(2)) is None


@pytest.mark.parametrize(
    "long",
    [
        tars.pax((b"path", b"a/" * 1500 + b"x")) + tars.file(b"x", b""),
        tars.pax((b"linkpath", b"t" * 4000)) + tars.header(b"x", kind=b"2", link=b"t"),
        tars.pax((b"linkpath", b"a/" * 1500 + b"x")) + tars.header(b"x", kind=b"1", link=b"t"),
    ],
    ids=["path", "symbolic link", "hard link"],
)
def test_paths_and_targets_count(long: bytes) -> None:
    kept = KeptEntries(max_size=400_000)
    kept.keep(layer_id(1), gathered(kept, long * 100 + tars.END))
    assert kept.take(layer_id(1)) is None
    kept.keep(layer_id(2), gathered(kept, files(100)))
    assert kept.take(layer_id(2)) is not None


def test_a_header_in_a_million_chunks_takes_no_longer_than_they_do() -> None:
    path = b"p" * 200
    comment = tars.pax((b"comment", b"x" * 1_000_000), (b"path", path))
    data = comment + tars.file(b"cut", b"") + tars.END
    start = time.monotonic()
    (entry,) = read_entries(data[at : at + 1] for at in range(len(data)))
    assert entry.path == (path,)
    # Joining them one by one takes minutes.
    assert time.monotonic() - start < 10
