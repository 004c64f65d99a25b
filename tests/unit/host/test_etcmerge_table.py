"""The merge of /etc, case by case: what the administrator did, what the new image did, what comes of it.

Each case is also given to the naive model that random trees are compared with, and to a merge for an overlay.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostimage_testing.etctrees import (
    ROOT,
    Items,
    Tree,
    device,
    directory,
    fifo,
    file,
    image,
    link,
    make,
    model,
    opened,
    overlaid,
    snapshot,
    socket,
    tree,
)
from hostimage_testing.tools import absent, require
from hostimaged.host import etcmerge
from hostimaged.host.etcplan import EtcConflict, MergePlan
from hostimaged.host.setuproot import MountMode
from hostimaged.progress import Silent

USER = {"user.note": b"1"}
OTHER = {"user.note": b"2"}
#: Ids of others, where we may give files away.
THEM = {"uid": 7, "gid": 8} if ROOT else {}
BIG = "large enough to be an object in the image, not inline\n" * 100


@dataclass(frozen=True)
class Case:
    """Trees without their unnamed parents. ``conflicts`` instead of a ``result``: the merge is refused."""

    name: str
    pristine: Items
    current: Items
    new: Items
    result: Items | None
    added: set[str] = field(default_factory=set)
    modified: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    conflicts: set[str] = field(default_factory=set)
    root: bool = False


A, B, C = file("a"), file("b"), file("c")
D = directory()
L, M = link("target"), link("elsewhere")

CASES = [
    # --- nothing was done here ---
    Case("nothing anywhere", {}, {}, {}, {}),
    Case("nothing changed", {"x": A}, {"x": A}, {"x": A}, {"x": A}),
    Case("only the image changed a file", {"x": A}, {"x": A}, {"x": B}, {"x": B}),
    Case("only the image changed a mode", {"x": A}, {"x": A}, {"x": file("a", 0o600)}, {"x": file("a",
         0o600)}),
    Case("only the image added", {}, {}, {"x": A, "d/y": B}, {"x": A, "d/y": B}),
    Case("only the image removed a file", {"x": A}, {"x": A}, {}, {}),
    Case("only the image removed a directory", {"d/x": A, "y": B}, {"d/x": A, "y": B}, {"y": B}, {"y": B}),
    Case("the image made a file a directory", {"x": A}, {"x": A}, {"x/y": B}, {"x/y": B}),
    Case("the image made a directory a file", {"x/y": A}, {"x/y": A}, {"x": B}, {"x": B}),
    Case("the image made a directory a link", {"x/y": A}, {"x/y": A}, {"x": L}, {"x": L}),
    Case("the image made a file a link", {"x": A}, {"x": A}, {"x": L}, {"x": L}),
    # --- added here ---
    Case("added a file", {}, {"x": A}, {}, {"x": A}, added={"x"}),
    Case("added a file that the image adds too", {}, {"x": A}, {"x": B}, {"x": A}, added={"x"}),
    Case("added the same file as the image", {}, {"x": A}, {"x": A}, {"x": A}, added={"x"}),
    Case("added an empty file", {}, {"x": file()}, {}, {"x": file()}, added={"x"}),
    Case("added a large file", {}, {"x": file(BIG)}, {}, {"x": file(BIG)}, added={"x"}),
    Case("added an empty directory", {}, {"d": D}, {}, {"d": D}, added={"d"}),
    Case("added a directory with content", {}, {"d/e/x": A}, {}, {"d/e/x": A}, added={"d", "d/e", "d/e/x"}),
    Case("added beside what the image has", {"d/x": A}, {"d/x": A, "d/y": B}, {"d/x": C}, {"d/x": C,
         "d/y": B},
         added={"d/y"}),
    Case("added to a directory the image removed", {"d/x": A}, {"d/x": A, "d/y": B}, {}, {"d/y": B},
         added={"d", "d/y"}),
    Case("added deep in directories the image removed", {"d/e/f/x": A}, {"d/e/f/x": A, "d/e/f/y": B}, {},
         {"d/e/f/y": B}, added={"d", "d/e", "d/e/f", "d/e/f/y"}),
    Case("added a directory that the image adds too", {}, {"d/x": A}, {"d/y": B}, {"d/x": A, "d/y": B},
         added={"d", "d/x"}),
    Case("added a directory with another mode than the image's", {}, {"d": directory(0o700)}, {"d/y": B},
         {"d": directory(0o700), "d/y": B}, added={"d"}),
    Case("added a link", {}, {"x": L}, {}, {"x": L}, added={"x"}),
    Case("added a link where the image adds a file", {}, {"x": L}, {"x": A}, {"x": L}, added={"x"}),
    Case("added a file where the image adds a link", {}, {"x": A}, {"x": L}, {"x": A}, added={"x"}),
    Case("added a dangling link", {}, {"x": link("/no/such")}, {}, {"x": link("/no/such")}, added={"x"}),
    Case("added a link to itself", {}, {"x": link("x")}, {}, {"x": link("x")}, added={"x"}),
    Case("added a link that leads out", {}, {"x": link("../../../../../root")}, {},
         {"x": link("../../../../../root")}, added={"x"}),
    Case("added a link to a directory", {"d/x": A}, {"d/x": A, "l": link("d")}, {"d/x": B},
         {"d/x": B, "l": link("d")}, added={"l"}),
    Case("added a file where the image adds a directory", {}, {"x": A}, {"x/y": B}, None, added={"x"},
         conflicts={"x"}),
    Case("added an empty directory where the image adds a file", {}, {"x": D}, {"x": A}, None, added={"x"},
         conflicts={"x"}),
    Case("added a file deep where the image adds a directory", {}, {"d/x": A}, {"d/x/y": B}, None,
         added={"d", "d/x"}, conflicts={"d/x"}),
    # --- modified here ---
    Case("modified a file", {"x": A}, {"x": B}, {"x": A}, {"x": B}, modified={"x"}),
    Case("modified a file the image changed too", {"x": A}, {"x": B}, {"x": C}, {"x": B}, modified={"x"}),
    Case("modified a file the image removed", {"x": A}, {"x": B}, {}, {"x": B}, modified={"x"}),
    Case("modified a file in a directory the image removed", {"d/x": A, "d/y": A}, {"d/x": B, "d/y": A}, {},
         {"d/x": B}, modified={"d", "d/x"}),
    Case("modified without changing the size", {"x": file("aaaa")}, {"x": file("aaab")}, {"x": file("aaaa")},
         {"x": file("aaab")}, modified={"x"}),
    Case("modified an object without changing the size", {"x": file(BIG)}, {"x": file(BIG[:-1] + "!")},
         {"x": file(BIG)}, {"x": file(BIG[:-1] + "!")}, modified={"x"}),
    Case("an object that was not modified", {"x": file(BIG)}, {"x": file(BIG)}, {"x": A}, {"x": A}),
    Case("an object cut short", {"x": file(BIG)}, {"x": file(BIG[:-1])}, {"x": file(BIG)},
         {"x": file(BIG[:-1])}, modified={"x"}),
    Case("emptied a file", {"x": A}, {"x": file()}, {"x": C}, {"x": file()}, modified={"x"}),
    Case("changed a mode", {"x": A}, {"x": file("a", 0o600)}, {"x": A}, {"x": file("a", 0o600)},
         modified={"x"}),
    Case("changed a mode, and the image the content", {"x": A}, {"x": file("a", 0o600)}, {"x": B},
         {"x": file("a", 0o600)}, modified={"x"}),
    Case("made a file set-id", {"x": file("a", 0o755)}, {"x": file("a", 0o6755)}, {"x": file("b", 0o755)},
         {"x": file("a", 0o6755)}, modified={"x"}),
    Case("gave a file away", {"x": A}, {"x": file("a", **THEM)}, {"x": A}, {"x": file("a", **THEM)},
         modified={"x"}, root=True),
    Case("gave a set-id file away", {"x": A}, {"x": file("a", 0o4755, **THEM)}, {"x": A},
         {"x": file("a", 0o4755, **THEM)}, modified={"x"}, root=True),
    Case("gave a link away", {"x": L}, {"x": link("target", **THEM)}, {"x": L}, {"x": link("target", **THEM)},
         modified={"x"}, root=True),
    Case("changed where a link leads", {"x": L}, {"x": M}, {"x": L}, {"x": M}, modified={"x"}),
    Case("changed a link, and the image too", {"x": L}, {"x": M}, {"x": link("third")}, {"x": M},
         modified={"x"}),
    Case("made a file a link", {"x": A}, {"x": L}, {"x": B}, {"x": L}, modified={"x"}),
    Case("made a link a file", {"x": L}, {"x": A}, {"x": M}, {"x": A}, modified={"x"}),
    Case("made a file a link, and the image a directory", {"x": A}, {"x": L}, {"x/y": B}, None,
         modified={"x"},
         conflicts={"x"}),
    Case("modified a file the image made a directory", {"x": A}, {"x": B}, {"x/y": C}, None, modified={"x"},
         conflicts={"x"}),
    Case("modified a file the image made a link", {"x": A}, {"x": B}, {"x": L}, {"x": B}, modified={"x"}),
    Case("modified in a directory the image made a file", {"d/x": A}, {"d/x": B}, {"d": C}, None,
         modified={"d/x"}, conflicts={"d"}),
    Case("modified in a directory the image made a link", {"d/x": A}, {"d/x": B}, {"d": L, "target/x": C},
         None,
         modified={"d/x"}, conflicts={"d"}),
    # --- directories ---
    Case("made a file a directory the image has no more", {"x": A}, {"x/y": B}, {}, {"x/y": B}, added={"x/y"},
         modified={"x"}),
    Case("made a file a directory, as the image did", {"x": A}, {"x/y": B}, {"x/z": C}, {"x/y": B, "x/z": C},
         added={"x/y"}, modified={"x"}),
    Case("made a file a directory", {"x": A}, {"x/y": B}, {"x": A}, None, added={"x/y"}, modified={"x"},
         conflicts={"x"}),
    Case("made a directory a file", {"x/y": A}, {"x": B}, {"x/y": A}, None, modified={"x"}, conflicts={"x"}),
    Case("made a directory a link", {"x/y": A}, {"x": L}, {"x/y": A}, None, modified={"x"}, conflicts={"x"}),
    Case("made a directory a file, as the image did", {"x/y": A}, {"x": B}, {"x": C}, {"x": B},
         modified={"x"}),
    Case("made a directory a file, the image has it no more", {"x/y": A}, {"x": B}, {}, {"x": B},
         modified={"x"}),
    Case("changed the mode of a directory", {"d/x": A}, {"d": directory(0o700), "d/x": A}, {"d/x": B,
         "d/y": C},
         {"d": directory(0o700), "d/x": B, "d/y": C}, modified={"d"}),
    Case("changed the mode of an empty directory the image removed", {"d": D}, {"d": directory(0o700)}, {},
         {"d": directory(0o700)}, modified={"d"}),
    Case("changed the mode of a directory the image made a file", {"d": D}, {"d": directory(0o700)}, {"d": A},
         None, modified={"d"}, conflicts={"d"}),
    Case("a sticky directory", {"d": D}, {"d": directory(0o1777)}, {"d": D}, {"d": directory(0o1777)},
         modified={"d"}),
    Case("a read-only directory with changes", {"d/x": A}, {"d": directory(0o500), "d/x": B}, {"d/x": A},
         {"d": directory(0o500), "d/x": B}, modified={"d", "d/x"}),
    Case("a read-only directory of the image with changes below", {"d": directory(0o500), "d/x": A},
         {"d": directory(0o500), "d/x": B}, {"d": directory(0o500), "d/x": A},
         {"d": directory(0o500), "d/x": B}, modified={"d/x"}),
    Case("gave a directory away", {"d": D}, {"d": directory(**THEM)}, {"d/x": A},
         {"d": directory(**THEM), "d/x": A}, modified={"d"}, root=True),
    Case("a directory the image changed keeps that if only its content is changed here", {"d/x": A},
         {"d/x": B},
         {"d": directory(0o750), "d/x": C}, {"d": directory(0o750), "d/x": B}, modified={"d/x"}),
    # --- removed here ---
    Case("removed a file", {"x": A, "y": B}, {"y": B}, {"x": A, "y": B}, {"y": B}, removed={"x"}),
    Case("removed a file the image changed", {"x": A}, {}, {"x": B}, {}, removed={"x"}),
    Case("removed a file the image removed too", {"x": A}, {}, {}, {}, removed={"x"}),
    Case("removed a link", {"x": L}, {}, {"x": L, "target": A}, {"target": A}, removed={"x"}),
    Case("removed a file the image made a link", {"x": A}, {}, {"x": link("/bin/sh")}, {}, removed={"x"}),
    Case("removed a file the image made a directory", {"x": A}, {}, {"x/y": B}, {}, removed={"x"}),
    Case("removed a directory", {"d/x": A, "d/e/y": B}, {}, {"d/x": A, "d/e/y": B}, {}, removed={"d"}),
    Case("removed a directory to which the image adds", {"d/x": A}, {}, {"d/x": A, "d/new": B}, {},
         removed={"d"}),
    Case("removed a directory the image made a file", {"d/x": A}, {}, {"d": B}, {}, removed={"d"}),
    Case("removed in a directory the image made a file", {"d/x": A}, {"d": D}, {"d": B}, {"d": B},
         removed={"d/x"}),
    Case("removed in a directory the image made a link", {"d/x": A}, {"d": D}, {"d": link("e"), "e/x": B},
         {"d": link("e"), "e/x": B}, removed={"d/x"}),
    Case("removed in a directory the image removed", {"d/x": A}, {"d": D}, {}, {}, removed={"d/x"}),
    Case("removed and added in one directory", {"d/x": A}, {"d/y": B}, {"d/x": C}, {"d/y": B}, added={"d/y"},
         removed={"d/x"}),
    Case("renamed a file", {"x": A}, {"y": A}, {"x": B}, {"y": A}, added={"y"}, removed={"x"}),
    # --- extended attributes ---
    Case("set an attribute", {"x": A}, {"x": file("a", xattrs=USER)}, {"x": B}, {"x": file("a", xattrs=USER)},
         modified={"x"}),
    Case("changed an attribute", {"x": file("a", xattrs=USER)}, {"x": file("a", xattrs=OTHER)},
         {"x": file("a", xattrs=USER)}, {"x": file("a", xattrs=OTHER)}, modified={"x"}),
    Case("removed an attribute", {"x": file("a", xattrs=USER)}, {"x": A}, {"x": file("a", xattrs=USER)},
         {"x": A}, modified={"x"}),
    Case("an empty attribute", {"x": A}, {"x": file("a", xattrs={"user.e": b""})}, {"x": A},
         {"x": file("a", xattrs={"user.e": b""})}, modified={"x"}),
    Case("set an attribute of a directory", {"d": D}, {"d": directory(xattrs=USER)}, {"d/x": A},
         {"d": directory(xattrs=USER), "d/x": A}, modified={"d"}),
    Case("an attribute the image gives a directory stays", {"d": D}, {"d": directory(0o700)},
         {"d": directory(xattrs=USER)}, {"d": directory(0o700, xattrs=USER)}, modified={"d"}),
    Case("removed an attribute of a directory", {"d": directory(xattrs=USER)}, {"d": D},
         {"d": directory(xattrs={**USER, "user.new": b"n"})}, {"d": directory(xattrs={"user.new": b"n"})},
         modified={"d"}),
    Case("relabelled a file", {"x": file("a", xattrs={"security.selinux": b"u:r:etc_t:s0"})},
         {"x": file("a", xattrs={"security.selinux": b"u:r:mine_t:s0"})},
         {"x": file("b", xattrs={"security.selinux": b"u:r:etc_t:s0"})},
         {"x": file("a", xattrs={"security.selinux": b"u:r:mine_t:s0"})}, modified={"x"}, root=True),
    Case("a file capability", {"x": A}, {"x": file("a", 0o755, xattrs={
             "security.capability": bytes.fromhex("0100000200040000000000000000000000000000")})}, {"x": A},
         {"x": file("a", 0o755, xattrs={
             "security.capability": bytes.fromhex("0100000200040000000000000000000000000000")})},
         modified={"x"}, root=True),
    Case("a capability of a file given away", {"x": A}, {"x": file("a", 0o755, **THEM, xattrs={
             "security.capability": bytes.fromhex("0100000200040000000000000000000000000000")})}, {"x": A},
         {"x": file("a", 0o755, **THEM, xattrs={
             "security.capability": bytes.fromhex("0100000200040000000000000000000000000000")})},
         modified={"x"}, root=True),
    Case("a trusted attribute", {"x": A}, {"x": file("a", xattrs={"trusted.t": b"1"})}, {"x": A},
         {"x": file("a", xattrs={"trusted.t": b"1"})}, modified={"x"}, root=True),
    Case("a label of a link", {"x": L}, {"x": link("target", xattrs={"security.selinux": b"u:r:l_t:s0"})},
         {"x": L}, {"x": link("target", xattrs={"security.selinux": b"u:r:l_t:s0"})}, modified={"x"},
         root=True),
    # --- devices, fifos, sockets ---
    Case("added a fifo", {}, {"x": fifo()}, {}, {}),
    Case("added a socket", {}, {"x": socket()}, {}, {}),
    Case("added a device", {}, {"x": device(1, 3)}, {}, {}, root=True),
    Case("a device in an added directory", {}, {"d/x": device(1, 3), "d/y": A}, {}, {"d/y": A},
         added={"d", "d/y"}, root=True),
    Case("a device of the image", {"x": device(1, 3)}, {"x": device(1, 3)}, {"x": device(1, 3, 0o666)},
         {"x": device(1, 3, 0o666)}, root=True),
    Case("removed a device", {"x": device(1, 3)}, {}, {"x": device(1, 3)}, {"x": device(1, 3)}, root=True),
    Case("changed a device", {"x": device(1, 3)}, {"x": device(1, 5)}, {"x": device(1, 3)},
         {"x": device(1, 3)}, root=True),
    Case("made a file a fifo", {"x": A}, {"x": fifo()}, {"x": B}, {}, removed={"x"}),
    Case("made a fifo a file", {"x": fifo()}, {"x": A}, {"x": fifo()}, {"x": A}, added={"x"}),
    Case("added a file where the image adds a fifo", {}, {"x": A}, {"x": fifo()}, {"x": A}, added={"x"}),
    Case("added a directory where the image adds a fifo", {}, {"x/y": A}, {"x": fifo()}, None,
         added={"x", "x/y"}, conflicts={"x"}),
    Case("a fifo the image adds", {"y": A}, {"y": B}, {"y": A, "d/x": fifo(0o600), "d/s": socket()},
         {"y": B, "d/x": fifo(0o600), "d/s": socket()}, modified={"y"}),
    Case("removed a file the image made a fifo", {"x": A}, {}, {"x": fifo()}, {}, removed={"x"}),
    # --- names ---
    Case("names that are not UTF-8", {b"\xff": A, b"d\xfe/\x80": A}, {b"\xff": B, b"d\xfe/\x80": A,
         b"\xc3": C},
         {b"\xff": A, b"d\xfe/\x80": C}, {b"\xff": B, b"d\xfe/\x80": C, b"\xc3": C}, added={"\udcc3"},
         modified={"\udcff"}),
    Case("names with control characters", {}, {"a\nb": A, "c\td": B, "\x7f": C}, {}, {"a\nb": A, "c\td": B,
         "\x7f": C},
         added={"a\nb", "c\td", "\x7f"}),
    Case("a link text that is not UTF-8", {}, {"x": link(b"\xff/\xfe")}, {}, {"x": link(b"\xff/\xfe")},
         added={"x"}),
    Case("long names", {}, {"n" * 255: A, "d" * 255 + "/" + "e" * 255: B}, {},
         {"n" * 255: A, "d" * 255 + "/" + "e" * 255: B}, added={"n" * 255, "d" * 255,
         "d" * 255 + "/" + "e" * 255}),
    Case("names like our own", {}, {".etc-merge-1": A, ".etc-discarded/x": B, "upper/y": C}, {},
         {".etc-merge-1": A, ".etc-discarded/x": B, "upper/y": C},
         added={".etc-merge-1", ".etc-discarded", ".etc-discarded/x", "upper", "upper/y"}),
    Case("a deep tree", {}, {"/".join(["d"] * 60) + "/x": A}, {}, {"/".join(["d"] * 60) + "/x": A},
         added={"/".join(["d"] * n) for n in range(1, 61)} | {"/".join(["d"] * 60) + "/x"}),
    # --- systemd's stamp ---
    Case("the stamp is of no concern", {"x": A}, {"x": B, ".updated": C}, {"x": A}, {"x": B}, modified={"x"}),
    Case("the stamp of an image goes", {".updated": A}, {".updated": B}, {".updated": C, "x": A}, {"x": A}),
    Case("the stamp removed", {".updated": A}, {}, {".updated": A}, {}),
    Case("a stamp elsewhere is a file like others", {"d/.updated": A}, {"d/.updated": B}, {"d/.updated": A},
         {"d/.updated": B}, modified={"d/.updated"}),
    # --- together ---
    Case("several conflicts", {"a": A, "d/x": A}, {"a": B, "d/x": B, "n": D}, {"a/y": C, "d": C, "n": L},
         None,
         added={"n"}, modified={"a", "d/x"}, conflicts={"a", "d", "n"}),
    Case("one conflict is enough", {"a": A, "b": A}, {"a": B, "b": B}, {"a/y": C, "b": A}, None,
         modified={"a", "b"}, conflicts={"a"}),
]  # fmt: skip

BIND = MountMode.BIND
OVERLAY = MountMode.OVERLAY


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    if found.root and not ROOT:
        pytest.skip("needs root")
    return found


def paths(names: set[str]) -> list[bytes]:
    return sorted(map(os.fsencode, names))


def check_lists(case: Case, plan: MergePlan) -> None:
    assert sorted(plan.added) == paths(case.added)
    assert sorted(plan.modified) == paths(case.modified)
    assert sorted(plan.removed) == paths(case.removed)
    assert sorted(conflict.path for conflict in plan.conflicts) == paths(case.conflicts)
    for paths_in_order in (plan.added, plan.modified):
        assert all(
            path.rpartition(b"/")[0] not in paths_in_order[at:] for at, path in enumerate(paths_in_order)
        )


def in_deployment(case: Case, tmp_path: Path) -> tuple[Path, Path]:
    """The state directory with the new tree, and the current tree."""
    make(tree(case.new), tmp_path / "deploy/etc")
    return tmp_path / "deploy", make(tree(case.current), tmp_path / "current")


def test_case(case: Case, tmp_path: Path) -> None:
    state, running = in_deployment(case, tmp_path)
    pristine, new = image(tree(case.pristine)), image(tree(case.new))
    unmerged = snapshot(state / "etc")
    with opened(running) as current, opened(state) as deployment:
        dry = etcmerge.dry_run(pristine, current, new, booted_mode=BIND, mode=BIND, reporter=Silent())
        check_lists(case, dry)
        assert dry.summary == {
            "added": len(case.added),
            "modified": len(case.modified),
            "removed": len(case.removed),
            "conflicts": len(case.conflicts),
        }
        if case.result is None:
            with pytest.raises(EtcConflict, match="/etc cannot be merged: /etc/"):
                etcmerge.merge(
                    pristine, current, new, deployment, booted_mode=BIND, mode=BIND, reporter=Silent()
                )
            assert snapshot(state / "etc") == unmerged
            assert os.listdir(state) == ["etc"]
            return
        for _ in range(2):
            plan = etcmerge.merge(
                pristine, current, new, deployment, booted_mode=BIND, mode=BIND, reporter=Silent()
            )
            check_lists(case, plan)
            assert snapshot(state / "etc") == tree(case.result)
        etcmerge.discard(deployment)
    assert os.listdir(state) == ["etc"]
    assert snapshot(state / "etc") == tree(case.result)
    assert snapshot(running) == tree(case.current)


def test_model(case: Case) -> None:
    """The naive model, which the random trees are judged by, agrees with the table."""
    if ".updated" in {*case.new, *case.current}:
        pytest.skip("the model does not know the stamp")
    found = model(tree(case.pristine), tree(case.current), tree(case.new))
    assert found.conflicts == set(paths(case.conflicts))
    assert (found.added, found.modified, found.removed) == tuple(
        set(paths(names)) for names in (case.added, case.modified, case.removed)
    )
    if case.result is not None:
        assert found.result == tree(case.result)


def merged_overlay(case: Case, tmp_path: Path) -> Path:
    """The state directory after a merge for an overlay on the new image."""
    state = tmp_path / "deploy"
    (state / "etc").mkdir(parents=True)
    with opened(make(tree(case.current), tmp_path / "current")) as current, opened(state) as deployment:
        etcmerge.merge(
            image(tree(case.pristine)), current, image(tree(case.new)), deployment,
            booted_mode=OVERLAY, mode=OVERLAY, reporter=Silent(),
        )  # fmt: skip
    return state


def test_overlay(case: Case, tmp_path: Path) -> None:
    if case.result is None:
        with pytest.raises(EtcConflict):
            merged_overlay(case, tmp_path)
        return
    state = merged_overlay(case, tmp_path)
    upper = state / "etc/upper"
    made: Tree = snapshot(upper) if upper.exists() else {}
    assert overlaid(tree(case.new), made) == tree(case.result)
    untouched = {path for path, item in tree(case.new).items() if item.kind != "dir"} & set(made)
    changed = set(paths(case.added | case.modified | case.removed | {".updated"}))
    assert untouched <= changed, "only what was changed is in the upper layer"
    if upper.exists():
        assert (state / "etc/work").stat().st_mode & 0o777 == 0o700
        assert upper.stat().st_mode & 0o777 == 0o755


@pytest.mark.root
def test_overlay_in_the_kernel(tmp_path: Path) -> None:
    """The kernel shows the same as the table says, for all cases at once."""
    if not ROOT:
        absent("mounting needs root")
    mount, umount = require("mount"), require("umount")
    for number, case in enumerate(CASES):
        if case.result is None:
            continue
        place = tmp_path / str(number)
        state = merged_overlay(case, place)
        lower = make(tree(case.new), place / "lower")
        upper, work, shown = state / "etc/upper", state / "etc/work", place / "shown"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        shown.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        if subprocess.run([mount, "-t", "overlay", "overlay", "-o", options, shown], check=False).returncode:
            absent("no overlay can be mounted here")
        try:
            assert snapshot(shown) == tree(case.result), case.name
        finally:
            subprocess.run([umount, shown], check=True)


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
