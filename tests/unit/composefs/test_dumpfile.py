"""The dump file: what is read, what is refused, what is written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hostimaged.composefs import dumpfile
from hostimaged.composefs.dumpfile import DumpfileError, parse, write
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.tree import (
    CharDevice,
    Content,
    Directory,
    External,
    ExternalNoVerity,
    Inline,
    Leaf,
    Sparse,
    Stat,
    Symlink,
    lookup,
    makedev,
)
from hostimaged.ids import ObjectId

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512
ROOT = b"/ 0 40755 2 0 0 0 1000.0 - - -\n"
HEX = "f0f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1"
OBJECT = f"{HEX[:2]}/{HEX[2:]}"
ASSETS = Path(__file__).parents[2] / "data/composefs"


def leaf_at(text: bytes, path: bytes) -> Leaf:
    node = lookup(parse(text, SHA256), path)
    assert isinstance(node, Leaf)
    return node


def one(line: str) -> Leaf:
    """The leaf of a tree whose second line is ``line`` (with the path /x)."""
    return leaf_at(ROOT + line.encode(), b"/x")


def rewritten(text: bytes, algorithm: Algorithm = SHA256) -> bytes:
    return b"".join(write(parse(text, algorithm)))


EXAMPLE = rb"""/ 0 40755 4 0 0 0 1000.0 - - -
/again 5 100644 2 0 0 0 1000.0 - hello -
/dash 1 120777 1 0 0 0 0.0 \x2d - -
/dev 0 40755 2 0 0 0 0.0 - - -
/dev/null 0 20666 1 0 0 259 0.0 - - -
/empty_file 0 100644 1 0 0 0 1000.0 - - -
/hole 9000000000000000 100777 1 0 0 0 0.0 - - - user.foo=
/small_file 0 @120000 - - - - 0.0 /again - -
/symlink 7 120777 1 0 0 0 1000.0 /target - -
/usr 0 40755 2 0 0 0 0.0 - - -
/usr/busybox 4096 100755 1 0 0 0 0.0 %b - %b
/usr/ping 7 120777 1 0 0 0 0.0 busybox - - security.capability=\x02\x00\x00\x02\x00\x20\x00\x00
""" % (OBJECT.encode(), HEX.encode())


def test_canonical_text_is_written_as_it_was_read() -> None:
    assert rewritten(EXAMPLE) == EXAMPLE


def test_text_lines_and_file_are_the_same() -> None:
    assert b"".join(write(parse(io.BytesIO(EXAMPLE), SHA256))) == EXAMPLE
    assert b"".join(write(parse(EXAMPLE.splitlines(keepends=True), SHA256))) == EXAMPLE
    assert b"".join(write(parse(EXAMPLE.rstrip(b"\n").split(b"\n"), SHA256))) == EXAMPLE


def test_blank_lines_and_carriage_returns_are_skipped() -> None:
    text = b"\n  \t\n" + EXAMPLE.replace(b"\n", b"\r\n\n")
    assert rewritten(text.rstrip()) == EXAMPLE


def test_what_is_read_of_a_regular_file() -> None:
    object_id = ObjectId.fromhex(HEX)
    assert one("/x 5 100644 1 0 0 0 0.0 - hello -").content == Inline(b"hello")
    assert one(r"/x 5 100644 1 0 0 0 0.0 - a\n\\\x00\x2D -").content == Inline(b"a\n\\\0-")
    # The content's length counts, not SIZE.
    assert one("/x 5 100644 1 0 0 0 0.0 - hello\\x20world -").content == Inline(b"hello world")
    assert one("/x 5 100644 1 0 0 0 0.0 - - -").content == Sparse(5)
    assert one("/x 0 100644 1 0 0 0 0.0 - - -").content == Inline(b"")
    assert one(f"/x 9 100644 1 0 0 0 0.0 {OBJECT} - {HEX.upper()}").content == External(object_id, 9)
    # The path is not looked at when there is a digest.
    assert one(f"/x 9 100644 1 0 0 0 0.0 anything ignored {HEX}").content == External(object_id, 9)
    assert one(f"/x 9 100644 1 0 0 0 0.0 ../objects/{OBJECT} - -").content == ExternalNoVerity(object_id, 9)


def test_numbers() -> None:
    stat = one("/x 0 +00100644 +1 007 4294967295 0 18446744073709551615.999999999 - - -").stat
    assert stat == Stat(0o644, 7, 4294967295, -1, 999999999, {})
    assert one("/x 0 100644 1 0 0 0 5.5 - - -").stat.nsec == 5


def test_type_bits_are_not_kept() -> None:
    assert one("/x 0 104755 1 0 0 0 0.0 - - -").stat.mode == 0o4755


def test_raw_utf8_stands_for_its_bytes() -> None:
    assert one("/x 0 100644 1 0 0 0 0.0 - é -").content == Inline("é".encode())


def test_xattrs_are_sorted_and_the_greater_of_two_values_wins() -> None:
    stat = one(r"/x 0 100644 1 0 0 0 0.0 - - - user.b=1 user.a=- user.b=2 user.c=a=b user.\x3d= =v").stat
    assert stat.xattrs == {
        b"": b"v", b"user.=": b"", b"user.a": b"-", b"user.b": b"2", b"user.c": b"a=b",
    }  # fmt: skip
    assert list(stat.xattrs) == sorted(stat.xattrs)


def test_hard_links_are_one_leaf() -> None:
    text = ROOT + (
        b"/a 1 100644 1 0 0 0 0.0 - x -\n/b 0 @100000 - - - - - /a\n/c 0 @120000 x y z - - /b - - junk\n"
    )
    root = parse(text, SHA256)
    assert root.entries[b"a"] is root.entries[b"b"] is root.entries[b"c"]


def test_root_given_again_replaces_its_metadata() -> None:
    root = parse(EXAMPLE + b"/ 0 40700 2 1 2 0 3.4 - - - user.a=b\n", SHA256)
    assert root.stat == Stat(0o700, 1, 2, 3, 4, {b"user.a": b"b"})
    assert b"usr" in root.entries


def test_directory_given_again_is_replaced_with_all_in_it() -> None:
    below = b"/d 0 40755 2 0 0 0 0.0 - - -\n/d/e 0 40755 2 0 0 0 0.0 - - -\n"
    again = ROOT + below + b"/d 0 40700 2 0 0 0 0.0 - - -\n"
    node = parse(again, SHA256).entries[b"d"]
    assert isinstance(node, Directory)
    assert (node.stat.mode, node.entries) == (0o700, {})
    with pytest.raises(DumpfileError, match="parent"):
        parse(again + b"/d/e/f 0 40755 2 0 0 0 0.0 - - -\n", SHA256)
    with pytest.raises(DumpfileError, match="/d is replaced"):
        parse(ROOT + below + b"/d/e/f 0 100644 1 0 0 0 0.0 - - -\n/d 0 40700 2 0 0 0 0.0 - - -\n", SHA256)


def test_file_given_again_is_refused_unless_another_name_keeps_it() -> None:
    twice = ROOT + b"/a 1 100644 1 0 0 0 0.0 - x -\n"
    with pytest.raises(DumpfileError, match="/a is replaced"):
        parse(twice + b"/a 1 100644 1 0 0 0 0.0 - y -\n", SHA256)
    text = twice + b"/b 0 @120000 - - - - 0.0 /a - -\n/a 1 100644 1 0 0 0 0.0 - y -\n"
    assert leaf_at(text, b"/a").content == Inline(b"y")
    assert leaf_at(text, b"/b").content == Inline(b"x")
    # The name now means the later file.
    assert leaf_at(text + b"/c 0 @120000 - - - - 0.0 /a - -\n", b"/c").content == Inline(b"y")


LONG = "n" * 4096
BAD_LINES = [
    ("foo 0 100644 1 0 0 0 0.0 - - -", "canonical"),
    ("/a//b 0 100644 1 0 0 0 0.0 - - -", "canonical"),
    ("/a/ 0 100644 1 0 0 0 0.0 - - -", "canonical"),
    ("/. 0 100644 1 0 0 0 0.0 - - -", "canonical"),
    ("/a/.. 0 100644 1 0 0 0 0.0 - - -", "canonical"),
    (f"/{LONG} 0 100644 1 0 0 0 0.0 - - -", "too long"),
    (r"/a\x00 0 100644 1 0 0 0 0.0 - - -", "NUL"),
    (" 0 100644 1 0 0 0 0.0 - - -", "empty"),
    (r"/a\q 0 100644 1 0 0 0 0.0 - - -", "escape"),
    (r"/a\x4 0 100644 1 0 0 0 0.0 - - -", "escape"),
    ("/a\\ 0 100644 1 0 0 0 0.0 - - -", "escape"),
    ("/a 0 40755 2 0 0 42 0.0 - - -", "device number"),
    ("/a  100644 1 0 0 0 0.0 - - -", "size"),
    ("/a -1 100644 1 0 0 0 0.0 - - -", "size"),
    ("/a 1_0 100644 1 0 0 0 0.0 - - -", "size"),
    ("/a 18446744073709551616 100644 1 0 0 0 0.0 - - -", "size"),
    (f"/a {'1' * 5000} 100644 1 0 0 0 0.0 - - -", "size"),
    ("/a 0 100648 1 0 0 0 0.0 - - -", "mode"),
    ("/a 0 40000100644 1 0 0 0 0.0 - - -", "mode"),
    ("/a 0 100644 1 4294967296 0 0 0.0 - - -", "user"),
    ("/a 0 100644 1 0 0x0 0 0.0 - - -", "group"),
    ("/a 0 100644 1 0 0 0 0 - - -", "modification time"),
    ("/a 0 100644 1 0 0 0 -1.0 - - -", "modification time"),
    ("/a 0 100644 1 0 0 0 0.1000000000 - - -", "nanoseconds"),
    ("/a 0 10777 1 0 0 0 0.0 - foobar -", "content"),
    (f"/a 0 40755 2 0 0 0 0.0 - - {HEX}", "digest"),
    ("/a 0 120777 1 0 0 0 0.0 - - -", "without a target"),
    (f"/a 0 120777 1 0 0 0 0.0 {'t' * 1025} - -", "too long"),
    ("/a 3 0 1 0 0 0 0.0 - - -", "file type"),
    (f"/a 513 100644 1 0 0 0 0.0 - {'c' * 513} -", "inline content"),
    (f"/a 1 100644 1 0 0 0 0.0 - c {HEX}", "digest"),
    (f"/a 1 100644 1 0 0 0 0.0 {OBJECT} - {HEX[:-2]}", "digest"),
    ("/a 1 100644 1 0 0 0 0.0 foo - -", "object"),
    ("/a 4096 @40555 2 0 0 0 1633950376.0 / - -", "directory"),
    ("/a 0 @120000 - - - - 0.0 /a - -", "does not come before"),
    ("/a 0 @120000 - - - - 0.0 - - -", "without a target"),
    ("/a 0 @120000 - - - - 0.0 later - -", "canonical"),
    ("/a 0 20644 2 0 0 0 0.0 - - -", "whiteout"),
    ("/nowhere/a 0 100644 1 0 0 0 0.0 - - -", "parent"),
    ("/f/a 0 100644 1 0 0 0 0.0 - - -", "parent"),
    ("/a 0 100644 1 0 0 0 0.0 -", "missing"),
    ("/a 0 100644", "missing"),
    ("/a 0 100644 1 0 0 0 0.0 - - - novalue", "without ="),
    ("/a 0 100644 1 0 0 0 0.0 - - -  user.a=b", "without ="),
    (f"/a 0 100644 1 0 0 0 0.0 - - - {'k' * 256}=v", "too long"),
    (f"/a 0 100644 1 0 0 0 0.0 - - - k={'v' * 65536}", "too long"),
    (r"/a 0 100644 1 0 0 0 0.0 - - - k\x00=v", "NUL"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line(line: str, reason: str) -> None:
    text = ROOT + b"/f 0 100644 1 0 0 0 0.0 - - -\n" + line.encode() + b"\n"
    with pytest.raises(DumpfileError, match="^some.dump, line 3: .*" + reason):
        parse(text, SHA256, name="some.dump")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no entry for /"),
        (b"\n\n", "no entry for /"),
        (b"/a 0 40755 2 0 0 0 0.0 - - -\n", "the first entry is not /"),
        (b"/ 0 @40755 2 0 0 0 0.0 / - -\n", "hard link"),
        (b"/ 0 40755 2 0 0 42 0.0 - - -\n", "device number"),
        (ROOT + b"/\xff 0 100644 1 0 0 0 0.0 - - -\n", "UTF-8"),
    ],
)
def test_bad_file(text: bytes, reason: str) -> None:
    with pytest.raises(DumpfileError, match=reason):
        parse(text, SHA256)


def test_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumpfile, "MAX_LINE", 100)
    with pytest.raises(DumpfileError, match="line 1: line is too long"):
        parse(io.BytesIO(b"x" * 10_000), SHA256)


def test_entries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumpfile, "MAX_ENTRIES", 3)
    lines = [b"/d%d 0 40755 2 0 0 0 0.0 - - -\n" % i for i in range(3)]
    with pytest.raises(DumpfileError, match="too many entries"):
        parse([ROOT, *lines], SHA256)


# Those of C composefs that composefs-rs refuses too; the others are about limits that differ.
REFUSED = [
    "should-fail-dir-hardlink",
    "should-fail-dot-name",
    "should-fail-dotdot-name",
    "should-fail-empty-link-name",
    "should-fail-empty-name",
    "should-fail-no-ftype",
    "should-fail-self-hardlink",
    "should-fail-long-link",
    "should-fail-big-inline",
]


@pytest.mark.parametrize("asset", REFUSED)
def test_refused_file_of_c_composefs(asset: str) -> None:
    with pytest.raises(DumpfileError), (ASSETS / f"{asset}.dump").open("rb") as file:
        parse(file, SHA256)


def leaf(
    content: Content, mode: int = 0o644, mtime: int = 0, xattrs: dict[bytes, bytes] | None = None
) -> Leaf:
    return Leaf(Stat(mode, 0, 0, mtime, 0, xattrs or {}), content)


def written(name: bytes, node: Leaf) -> str:
    root = Directory(Stat(0o755, 0, 0, 0, 0, {}), {name: node})
    return list(write(root))[1].decode()


def test_escapes_as_written() -> None:
    every = bytes(c for c in range(1, 256) if c != ord("/"))
    line = written(every, leaf(Symlink(b"- a=\xc3\xa9")))
    assert line.split()[8] == r"-\x20a=\xc3\xa9"
    assert r"/\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e" in line
    assert r"[\\]^_`" in line
    assert r"~\x7f\x80" in line
    node = lookup(parse(ROOT + line.encode(), SHA256), every)
    assert isinstance(node, Leaf)


def test_xattrs_as_written() -> None:
    line = written(b"x", leaf(Inline(b""), xattrs={b"user.z": b"-", b"user.=": b"a=b", b"user.e": b""}))
    assert line == "/x 0 100644 1 0 0 0 0.0 - - - user.\\x3d=a\\x3db user.e= user.z=-\n"


def test_odd_values_as_written() -> None:
    assert written(b"x", leaf(Inline(b"-"))) == "/x 1 100644 1 0 0 0 0.0 - \\x2d -\n"
    assert written(b"x", leaf(Inline(b"--"))) == "/x 2 100644 1 0 0 0 0.0 - -- -\n"
    assert written(b"x", leaf(Inline(b""), mtime=-5)) == "/x 0 100644 1 0 0 0 -5.0 - - -\n"
    # A mode that came with type bits is written as it is.
    assert written(b"x", leaf(CharDevice(5), mode=0o100644)) == "/x 0 120644 1 0 0 5 0.0 - - -\n"


def test_file_without_verity_is_written_with_its_digest() -> None:
    for algorithm in Algorithm:
        object_id = digest(algorithm, b"x")
        line = written(b"x", leaf(ExternalNoVerity(object_id, 7)))
        assert line == f"/x 7 100644 1 0 0 0 0.0 {object_id.pathname} - {object_id.hex()}\n"
        assert rewritten(ROOT + line.encode(), algorithm) == ROOT + line.encode()


def test_first_name_in_walk_order_holds_the_hard_link() -> None:
    text = ROOT.replace(b"40755 2", b"40755 3") + (
        b"/z 1 100644 2 0 0 0 0.0 - x -\n/d 0 40755 2 0 0 0 0.0 - - -\n/d/a 0 @120000 - - - - 0.0 /z - -\n"
    )
    assert rewritten(text).splitlines()[2:] == [
        b"/d/a 1 100644 2 0 0 0 0.0 - x -",
        b"/z 0 @120000 - - - - 0.0 /d/a - -",
    ]


def test_makedev() -> None:
    assert makedev(1, 3) == 259
    assert makedev(259, 1048575) == 0xFFF_103_FF
    assert makedev(0xFFFFFFFF, 0xFFFFFFFF) == 0xFFFFFFFFFFFFFFFF
