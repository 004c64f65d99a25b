"""A damaged or malicious image gives a typed error, or an answer, soon; never another exception."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimage_testing.trees import trees
from hostimaged.composefs.dumpfile import write
from hostimaged.composefs.erofs import ErofsError, Format, Image, UnsupportedTree, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.tree import Directory, External, Fifo, Inline, Leaf, Stat, Symlink
from hostimaged.ids import ObjectId

SHA256 = Algorithm.SHA256
V0, V1, V2 = Format


def read_all(data: bytes | bytearray) -> None:
    """Everything a reader does; errors of the right type are fine."""
    try:
        image = Image(data, SHA256)
    except ErofsError:
        return
    for question in (image.check, image.objects):
        try:
            question()
        except ErofsError:
            continue
    try:
        root = image.tree()
    except ErofsError:
        return
    # What was read must be good for all that is done with trees.
    for _ in write(root):
        pass
    for image_format in Format:
        try:
            build(root, image_format, SHA256)
        except UnsupportedTree:
            continue


def sample(image_format: Format) -> bytearray:
    stat = Stat(0o644, 0, 0, 5, 0, {b"user.shared": b"v" * 40})
    hard = Leaf(stat, Inline(b"hard"))
    inner = Directory(
        stat._replace(mtime=6),
        {
            b"file": Leaf(stat, External(ObjectId(bytes(range(32))), 70_000)),
            b"again": Leaf(stat._replace(uid=70_000), External(ObjectId(bytes(range(32))), 70_000)),
            b"link": Leaf(stat, Symlink(b"target")),
            b"hard": hard,
        },
    )
    crowd = Directory(stat, {b"entry-%03d" % i: Leaf(stat, Fifo()) for i in range(200)})
    return build(Directory(stat, {b"d": inner, b"crowd": crowd, b"hard": hard}), image_format, SHA256)


SAMPLES = {image_format: bytes(sample(image_format)) for image_format in Format}
# Where something stands: the first bytes, the superblock, and all that is not zero.
PLACES = {
    image_format: sorted(
        {*range(32), *range(1024, 1152), *(at for at, byte in enumerate(image) if byte)}
        | {at + 1 for at, byte in enumerate(image[:-1]) if byte}
    )
    for image_format, image in SAMPLES.items()
}


@pytest.mark.parametrize("image_format", [V1, V2], ids=["v1", "v2"])
@given(data=st.data())
@settings(max_examples=150)
def test_changed_bytes(image_format: Format, data: st.DataObject) -> None:
    image = bytearray(SAMPLES[image_format])
    changes = st.tuples(st.sampled_from(PLACES[image_format]), st.integers(0, 255))
    for at, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        image[at] = value
    read_all(image)


@pytest.mark.parametrize("image_format", [V1, V2], ids=["v1", "v2"])
@given(data=st.data())
@settings(max_examples=100)
def test_changed_numbers(image_format: Format, data: st.DataObject) -> None:
    image = bytearray(SAMPLES[image_format])
    at = data.draw(st.sampled_from(PLACES[image_format])) & ~3
    values = [0, 1, 35, 36, 37, 4096, 0x7FFFFFFF, 0xFFFFFFFF]
    struct.pack_into("<I", image, at, data.draw(st.sampled_from(values)))
    read_all(image)


@pytest.mark.parametrize("image_format", [V1, V2], ids=["v1", "v2"])
@given(data=st.data())
@settings(max_examples=50)
def test_cut_short_or_moved(image_format: Format, data: st.DataObject) -> None:
    image = SAMPLES[image_format]
    at = data.draw(st.integers(0, len(image)))
    read_all(image[:at])
    read_all(image[: max(at, 1152)] + bytes(data.draw(st.integers(0, 64))) + image[max(at, 1152) :])


@given(root=trees(SHA256), data=st.data())
@settings(max_examples=40)
def test_random_trees_with_changed_bytes(root: Directory, data: st.DataObject) -> None:
    image = build(root, data.draw(st.sampled_from(Format)), SHA256)
    for _ in range(data.draw(st.integers(1, 3))):
        image[data.draw(st.integers(1024, len(image) - 1))] ^= data.draw(st.integers(1, 255))
    read_all(image)


@given(noise=st.binary(max_size=2000))
@settings(max_examples=50)
def test_noise_behind_good_headers(noise: bytes) -> None:
    read_all(SAMPLES[V2][:1152] + noise)


def test_directory_in_itself() -> None:
    root = struct.pack("<HHHHQIIIIqII16x", 1, 0, 0o040755, 0, 4096, 1, 36, 0, 0, 0, 0, 3)
    block = struct.pack("<QHBxQHBxQHBx", 36, 36, 2, 36, 37, 2, 36, 39, 2) + b"." + b".." + b"x"
    image = SAMPLES[V2][:1152] + root + bytes(4096 - 1152 - 64) + block + bytes(4096 - len(block))
    opened = Image(image, SHA256)
    assert opened.objects() == set()
    with pytest.raises(ErofsError, match="in two places"):
        opened.tree()


def crafted(inodes: list[bytes], region: bytes) -> bytes:
    """A V2 image whose root has these inodes, with ``region`` at its end, in whole blocks."""
    names = [b".", b"..", *(b"%06d" % i for i in range(len(inodes)))]
    per_block = 4096 // 18
    blocks = -(-len(names) // per_block)
    places = [36, 36]
    area = bytearray()
    for inode in inodes:
        places.append((4096 * (blocks + 1) + len(area)) // 32)
        area += inode + bytes(-len(inode) % 32)
    area += bytes(-len(area) % 4096)
    directory = bytearray()
    for start in range(0, len(names), per_block):
        part = names[start : start + per_block]
        offset = 12 * len(part)
        block = bytearray()
        for name, nid in zip(part, places[start:], strict=False):
            block += struct.pack("<QHBx", nid, offset, 1)
            offset += len(name)
        block += b"".join(part)
        directory += block + bytes(4096 - len(block))
    head = bytearray(SAMPLES[V2][:1152]) + bytearray(4096 - 1152)
    struct.pack_into("<HHHHQIIIIqII16x", head, 1152, 1, 0, 0o040755, 0, 4096 * blocks, 1, 36, 0, 0, 0, 0, 2)
    return bytes(head + directory + area + region)


def compact(icount: int = 0, size: int = 0, where: int = 0) -> bytes:
    return struct.pack("<HHHHIIIIHHI", 0, icount, 0o100644, 1, size, 0, where, 0, 0, 0, 0)


def region_at(count: int, inode_size: int) -> int:
    """Offset of the region of an image with ``count`` inodes."""
    area = count * (inode_size + -inode_size % 32)
    return 4096 * (-(-(count + 2) // (4096 // 18)) + 1) + area + -area % 4096


def same_data(count: int, size: int = 400) -> bytes:
    """Very many files, all with the same large content."""
    return crafted([compact(size=size, where=region_at(count, 32) // 4096)] * count, b"d" * 4096)


def sliding_xattrs(count: int) -> bytes:
    """Very many references to xattrs of 64 KiB, each four bytes further than the one before."""
    region = bytes((0, 0, 0xFF, 0xFF)) * (1 << 16)
    start = region_at(count, 32 + 12 + 4 * 255)
    inodes = []
    for number in range(count):
        references = [start // 4 + number * 255 + i for i in range(255)]
        inodes.append(compact(icount=256) + struct.pack("<IB7x255I", 0, 255, *references))
    return crafted(inodes, region)


@pytest.mark.parametrize("image", [same_data(20_000), sliding_xattrs(100)], ids=["data", "xattrs"])
def test_overlapping_structures_end_soon(image: bytes) -> None:
    opened = Image(image, SHA256)
    start = time.monotonic()
    for question in (opened.objects, opened.check, opened.tree):
        with pytest.raises(ErofsError, match="overlap"):
            question()
    # Such images can ask for any multiple of their own size.
    assert time.monotonic() - start < 10


def test_crafted_images_are_good_but_for_the_overlap() -> None:
    root = Image(same_data(1), SHA256).tree()
    assert [node.content for node in root.entries.values() if isinstance(node, Leaf)] == [Inline(b"d" * 400)]
    inode = compact(icount=2) + struct.pack("<IB7xI", 0, 1, region_at(1, 48) // 4)
    node = (
        Image(crafted([inode], bytes((1, 0, 1, 0)) + b"kv" + bytes(4090)), SHA256).tree().entries[b"000000"]
    )
    assert node.stat.xattrs == {b"k": b"v"}
