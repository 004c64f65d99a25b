"""A worker whose check verifies the repository again and again, in slices, until a file is there.

Run as a program in place of ``hostimaged.jobs.worker``; the reference ``dir:PATH`` names the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hostimaged.jobs import worker
from hostimaged.jobs.channel import Channel
from hostimaged.jobs.operations import Check
from hostimaged.jobs.slices import reading
from hostimaged.oci import fsck
from hostimaged.system.paths import HostPaths


def verify(paths: HostPaths, operation: Check, channel: Channel) -> dict[str, Any]:
    """Verify; the findings of all rounds."""
    stop = Path(operation.reference.removeprefix("dir:"))
    found: list[str] = []
    with reading(paths.repository, channel, lock_timeout=5) as (repository, slices):
        rounds = 0
        while not stop.exists():
            report = fsck.check(repository, give_up=channel.check, breaks=slices)
            found += [finding.kind for finding in report.repository.errors]
            rounds += 1
            channel.message(f"round {rounds}")
    return {"found": found, "rounds": rounds}


if __name__ == "__main__":
    sys.exit(worker.main(work={"check": "__main__:verify"}))
