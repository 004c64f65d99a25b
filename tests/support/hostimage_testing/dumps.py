"""Trees in the forms that other programs read: a dump file, good or odd, and files on disk."""

from __future__ import annotations

import os
import random
import stat as st
from contextlib import suppress
from pathlib import Path

from hostimaged.composefs.dumpfile import write
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Sparse,
    Symlink,
    walk,
)


def dumped(root: Directory) -> bytes:
    """The dump file of a tree, with files without verity told apart, which the canonical form does not."""
    lines = []
    for (_, node), line in zip(walk(root), write(root), strict=True):
        if isinstance(node, Leaf) and isinstance(node.content, ExternalNoVerity):
            line = line.replace(b" - " + node.content.id.hex().encode(), b" - -", 1)
        lines.append(line)
    return b"".join(lines)


def materialise(root: Directory, at: Path) -> None:
    """Make a tree on disk, as far as the file system and our privileges allow."""
    made: dict[Leaf, Path] = {}
    for path, node in walk(root):
        place = Path(os.fsdecode(os.fsencode(at) + path))
        if isinstance(node, Leaf) and node in made:
            os.link(made[node], place, follow_symlinks=False)
            continue
        if isinstance(node, Directory):
            place.mkdir(exist_ok=True)
        else:
            _make_leaf(node, place)
            made[node] = place
        for name, value in node.stat.xattrs.items():
            if name == b"security.capability":
                continue  # the kernel takes any value, and then fails to read it
            with suppress(OSError, ValueError):
                os.setxattr(place, name, value, follow_symlinks=False)
        with suppress(OSError):
            os.chown(place, node.stat.uid, node.stat.gid, follow_symlinks=False)
        if not place.is_symlink():
            with suppress(OSError):
                place.chmod(node.stat.mode | (0o700 if isinstance(node, Directory) else 0o400))
    for path, node in reversed(list(walk(root))):
        place = Path(os.fsdecode(os.fsencode(at) + path))
        with suppress(OSError, OverflowError):
            nanoseconds = node.stat.mtime % (1 << 33) * 1_000_000_000 + node.stat.nsec
            os.utime(place, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def _make_leaf(leaf: Leaf, place: Path) -> None:
    match leaf.content:
        case Inline(data):
            place.write_bytes(data)
        case External(object_id) | ExternalNoVerity(object_id):
            place.write_bytes(object_id * 3)
        case Sparse(size):
            place.write_bytes(bytes(size % 20_000))
        case Symlink(target):
            place.symlink_to(os.fsdecode(target))
        case Fifo():
            os.mkfifo(place)
        case Socket():
            os.mknod(place, st.S_IFSOCK | 0o600)
        case CharDevice(rdev) | BlockDevice(rdev):
            kind = st.S_IFCHR if isinstance(leaf.content, CharDevice) else st.S_IFBLK
            try:
                os.mknod(place, kind | 0o600, rdev)
            except OSError:
                os.mkfifo(place)


def mutated(lines: list[bytes], rng: random.Random) -> bytes:
    """A dump file with one thing wrong, or odd."""
    lines = list(lines)
    at = rng.randrange(len(lines))
    fields = lines[at].rstrip(b"\n").split(b" ")
    odd = rb"""- 0 1 5 @ \x2d \q / /a +7 40755 100644 120777 @100644 1.5 0.1000000000 18446744073709551615
        18446744073709551616 x=y = \xc3""".split()
    odd += [b"", "é".encode()]
    change = rng.randrange(6)
    if change == 0:
        del fields[rng.randrange(len(fields))]
    elif change == 1:
        fields.insert(rng.randrange(len(fields) + 1), rng.choice(odd))
    elif change == 2:
        other = rng.choice(lines).split(b" ")
        field = rng.randrange(len(fields))
        fields[field] = other[min(field, len(other) - 1)].rstrip(b"\n")
    else:
        fields[rng.randrange(len(fields))] = rng.choice(odd)
    lines[at] = b" ".join(fields) + b"\n"
    if change == 2:
        lines[at:at] = [rng.choice(lines)]
    return b"".join(lines)
