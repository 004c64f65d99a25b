"""Bound images fetched in a process of its own: a line when it could begin, and one when it is done."""

from __future__ import annotations

import sys
from pathlib import Path

from hostimaged.composefs.repository import Repository
from hostimaged.host import boundimages, boundstore
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent
from hostimaged.system.locks import FileLock
from hostimaged.system.paths import HostPaths


def main() -> None:
    """For the host with the given scratch root and the given deployment, as a worker does."""
    paths = HostPaths.scratch(Path(sys.argv[1]))
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    sys.stdin.readline()
    with FileLock(paths.job_lock, timeout=60, what="job lock"):
        with Repository.open(paths.repository, lock_timeout=60, insecure=True) as repository:
            bound = boundimages.of_deployment(repository, DeploymentId(sys.argv[2]))
        print(len(boundstore.fetch(paths, bound, Silent())), flush=True)


if __name__ == "__main__":
    main()
