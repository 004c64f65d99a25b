"""Trees on disk as values: to compare a mounted image with layers that another program extracted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

KEPT_XATTRS = ("security.capability",)


@dataclass(frozen=True)
class Node:
    """What a name in a tree is; ``content`` is a file's sha256, a link's target or a device's number."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Snapshot:
    """All nodes of a tree by path (``/`` is the root), and the groups of names that are one file."""

    nodes: dict[bytes, Node]
    hardlinks: frozenset[frozenset[bytes]]


def snapshot(root: Path) -> Snapshot:
    """Walk ``root`` without following symbolic links."""
    nodes: dict[bytes, Node] = {}
    names: dict[tuple[int, int], set[bytes]] = defaultdict(set)
    top = os.fsencode(root)
    for directory, subdirectories, files in os.walk(top):
        relative = b"/" + os.path.relpath(directory, top)
        base = b"/" if relative == b"/." else relative
        if base == b"/":
            nodes[b"/"] = _node(top, os.lstat(top))
        for name in subdirectories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            inside = os.path.join(base, name)
            nodes[inside] = _node(path, status)
            if not stat.S_ISDIR(status.st_mode):
                names[status.st_dev, status.st_ino].add(inside)
    groups = frozenset(frozenset(group) for group in names.values() if len(group) > 1)
    return Snapshot(nodes, groups)


def _node(path: bytes, status: os.stat_result) -> Node:
    kind = stat.S_IFMT(status.st_mode)
    content = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        content = os.fsdecode(os.readlink(path))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    xattrs = tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(os.listxattr(path, follow_symlinks=False))
        if name in KEPT_XATTRS
    )
    return Node(
        kind=stat.filemode(kind)[0],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        content=content,
        xattrs=xattrs,
    )


def as_os_image(extracted: Snapshot) -> Snapshot:
    """What composefs makes of a container's root: the root takes ``/usr``'s metadata, ``/run`` is emptied."""
    nodes = {path: node for path, node in extracted.nodes.items() if not path.startswith(b"/run/")}
    usr = nodes[b"/usr"]
    nodes[b"/"] = usr
    if b"/run" in nodes:
        nodes[b"/run"] = replace(nodes[b"/run"], mtime_ns=usr.mtime_ns)
    groups = (frozenset(name for name in group if name in nodes) for group in extracted.hardlinks)
    return Snapshot(nodes, frozenset(group for group in groups if len(group) > 1))


@contextlib.contextmanager
def mounted(image: Path, objects: Path, directory: Path) -> Iterator[Path]:
    """Mount an EROFS image over its objects as a composefs host does; yields the mount point."""
    metadata, merged = directory / "metadata", directory / "merged"
    metadata.mkdir()
    merged.mkdir()
    options = f"ro,metacopy=on,redirect_dir=on,lowerdir={metadata}::{objects}"
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, metadata], check=True)
    try:
        subprocess.run(["mount", "-t", "overlay", "composefs", "-o", options, merged], check=True)
        try:
            yield merged
        finally:
            subprocess.run(["umount", merged], check=True)
    finally:
        subprocess.run(["umount", metadata], check=True)
