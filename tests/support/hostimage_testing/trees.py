"""Random trees: Hypothesis strategies for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Content,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Sparse,
    Stat,
    Symlink,
    walk,
)
from hostimaged.ids import ObjectId

if TYPE_CHECKING:
    from hostimaged.composefs.fsverity import Algorithm

_NAME_BYTES = [c for c in range(1, 256) if c != ord("/")]
NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"usr", b"!x", b"-", b"..x", b"07", b"fF", b"n" * 200, b"o" * 255]),
    st.lists(st.sampled_from(_NAME_BYTES), min_size=1, max_size=12).map(bytes),
).filter(lambda name: name not in (b".", b".."))

#: Those that survive the way into an image and back.
XATTR_NAMES = st.one_of(
    st.sampled_from(
        [
            b"security.selinux", b"security.capability", b"user.a", b"user.overlay.redirect", b"trusted.foo",
            b"system.posix_acl_access", b"system.posix_acl_default", b"lustre.lov", b"trusted.overlay.foo",
            b"trusted.overlay.redirect", b"odd", b"user.overlay.metacopy", b"trusted.overlay.overlay.x",
        ]
    ),
    st.binary(min_size=1, max_size=8).map(lambda suffix: b"user." + suffix.replace(b"\0", b"0")),
)  # fmt: skip
XATTR_VALUES = st.one_of(
    st.sampled_from([b"", b"-", b"v", b"system_u:object_r:usr_t:s0"]),
    st.binary(max_size=20),
    st.integers(0, 3000).map(lambda n: b"v" * n),
)
XATTRS = st.one_of(st.just({}), st.dictionaries(XATTR_NAMES, XATTR_VALUES, max_size=4))

_ID_NUMBERS = st.one_of(
    st.sampled_from([0, 1000, 65535, 65536, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1)
)
_TIMES = st.one_of(st.sampled_from([0, 1, 1_700_000_000, (1 << 63) - 1]), st.integers(0, 1 << 40))
_NANOSECONDS = st.one_of(st.just(0), st.integers(0, 999_999_999))
_SIZES = st.one_of(
    st.integers(1, 10_000),
    st.sampled_from([4096, 4097, 1 << 20, (1 << 32) - 1, 1 << 32, (1 << 43) + 1, 9_000_000_000_000_000]),
)
_RDEVS = st.one_of(st.sampled_from([1, 259]), st.integers(1, (1 << 32) - 1))
_DATA = st.one_of(st.binary(max_size=40), st.integers(0, 512).map(lambda n: b"d" * n))
_TARGETS = st.one_of(
    st.sampled_from([b"busybox", b"-", b"../x y", b"/usr//lib/."]),
    st.integers(1, 1024).map(lambda n: b"t" * n),
)


@st.composite
def stats(draw: st.DrawFn, *, nanoseconds: bool = True) -> Stat:
    """Metadata of an inode."""
    mode = draw(st.one_of(st.sampled_from([0o644, 0o755, 0o4755, 0]), st.integers(0, 0o7777)))
    # Few distinct times, so that some inodes get the short form.
    mtime = draw(st.one_of(st.just(1000), _TIMES))
    nsec = draw(_NANOSECONDS) if nanoseconds else 0
    xattrs = dict(sorted(draw(XATTRS).items()))
    return Stat(mode, draw(_ID_NUMBERS), draw(_ID_NUMBERS), mtime, nsec, xattrs)


def contents(algorithm: Algorithm, *, whiteouts: bool, no_verity: bool) -> st.SearchStrategy[Content]:
    """What a leaf holds. Few distinct objects, so that some are shared."""
    ids = st.integers(0, 5).map(lambda n: ObjectId(bytes([n]) * algorithm.digest_size))
    kinds: list[st.SearchStrategy[Content]] = [
        st.builds(Inline, _DATA),
        st.builds(External, ids, st.one_of(st.just(0), _SIZES)),
        st.builds(Sparse, _SIZES),
        st.builds(BlockDevice, _RDEVS),
        st.builds(CharDevice, _RDEVS),
        st.just(Fifo()),
        st.just(Socket()),
        st.builds(Symlink, _TARGETS),
    ]
    if no_verity:
        kinds.append(st.builds(ExternalNoVerity, ids, _SIZES))
    if whiteouts:
        kinds.append(st.just(CharDevice(0)))
    return st.one_of(kinds)


@st.composite
def trees(
    draw: st.DrawFn,
    algorithm: Algorithm,
    *,
    nanoseconds: bool = True,
    whiteouts: bool = True,
    no_verity: bool = True,
    max_inodes: int = 25,
) -> Directory:
    """A tree with hard links, whiteouts, odd names, large and shared xattrs, and files of every kind."""
    stat = stats(nanoseconds=nanoseconds)
    leaf_contents = contents(algorithm, whiteouts=whiteouts, no_verity=no_verity)
    root = Directory(draw(stat), {})
    directories = [root]
    linkable: list[Leaf] = []
    for _ in range(draw(st.integers(0, max_inodes))):
        parent = draw(st.sampled_from(directories))
        name = draw(NAMES)
        if name in parent.entries:
            continue
        kind = draw(st.sampled_from(["directory", "leaf", "leaf", "leaf", "link"]))
        if kind == "directory":
            directory = Directory(draw(stat), {})
            directories.append(directory)
            parent.entries[name] = directory
        elif kind == "link" and linkable:
            parent.entries[name] = draw(st.sampled_from(linkable))
        else:
            leaf = Leaf(draw(stat), draw(leaf_contents))
            if leaf.content != CharDevice(0):
                linkable.append(leaf)
            elif parent is root and len(name) == 2:
                # In V0 and V1 it may be one of those the image has by itself, and would not come back.
                leaf.content = Fifo()
            parent.entries[name] = leaf
    if draw(st.booleans()):
        crowd = draw(st.sampled_from(directories))
        shared = draw(stat)
        for number in range(draw(st.integers(30, 400))):
            crowd.entries.setdefault(b"crowd-%03d" % number, Leaf(shared, Fifo()))
    return root


def canonical(root: Directory) -> list[tuple[object, ...]]:
    """Everything about a tree in a form that compares: hard links by the first name, kinds told apart."""
    first: dict[Leaf, bytes] = {}
    rows: list[tuple[object, ...]] = []
    for path, node in walk(root):
        if isinstance(node, Directory):
            rows.append((path, node.stat))
        else:
            rows.append((path, node.stat, node.content, first.setdefault(node, path)))
    return rows
