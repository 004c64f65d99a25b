"""Real file systems in files, on loop devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostimage_testing.tools import absent, require, run

_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}


@contextmanager
def loop_filesystem(directory: Path, kind: str, size: int) -> Iterator[Path]:
    """Mount a new file system of ``kind`` (ext4, xfs with reflinks, btrfs) and ``size`` bytes.

    Gives where it is mounted, below ``directory``. At the end it is unmounted with everything that programs
    mounted below it, which gives its loop device back. A kernel that cannot mount it is a missing peer
    (``absent``).
    """
    make, *options = _MAKE[kind]
    image = directory / f"{kind}.img"
    with image.open("xb") as file:
        file.truncate(size)
    run(require(make), *options, image)
    mounted = directory / kind
    mounted.mkdir()
    done = run("mount", "-t", kind, "-o", "loop", image, mounted, check=False)
    if done.code != 0:
        image.unlink()
        absent(f"{kind} on a loop device cannot be mounted here: {done.err.strip()}")
    try:
        yield mounted
    finally:
        run("umount", "--recursive", mounted)
        image.unlink()


def used(path: Path) -> int:
    """Bytes that are in use on the file system of ``path``, once everything is written to it."""
    run("sync", "--file-system", path)
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
