"""Reading images: what is refused, what the structural check finds, what does not come back."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from hostimaged.composefs.dumpfile import parse, write
from hostimaged.composefs.erofs import ErofsError, Format, Image, build, ondisk, possible_objects
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.tree import CharDevice, Directory, External, Leaf, Stat, Symlink, lookup
from hostimaged.ids import ObjectId

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512
V0, V1, V2 = Format
FORMATS = pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
ROOT = b"/ 0 40755 2 0 0 0 1000.0 - - -\n"
ROOT_AT = 1152
HEX = "f0f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1"


def image_of(text: bytes, image_format: Format) -> bytearray:
    return build(parse(text, SHA256), image_format, SHA256)


def dump(image: bytes | bytearray) -> bytes:
    return b"".join(write(Image(image, SHA256).tree()))


def patched(image: bytearray, offset: int, code: str, value: int) -> bytearray:
    struct.pack_into("<" + code, image, offset, value)
    return image


def inode_at(image: bytearray, path: bytes) -> int:
    """Offset of an inode."""
    raw = ondisk.RawImage(image, "the image")
    nid = raw.root_nid
    for name in path.split(b"/")[1:]:
        nid = dict(raw.entries(raw.inode(nid)))[name]
    return nid * 32


@FORMATS
@pytest.mark.parametrize("algorithm", [SHA256, SHA512], ids=lambda a: a.label)
def test_names_of_objects_that_look_like_more_of_them(image_format: Format, algorithm: Algorithm) -> None:
    """Ids that contain what stands before an id hide neither themselves nor those after them."""
    size = algorithm.digest_size
    head = bytes((0, 4 + size, 0, algorithm.kernel_id))
    ids = [ObjectId((bytes([n]) * size)[: size - len(head) - n] + head + bytes([n]) * n) for n in range(20)]
    stat = Stat(0o644, 0, 0, 0, 0, {})
    files = {b"%d" % n: Leaf(stat, External(id_, 1000)) for n, id_ in enumerate(ids)}
    image = build(Directory(Stat(0o755, 0, 0, 0, 0, {}), dict(files)), image_format, algorithm)
    assert Image(image, algorithm).objects() == set(ids)
    assert set(possible_objects(bytes(image), algorithm)) >= set(ids)
    with pytest.raises(ErofsError):
        possible_objects(bytes(image)[:1000], algorithm)


@FORMATS
def test_format_is_told(image_format: Format) -> None:
    assert Image(image_of(ROOT, image_format), SHA256).format is image_format


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1151])
def test_too_short(size: int) -> None:
    with pytest.raises(ErofsError, match=r"some\.img is too short"):
        Image(image_of(ROOT, V1)[:size], SHA256, name="some.img")


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondisk, "MAX_IMAGE", 16383)
    with pytest.raises(ErofsError, match="larger"):
        Image(image_of(ROOT, V1), SHA256)


@pytest.mark.parametrize(
    ("offset", "code", "value", "reason"),
    [
        (0, "I", 1, "not a composefs image"),
        (4, "I", 2, "unknown format"),
        (12, "I", 3, "unknown format"),
        (1024, "I", 0, "no EROFS superblock"),
        (1032, "I", 8, "unknown compatible"),
        (1036, "B", 13, "block size"),
        (1037, "B", 1, "superblock extensions"),
        (1024 + 40, "I", 1, "another block"),
        (1024 + 80, "I", 1, "unknown incompatible"),
        (1024 + 84, "H", 1, "compression"),
        (1024 + 86, "H", 1, "extra devices"),
        (1024 + 91, "B", 1, "xattr prefixes"),
        (1024 + 96, "Q", 1, "packed inode"),
    ],
)
def test_what_no_composefs_image_has(offset: int, code: str, value: int, reason: str) -> None:
    with pytest.raises(ErofsError, match=reason):
        Image(patched(image_of(ROOT, V1), offset, code, value), SHA256)


def test_what_an_image_may_have() -> None:
    image = image_of(ROOT, V1)
    patched(image, 1032, "I", 7)
    patched(image, 1024 + 80, "I", 4)
    Image(image, SHA256).check()


def test_stubs_are_needed_in_v1_and_not_in_v2() -> None:
    for image_format in (V0, V1):
        with pytest.raises(ErofsError, match="256 whiteouts"):
            Image(patched(image_of(ROOT, V2), 12, "I", image_format), SHA256).check()
    with pytest.raises(ErofsError, match="256 whiteouts"):
        Image(patched(image_of(ROOT, V2), 12, "I", V1), SHA256).objects()


def test_a_file_in_the_place_of_a_stub_is_good() -> None:
    text = ROOT + b"/07 1 100644 1 0 0 0 0.0 - x -\n/ff 0 40755 2 0 0 0 0.0 - - -\n"
    image = image_of(text, V1)
    Image(image, SHA256).check()
    assert [line.split()[0] for line in dump(image).splitlines()] == [b"/", b"/07", b"/ff"]


def test_whiteout_outside_the_root() -> None:
    text = ROOT + b"/d 0 40755 2 0 0 0 0.0 - - -\n/d/w 0 20644 1 0 0 0 0.0 - - -\n"
    Image(image_of(text, V1), SHA256).check()
    Image(image_of(text, V2), SHA256).check()
    device = ROOT + b"/d 0 40755 2 0 0 0 0.0 - - -\n/d/w 0 20644 1 0 0 7 0.0 - - -\n"
    image = image_of(device, V1)
    at = inode_at(image, b"/d/w")
    assert struct.unpack_from("<I", image, at + 16) == (7,)
    with pytest.raises(ErofsError, match="outside the root"):
        Image(patched(image, at + 16, "I", 0), SHA256).check()


def test_escaped_whiteout_in_v2() -> None:
    text = ROOT + b"/w 0 100644 1 0 0 0 0.0 - - - trusted.overlay.whiteout=\n"
    with pytest.raises(ErofsError, match="escaped whiteout"):
        Image(image_of(text, V2), SHA256).check()


def test_symlink_across_a_block_boundary() -> None:
    # Long enough that the writer moved some, so the last inode before it has room behind it.
    text = ROOT + b"".join(b"/l%02d 900 120777 1 0 0 0 1000.0 %b - -\n" % (i, b"t" * 900) for i in range(20))
    image = image_of(text, V1)
    Image(image, SHA256).check()
    found = 0
    for number in range(20):
        at = inode_at(image, b"/l%02d" % number)
        if at % 4096 > 4096 - 2 * 960 + 32 and at % 4096 + 32 + 900 <= 4096:
            longer = bytearray(image)
            struct.pack_into("<I", longer, at + 8, 4096 - at % 4096 - 32 + 1)
            with pytest.raises(ErofsError, match="block boundary"):
                Image(longer, SHA256).check()
            found += 1
    assert found


@FORMATS
def test_wrong_link_count(image_format: Format) -> None:
    text = ROOT + b"/f 1 100644 1 0 0 0 1000.0 - x -\n"
    for path in (b"/f", b"/"):
        image = image_of(text, image_format)
        at = ROOT_AT if path == b"/" else inode_at(image, path)
        field, code = (44, "I") if image[at] & 1 else (6, "H")
        patched(image, at + field, code, 5)
        with pytest.raises(ErofsError, match="link count"):
            Image(image, SHA256).tree()


def damaged_dirent(image: bytearray, name: bytes, change: Callable[[bytearray, int], None]) -> Image:
    """Change the directory entry of a V2 image's root that has ``name``."""
    first = struct.unpack_from("<H", image, ROOT_AT + 64 + 8)[0]
    for at in range(ROOT_AT + 64, ROOT_AT + 64 + first, 12):
        offset = struct.unpack_from("<H", image, at + 8)[0]
        if image[ROOT_AT + 64 + offset :].startswith(name):
            change(image, at)
            return Image(image, SHA256)
    raise AssertionError(f"{name!r} is not there")


@pytest.mark.parametrize("name", [b".", b".."])
def test_wrong_dot_entries(name: bytes) -> None:
    text = ROOT + b"/d 0 40755 2 0 0 0 0.0 - - -\n"
    image = image_of(text, V2)
    child = inode_at(image, b"/d") // 32
    opened = damaged_dirent(image, name, lambda data, at: struct.pack_into("<Q", data, at, child))
    with pytest.raises(ErofsError, match="wrong entries"):
        opened.tree()


def test_name_twice() -> None:
    text = ROOT + b"/aa 1 100644 1 0 0 0 0.0 - x -\n/ab 1 100644 1 0 0 0 0.0 - x -\n"
    image = image_of(text, V2)
    image = bytearray(bytes(image).replace(b"aaab", b"abab"))
    with pytest.raises(ErofsError, match="name twice"):
        Image(image, SHA256).tree()


@pytest.mark.parametrize("name", [b"a/b", b"a\0b"])
def test_impossible_names(name: bytes) -> None:
    text = ROOT + b"/aXb 1 100644 1 0 0 0 0.0 - x -\n/b 0 40755 2 0 0 0 0.0 - - -\n"
    image = image_of(text, V2)
    image = bytearray(bytes(image).replace(b"aXb", name))
    for question in (Image(image, SHA256).tree, Image(image, SHA256).objects):
        with pytest.raises(ErofsError, match="damaged name"):
            question()


def test_malformed_metacopy_is_an_error_of_the_tree_only() -> None:
    root = parse(ROOT, SHA256)
    root.entries[b"f"] = Leaf(Stat(0, 0, 0, 0, 0, {}), External(digest(SHA512, b""), 7))
    image = build(root, V2, SHA512)
    # The redirect of the other algorithm is too long to be misread: its last part is not a path.
    opened = Image(image, SHA256)
    assert opened.objects() == set()
    with pytest.raises(ErofsError, match="damaged object name"):
        opened.tree()


def test_the_hash_is_detected() -> None:
    for algorithm in Algorithm:
        root = parse(ROOT, algorithm)
        node = Leaf(Stat(0, 0, 0, 0, 0, {}), External(digest(algorithm, b"x"), 7))
        root.entries[b"f"] = node
        for image_format in Format:
            image = Image.detect(build(root, image_format, algorithm))
            assert image.objects() == {digest(algorithm, b"x")}
    assert Image.detect(image_of(ROOT, V1)).objects() == set()


def test_v2_limits() -> None:
    text = ROOT + b"/f 400 100644 1 0 0 0 0.0 - %b -\n" % (b"c" * 400)
    text += b"/l 1000 120777 1 0 0 0 0.0 %b - -\n" % (b"t" * 1000)
    for path, size in ((b"/f", 513), (b"/l", 1025)):
        image = image_of(text, V2)
        patched(image, inode_at(image, path) + 8, "Q", size)
        with pytest.raises(ErofsError, match="more than"):
            Image(image, SHA256).tree()


# What does not come back, as in composefs-rs.


def test_xattrs_of_overlayfs_do_not_come_back() -> None:
    names = [b"trusted.overlay.opaque", b"user.overlay.opaque", b"user.overlay.whiteouts", b"user.kept"]
    stat = Stat(0o755, 0, 0, 0, 0, dict.fromkeys(names, b"v"))
    root = Directory(stat, {b"d": Directory(stat, {})})
    for image_format in Format:
        for node in Image(build(root, image_format, SHA256), SHA256).tree().entries.values():
            assert node.stat.xattrs == {b"user.kept": b"v"}


def test_whiteouts_come_back() -> None:
    stat = Stat(0o600, 1, 2, 3, 0, {b"user.a": b"b"})
    whiteouts = [Leaf(stat, CharDevice(0)), Leaf(stat, CharDevice(0))]
    root = Directory(stat, {b"d": Directory(stat, {b"w": whiteouts[0]}), b"w": whiteouts[1]})
    for image_format in Format:
        back = Image(build(root, image_format, SHA256), SHA256).tree()
        for path in (b"/w", b"/d/w"):
            node = lookup(back, path)
            assert isinstance(node, Leaf)
            assert (node.stat, node.content) == (stat, CharDevice(0))
        assert (lookup(back, b"/d") or back).stat == stat


def test_whiteout_with_the_name_of_a_stub_does_not_come_back() -> None:
    stat = Stat(0o600, 1, 2, 3, 0, {})
    root = Directory(stat, {b"0F": Leaf(stat, CharDevice(0)), b"07": Leaf(stat, CharDevice(0))})
    for image_format in Format:
        assert Image(build(root, image_format, SHA256), SHA256).tree().entries == {}


def test_negative_times_come_back() -> None:
    stat = Stat(0o600, 1, 2, -3, 0, {})
    root = Directory(stat, {b"l": Leaf(stat._replace(mtime=5), Symlink(b"t"))})
    for image_format in Format:
        back = Image(build(root, image_format, SHA256), SHA256).tree()
        assert (back.stat.mtime, back.entries[b"l"].stat.mtime) == (-3, 5)


def test_data_may_be_any_buffer() -> None:
    image = image_of(ROOT, V1)
    for data in (bytes(image), image, memoryview(image), memoryview(image).toreadonly()):
        assert Image(data, SHA256).tree().entries == {}
