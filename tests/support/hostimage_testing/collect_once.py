"""One collection of garbage in a process of its own: a line when it could begin, and one when it is done."""

from __future__ import annotations

import sys
from pathlib import Path

from hostimaged.host.collect import collect
from hostimaged.host.session import open_session
from hostimaged.progress import Silent
from hostimaged.system.locks import FileLock
from hostimaged.system.paths import HostPaths


def main() -> None:
    """Collect on the host whose scratch root is given, as a worker does."""
    paths = HostPaths.scratch(Path(sys.argv[1]))
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    sys.stdin.readline()
    with (
        FileLock(paths.job_lock, timeout=60, what="job lock"),
        open_session(paths, Silent(), lock_timeout=60) as session,
    ):
        result = collect(session)
    print(result["result"], flush=True)


if __name__ == "__main__":
    main()
