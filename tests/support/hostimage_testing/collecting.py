"""Collections of garbage on recorded hosts, each compared with its own dry run; and what a host holds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from hostimage_testing.hosts import RecordedHost
from hostimage_testing.operating import session
from hostimaged.host.collect import collect, dry_run
from hostimaged.host.collectplan import Rules
from hostimaged.progress import Reporter, Silent

#: Results that only the real thing can tell.
_ONLY_REAL = ("tags-made",)
DAY = 24 * 3600


def told(host: RecordedHost, rules: Rules | None = None) -> dict[str, Any]:
    """What a dry run says; that it changed nothing is checked."""
    before = everything(host.root)
    with session(host) as opened:
        found = dry_run(
            opened.paths,
            opened.repository,
            opened.state(),
            rules or Rules(),
            now=opened.now(),
            reporter=Silent(),
        )
    assert everything(host.root) == before
    return found


def collected(
    host: RecordedHost, rules: Rules | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """What a collection says, which is what the dry run said, and what became of the objects."""
    expected = told(host, rules)
    before = objects(host.repository)
    with session(host, reporter) as opened:
        done = collect(opened, rules or Rules())
    real = {key: value for key, value in done.items() if key not in _ONLY_REAL}
    assert real == expected, (real, expected)
    gone = before.keys() - objects(host.repository).keys()
    assert done["objects-removed"] == len(gone)
    assert done["objects-bytes"] == sum(before[name] for name in gone)
    if done["result"] != "kept":
        assert not list((host.sysroot / "state/hostimaged").glob("transaction*"))
    return done


def objects(repository: Path) -> dict[str, int]:
    """Sizes of all objects by path."""
    return {
        f"{path.parent.name}{path.name}": path.stat().st_size
        for path in (repository / "objects").glob("??/*")
    }


def everything(root: Path) -> dict[str, tuple[object, ...]]:
    """Every name below ``root``, but for private directories of jobs, and what it is."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name != "tmp"]
        for name in (*names, *files):
            path = Path(directory, name)
            status = path.lstat()
            link = os.readlink(path) if path.is_symlink() else ""
            size = 0 if path.is_dir() else status.st_size
            found[str(path.relative_to(root))] = (
                status.st_mode,
                size,
                status.st_mtime_ns * (not path.is_dir()),
                link,
            )
    # Made by whoever opens the host.
    for name in ("sysroot/state/hostimaged",):
        found.pop(name, None)
    return found


def age(link: Path, seconds: float) -> None:
    """Let a link have been made ``seconds`` ago."""
    then = time.time() - seconds
    os.utime(link, (then, then), follow_symlinks=False)
