"""The merge of random trees of ``/etc`` gives what a naive model gives."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostimage_testing import etctrees
from hostimage_testing.etctrees import Item, Tree, image, make, model, opened, overlaid, snapshot
from hostimaged.host import etcmerge
from hostimaged.host.etcplan import EtcConflict
from hostimaged.host.setuproot import MountMode
from hostimaged.progress import Silent

NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff\xfe", b"e.d", b"-"])
OWNERS = st.sampled_from([0, 1, 1000]) if etctrees.ROOT else st.just(os.geteuid())
XATTRS = st.dictionaries(
    st.sampled_from(["user.a", "user.b"]), st.sampled_from([b"", b"1", b"2"]), max_size=2
)
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2750, 0o1777])
CONTENTS = st.sampled_from([b"", b"x", b"y", b"z" * 64, b"w" * 65, b"v" * 5000, b"u" * 5000])


@st.composite
def items(draw: st.DrawFn) -> Item:
    kind = draw(st.sampled_from(["dir", "dir", "dir", "file", "file", "file", "link", "fifo"]))
    mode = draw(MODES)
    owner = {"uid": draw(OWNERS), "gid": draw(OWNERS) if etctrees.ROOT else os.getegid()}
    if kind == "link":
        return etctrees.link(draw(st.sampled_from([b"a", b"/etc/a", b"../../x", b"c"])), **owner)
    if kind == "fifo":
        return etctrees.fifo(mode, **owner)
    xattrs = draw(XATTRS)
    if kind == "dir":
        return etctrees.directory(mode | 0o700, xattrs=xattrs, **owner)
    return etctrees.file(draw(CONTENTS), mode | 0o400, xattrs=xattrs, **owner)


@st.composite
def paths(draw: st.DrawFn, within: Tree) -> bytes:
    """Of a name that a tree can have."""
    above = draw(st.sampled_from([b"", *(path for path, item in within.items() if item.kind == "dir")]))
    name = draw(NAMES)
    return above + b"/" + name if above else name


@st.composite
def changed(draw: st.DrawFn, base: Tree, most: int) -> Tree:
    """A tree after some edits."""
    result = dict(base)
    for _ in range(draw(st.integers(0, most))):
        choices = [paths(result), st.sampled_from(sorted(result))] if result else [paths(result)]
        path = draw(st.one_of(choices))
        item = draw(st.one_of(st.none(), items(), items()))
        if item is None or item.kind != "dir":
            for other in [other for other in result if other.startswith(path + b"/")]:
                del result[other]
        if item is None:
            result.pop(path, None)
        else:
            result[path] = item
    return etctrees.tree(result)


@st.composite
def three(draw: st.DrawFn) -> tuple[Tree, Tree, Tree]:
    pristine = draw(changed({}, 10))
    return pristine, draw(changed(pristine, 6)), draw(changed(pristine, 6))


@contextmanager
def scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="etc-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


#: The long run has more.
EXAMPLES = 1000 if os.environ.get("HOSTIMAGE_SOAK") == "1" else 50
QUICK = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(three())
def test_bind(trees: tuple[Tree, Tree, Tree]) -> None:
    pristine, current, new = trees
    expected = model(*trees)
    with scratch() as root:
        make(new, root / "deploy/etc")
        before = snapshot(root / "deploy/etc")
        with opened(make(current, root / "current")) as ours, opened(root / "deploy") as deployment:
            how: Any = {"booted_mode": MountMode.BIND, "mode": MountMode.BIND, "reporter": Silent()}
            dry = etcmerge.dry_run(image(pristine), ours, image(new), **how)
            assert {conflict.path for conflict in dry.conflicts} == expected.conflicts
            assert len(dry.conflicts) == len(expected.conflicts)
            assert sorted(dry.added) == sorted(expected.added)
            assert sorted(dry.modified) == sorted(expected.modified)
            assert sorted(dry.removed) == sorted(expected.removed)
            if expected.conflicts:
                with pytest.raises(EtcConflict) as caught:
                    etcmerge.merge(image(pristine), ours, image(new), deployment, **how)
                assert {conflict.path for conflict in caught.value.conflicts} == expected.conflicts
                assert os.listdir(deployment) == ["etc"]
                assert snapshot(root / "deploy/etc") == before
                return
            assert etcmerge.merge(image(pristine), ours, image(new), deployment, **how) == dry
            assert snapshot(root / "deploy/etc") == expected.result
            etcmerge.undo(deployment)
            assert snapshot(root / "deploy/etc") == before
            etcmerge.merge(image(pristine), ours, image(new), deployment, **how)
            etcmerge.discard(deployment)
            assert os.listdir(deployment) == ["etc"]
        assert snapshot(root / "deploy/etc") == expected.result


@QUICK
@given(three())
def test_overlay(trees: tuple[Tree, Tree, Tree]) -> None:
    pristine, current, new = trees
    expected = model(*trees)
    if expected.conflicts:
        return
    with scratch() as root:
        (root / "deploy/etc").mkdir(parents=True)
        with opened(make(current, root / "current")) as ours, opened(root / "deploy") as deployment:
            etcmerge.merge(
                image(pristine), ours, image(new), deployment,
                booted_mode=MountMode.OVERLAY, mode=MountMode.OVERLAY, reporter=Silent(),
            )  # fmt: skip
        upper = root / "deploy/etc/upper"
        assert overlaid(new, snapshot(upper) if upper.exists() else {}) == expected.result
