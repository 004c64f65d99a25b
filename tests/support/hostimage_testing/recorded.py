"""Recorded hosts read by hostimaged, and what of them may not change by reading."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from hostimage_testing.hosts import Deployment, RecordedHost
from hostimaged.composefs.repository import Repository
from hostimaged.host import bootc_v1
from hostimaged.host.model import Deployment as Row
from hostimaged.host.model import HostState, ProblemId
from hostimaged.host.read import read_host
from hostimaged.ids import DeploymentId
from hostimaged.system.paths import HostPaths


def paths_of(host: RecordedHost) -> HostPaths:
    """Its paths."""
    return HostPaths.scratch(host.root)


def state_of(host: RecordedHost) -> HostState:
    """The host as hostimaged sees it."""
    paths = paths_of(host)
    with Repository.open_unlocked(paths.repository) as repository:
        return read_host(paths, repository, soft_reboots=True)


def document_of(host: RecordedHost) -> dict[str, Any]:
    """Its host document."""
    return bootc_v1.document(state_of(host))


def row_of(state: HostState, deployment: Deployment) -> Row:
    """The row of a deployment, which must be there."""
    found = state.find(DeploymentId(deployment.id))
    assert found is not None, f"no row {deployment.id[:8]}"
    return found


def problems_of(row: Row | HostState) -> set[ProblemId]:
    """Ids of its problems."""
    return {problem.id for problem in row.problems}


def fingerprint(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of a tree without reading files: writing to it anywhere changes this."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in [".", *directories, *files]:
            path = Path(directory, name)
            status = path.lstat()
            target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
            seen = (
                status.st_mode,
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                target,
            )
            found[str(path.relative_to(root))] = seen
    return found
