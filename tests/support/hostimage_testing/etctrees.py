"""Trees of ``/etc`` as values: made on disk or as an image, read back, and merged by a naive model.

A tree maps paths to items; a directory is an item of its own, and comes before what is in it.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.tree import (
    CharDevice,
    Content,
    Directory,
    External,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Stat,
    Symlink,
)

ROOT = os.geteuid() == 0
_OWN = (os.geteuid(), os.getegid())
_INLINE_LIMIT = 64
MTIME = 1_700_000_000


@dataclass(frozen=True)
class Item:
    """What a path is. ``kind`` is one of ``dir file link fifo socket char``; ``content`` also of a device."""

    kind: str
    content: bytes = b""
    mode: int = 0o644
    uid: int = _OWN[0]
    gid: int = _OWN[1]
    xattrs: tuple[tuple[str, bytes], ...] = ()

    @property
    def is_special(self) -> bool:
        return self.kind not in {"dir", "file", "link"}


Tree: TypeAlias = dict[bytes, Item]
#: As tests write them: names of either type, and no parents.
Items: TypeAlias = Mapping[Any, Item]


def file(content: str | bytes = "", mode: int = 0o644, **rest: object) -> Item:
    data = content.encode() if isinstance(content, str) else content
    return _item("file", data, mode, **rest)


def directory(mode: int = 0o755, **rest: object) -> Item:
    return _item("dir", b"", mode, **rest)


def link(target: str | bytes, **rest: object) -> Item:
    return _item("link", os.fsencode(target), 0o777, **rest)


def fifo(mode: int = 0o644, **rest: object) -> Item:
    return _item("fifo", b"", mode, **rest)


def socket(mode: int = 0o644, **rest: object) -> Item:
    return _item("socket", b"", mode, **rest)


def device(major: int, minor: int, mode: int = 0o600, **rest: object) -> Item:
    return _item("char", b"%d:%d" % (major, minor), mode, **rest)


def _item(kind: str, content: bytes, mode: int, **rest: object) -> Item:
    xattrs = rest.pop("xattrs", {})
    assert isinstance(xattrs, dict)
    return Item(kind, content, mode, xattrs=tuple(sorted(xattrs.items())), **rest)  # type: ignore[arg-type]


def tree(items: Items) -> Tree:
    """With the parents that are not named, 0755, and in order."""
    found = {os.fsencode(path): item for path, item in items.items()}
    for path in list(found):
        for parent in parents(path):
            found.setdefault(parent, directory())
    return dict(sorted(found.items(), key=lambda pair: pair[0].split(b"/")))


def parents(path: bytes) -> Iterator[bytes]:
    """The directories above a path, the highest first."""
    parts = path.split(b"/")
    for count in range(1, len(parts)):
        yield b"/".join(parts[:count])


# --- as an image -------------------------------------------------------------------------------------------


def image(items: Tree, *, mode: int = 0o755) -> Directory:
    """The directory of an image. Contents of more than 64 bytes are objects."""
    root = Directory(Stat(mode, *_OWN, MTIME, 0, {}), {})
    for path, item in items.items():
        *above, name = path.split(b"/")
        at = root
        for part in above:
            below = at.entries[part]
            assert isinstance(below, Directory)
            at = below
        xattrs = {os.fsencode(n): value for n, value in item.xattrs}
        stat = Stat(item.mode, item.uid, item.gid, MTIME, 0, xattrs)
        at.entries[name] = Directory(stat, {}) if item.kind == "dir" else Leaf(stat, _content(item))
    return root


def _content(item: Item) -> Content:
    match item.kind:
        case "file" if len(item.content) > _INLINE_LIMIT:
            return External(fsverity.digest(Algorithm.SHA512, item.content), len(item.content))
        case "file":
            return Inline(item.content)
        case "link":
            return Symlink(item.content)
        case "fifo":
            return Fifo()
        case "socket":
            return Socket()
    major, minor = map(int, item.content.split(b":"))
    return CharDevice(os.makedev(major, minor))


# --- on disk -----------------------------------------------------------------------------------------------


def make(items: Tree, at: Path) -> Path:
    """Write a tree below ``at``, which is made."""
    at.mkdir(parents=True)
    for path, item in items.items():
        _make(item, os.path.join(os.fsencode(at), path))
    for path, item in items.items():
        _set_metadata(item, os.path.join(os.fsencode(at), path))
    return at


def _make(item: Item, place: bytes) -> None:
    match item.kind:
        case "dir":
            os.mkdir(place)
        case "file":
            Path(os.fsdecode(place)).write_bytes(item.content)
        case "link":
            os.symlink(item.content, place)
        case "fifo":
            os.mkfifo(place)
        case "socket":
            os.mknod(place, st.S_IFSOCK | 0o600)
        case "char":
            major, minor = map(int, item.content.split(b":"))
            os.mknod(place, st.S_IFCHR | 0o600, os.makedev(major, minor))


def _set_metadata(item: Item, place: bytes) -> None:
    os.chown(place, item.uid, item.gid, follow_symlinks=False)
    for name, value in item.xattrs:
        os.setxattr(place, name, value, follow_symlinks=False)
    if item.kind != "link":
        os.chmod(place, item.mode)


def snapshot(at: Path, *, ignored: tuple[str, ...] = ()) -> Tree:
    """The tree below ``at``; xattrs that begin with one of ``ignored`` are left out."""
    found: Tree = {}
    top = os.fsencode(at)
    for parent, directories, files in os.walk(top):
        for name in directories + files:
            place = os.path.join(parent, name)
            found[os.path.relpath(place, top)] = _read(place, ignored)
    return dict(sorted(found.items(), key=lambda pair: pair[0].split(b"/")))


def _read(place: bytes, ignored: tuple[str, ...]) -> Item:
    status = os.lstat(place)
    xattrs = tuple(
        (name, os.getxattr(place, name, follow_symlinks=False))
        for name in sorted(os.listxattr(place, follow_symlinks=False))
        if not name.startswith(ignored)
    )
    kind, content = "", b""
    match st.S_IFMT(status.st_mode):
        case st.S_IFDIR:
            kind = "dir"
        case st.S_IFREG:
            kind, content = "file", Path(os.fsdecode(place)).read_bytes()
        case st.S_IFLNK:
            kind, content = "link", os.readlink(place)
        case st.S_IFIFO:
            kind = "fifo"
        case st.S_IFSOCK:
            kind = "socket"
        case st.S_IFCHR:
            kind = "char"
            content = b"%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev))
    return Item(kind, content, st.S_IMODE(status.st_mode), status.st_uid, status.st_gid, xattrs)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


# --- an overlay --------------------------------------------------------------------------------------------


def overlaid(lower: Tree, upper: Tree) -> Tree:
    """What overlayfs shows of ``upper`` on ``lower``, where no directory is opaque."""
    result = dict(lower)
    for path, item in upper.items():
        if item == WHITEOUT:
            _drop(result, path)
        elif item.kind == "dir" and result.get(path, item).kind == "dir":
            result[path] = item
        else:
            _drop(result, path)
            result[path] = item
    return dict(sorted(result.items(), key=lambda pair: pair[0].split(b"/")))


WHITEOUT = device(0, 0, 0)


# --- the model ---------------------------------------------------------------------------------------------


@dataclass
class Modelled:
    """What the rules of bootc's merge give: path by path, from whole trees, in no hurry."""

    added: set[bytes] = field(default_factory=set)
    modified: set[bytes] = field(default_factory=set)
    removed: set[bytes] = field(default_factory=set)
    conflicts: set[bytes] = field(default_factory=set)
    result: Tree = field(default_factory=dict)


def model(pristine: Tree, current: Tree, new: Tree) -> Modelled:
    """Merge by the letter of the rules."""
    old = {path: item for path, item in pristine.items() if not item.is_special}
    ours = {path: item for path, item in current.items() if not item.is_special}
    found = Modelled()
    for path, item in ours.items():
        if path not in old:
            found.added.add(path)
        elif item != old[path]:
            found.modified.add(path)
    for path in old:
        above = path.rpartition(b"/")[0]
        if path not in ours and (not above or (above in ours and ours[above].kind == "dir")):
            found.removed.add(path)
    _recreated(found, ours, old, new)
    changed = found.added | found.modified
    concerned = {above for path in changed for above in parents(path)} | changed
    for path in concerned:
        if path in new and (ours[path].kind == "dir") != (new[path].kind == "dir"):
            found.conflicts.add(path)
    found.result = dict(new)
    for path in sorted(changed, key=lambda path: path.split(b"/")):
        _apply(found.result, path, ours[path], old.get(path))
    for path in found.removed:
        _drop(found.result, path)
    found.result = dict(sorted(found.result.items(), key=lambda pair: pair[0].split(b"/")))
    return found


def _recreated(found: Modelled, ours: Tree, old: Tree, new: Tree) -> None:
    """Unchanged directories with changes below that the new tree does not have."""
    for path, item in ours.items():
        if item.kind != "dir" or path in found.added | found.modified or path in new:
            continue
        below = path + b"/"
        if any(other.startswith(below) for other in found.added):
            found.added.add(path)
        elif any(other.startswith(below) for other in found.modified):
            found.modified.add(path)
        assert old[path] == item


def _apply(result: Tree, path: bytes, item: Item, was: Item | None) -> None:
    there = result.get(path)
    if item.kind == "dir" and there is not None and there.kind == "dir":
        removed = ({n for n, _ in was.xattrs} if was is not None and was.kind == "dir" else set()) - {
            n for n, _ in item.xattrs
        }
        xattrs = {n: value for n, value in there.xattrs if n not in removed} | dict(item.xattrs)
        item = replace(item, xattrs=tuple(sorted(xattrs.items())))
    else:
        _drop(result, path)
    result[path] = item


def _drop(result: Tree, path: bytes) -> None:
    for other in [other for other in result if other == path or other.startswith(path + b"/")]:
        del result[other]
