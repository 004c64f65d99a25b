"""The tree: walking, counting links, looking up."""

from __future__ import annotations

from hostimaged.composefs.tree import Directory, Fifo, Leaf, Stat, link_counts, lookup, walk

STAT = Stat(0o755, 0, 0, 0, 0, {})


def sample() -> tuple[Directory, Leaf]:
    shared = Leaf(STAT, Fifo())
    inner = Directory(STAT, {b"z": shared, b"a": Leaf(STAT, Fifo())})
    return Directory(
        STAT, {b"b": inner, b"b-": Leaf(STAT, Fifo()), b"a": shared, b"c": Directory(STAT, {})}
    ), shared


def test_walk_is_depth_first_by_name() -> None:
    root, shared = sample()
    walked = list(walk(root))
    assert [path for path, _ in walked] == [b"/", b"/a", b"/b", b"/b/a", b"/b/z", b"/b-", b"/c"]
    assert walked[1][1] is walked[4][1] is shared


def test_link_counts() -> None:
    root, shared = sample()
    counts = link_counts(root)
    assert counts[shared] == 2
    assert sorted(counts.values()) == [1, 1, 2]


def test_lookup() -> None:
    root, shared = sample()
    assert lookup(root, b"/") is lookup(root, b"") is root
    assert lookup(root, b"/b/z") is lookup(root, b"b//z/") is shared
    assert lookup(root, b"/b/nothing") is None
    assert lookup(root, b"/a/below") is None


def test_equal_looking_leaves_are_different_inodes() -> None:
    assert Leaf(STAT, Fifo()) != Leaf(STAT, Fifo())
    assert len({Leaf(STAT, Fifo()), Leaf(STAT, Fifo())}) == 2


def test_deep_trees_do_not_exhaust_the_stack() -> None:
    root = at = Directory(STAT, {})
    for _ in range(5000):
        below = Directory(STAT, {})
        at.entries[b"d"] = below
        at = below
    at.entries[b"f"] = Leaf(STAT, Fifo())
    assert sum(1 for _ in walk(root)) == 5002
    assert len(link_counts(root)) == 1
