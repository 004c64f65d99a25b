"""The disk of a guest that is off: what is in a directory of its root's file system, copied out of it.

A mount does not do: this machine's kernel opens no file that has fs-verity (ext4 answers EOPNOTSUPP). debugfs
reads them as any other.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hostimage_testing.tools import require, run

_SECTOR = 512
#: The physical root's directory with the journal of the deployments.
_JOURNAL = "state/os/default/var/log/journal"


def copy_out(disk: Path, path: str, directory: Path) -> Path:
    """Copy the directory ``path`` of the partition ``root`` of ``disk``, raw or qcow2, to ``directory``.

    What the file system's journal still held is taken into account; ``disk`` stays as it is.
    """
    copy = directory / "copy.raw"
    try:
        run(require("qemu-img"), "convert", "-q", "-O", "raw", disk, copy)
        table = json.loads(run(require("sfdisk"), "--json", copy).out)["partitiontable"]
        (start,) = (part["start"] for part in table["partitions"] if part.get("name") == "root")
        system = f"{copy}?offset={start * _SECTOR}"
        # 1: the journal was replayed.
        checked = run(require("e2fsck"), "-fy", system, check=False)
        if checked.code not in (0, 1):
            pytest.fail(f"the file system is damaged:\n{checked.out}")
        run(require("debugfs"), "-R", f"rdump /{path} {directory}", system)
    finally:
        copy.unlink(missing_ok=True)
    return directory / Path(path).name


def journal(disk: Path, directory: Path) -> str:
    """What the journal on ``disk`` has of all boots."""
    kept = copy_out(disk, _JOURNAL, directory)
    argv = [require("journalctl"), "--no-pager", "--output=short-precise", "-D", kept]
    found = subprocess.run(argv, check=False, capture_output=True, text=True)
    return found.stdout + found.stderr
