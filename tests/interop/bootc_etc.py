"""The three-way merge of ``/etc`` as bootc makes it when it finalises. Part of ``bootc_model``."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bootc_formats import Refused


@dataclass(frozen=True)
class Node:
    """What is compared of a file: all but the times."""

    kind: str
    mode: int
    uid: int
    gid: int
    xattrs: tuple[tuple[str, bytes], ...]
    content: bytes


Tree = dict[str, Node]


@dataclass
class Diff:
    """What the administrator did, and what cannot be carried over; paths below ``/etc`` in walking order."""

    added: list[str] = field(default_factory=list)
    modified: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unmergeable: list[str] = field(default_factory=list)


def tree(root: Path) -> Tree:
    """Regular files, directories and links below ``root``, parents first; others are not seen at all."""
    return dict(_walk(root, ""))


def from_files(files: Mapping[str, bytes]) -> Tree:
    """The tree of an image that has these files, owned by root and with the usual modes."""
    parents = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    found = {path: Node("dir", 0o755, 0, 0, (), b"") for path in parents}
    found |= {path: Node("file", 0o644, 0, 0, (), data) for path, data in files.items()}
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def _walk(root: Path, base: str) -> Iterator[tuple[str, Node]]:
    for name in sorted(os.listdir(root / base)):
        path = f"{base}/{name}" if base else name
        node = _node(root / path)
        if node is None:
            continue
        yield path, node
        if node.kind == "dir":
            yield from _walk(root, path)


def _node(path: Path) -> Node | None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        kind, content = "link", os.fsencode(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        kind, content = "file", path.read_bytes()
    elif stat.S_ISDIR(status.st_mode):
        kind, content = "dir", b""
    else:
        return None
    xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(_names(path)))
    return Node(kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, xattrs, content)


def _names(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def compare(pristine: Tree, current: Tree, new: Tree) -> Diff:
    """Changes from ``pristine`` to ``current``, judged against ``new``.

    Of a file that became a directory bootc sees the directory alone, and nothing below it.
    """
    diff = Diff()
    unseen = tuple(
        f"{p}/" for p, n in current.items() if n.kind == "dir" and _kind(pristine, p) not in (None, "dir")
    )
    for path, node in current.items():
        if path.startswith(unseen):
            continue
        if path not in pristine:
            diff.added.append(path)
        elif node != pristine[path] or (
            node.kind == "dir" and _kind(new, path) != "dir" and _changed_below(pristine, current, path)
        ):
            diff.modified.append(path)
    diff.removed = [p for p in pristine if p not in current and _kind(current, _parent(p)) in (None, "dir")]
    diff.removed = [p for p in diff.removed if _parent(p) not in pristine or _parent(p) in current]
    for path in diff.added + diff.modified:
        there = _kind(new, path)
        if there is not None and (current[path].kind == "dir") != (there == "dir"):
            diff.unmergeable.append(path)
    return diff


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _kind(nodes: Tree, path: str) -> str | None:
    return nodes[path].kind if path in nodes else None


def _changed_below(pristine: Tree, current: Tree, path: str) -> bool:
    return any(p.startswith(f"{path}/") and pristine.get(p) != node for p, node in current.items())


def merge(pristine: Tree, current_root: Path, new_root: Path) -> Diff:
    """Carry the changes of ``current_root`` over into ``new_root``; refuses at the first conflict."""
    current = tree(current_root)
    diff = compare(pristine, current, tree(new_root))
    if diff.unmergeable:
        raise Refused(f"Merge conflict in etc: {diff.unmergeable[0]}")
    for path in diff.added + diff.modified:
        _carry(current_root / path, new_root / path, current[path])
    for path in diff.removed:
        _delete(new_root / path)
    return diff


def _carry(source: Path, target: Path, node: Node) -> None:
    if node.kind == "dir":
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(node.mode)
    else:
        _delete(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target, follow_symlinks=False)
    os.chown(target, node.uid, node.gid, follow_symlinks=False)
    for name, value in node.xattrs:
        os.setxattr(target, name, value, follow_symlinks=False)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
