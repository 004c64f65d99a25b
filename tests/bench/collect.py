"""Collection of garbage and checks of repositories of growing size, beside cfsctl: a table.

usage: collect.py [--rounds N] [--cache DIR] [--where DIR] [--prefix COMMAND] [OBJECTS …]

Of the objects of a host half are contents of an image that a tag keeps, the other half is garbage. Ours is
the whole collection (``hostimaged collect``: roots, tags, journal, sweep), theirs that of the repository.
Each run of both is a process of its own, a collection on a fresh copy, and they take turns; seconds are
medians. Memory is that of all processes together, at its highest.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measure
from material import Material
from measure import Measured

from hostimage_testing.host import scratch_host
from hostimage_testing.hosts import RecordedHost
from hostimage_testing.lives import upgraded
from hostimage_testing.pulling import pull
from hostimage_testing.tools import find
from hostimaged.composefs.repository import Repository
from hostimaged.composefs.splitstream import ContentType
from hostimaged.system.paths import HostPaths

OBJECTS = (10_000, 100_000, 500_000)
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Work:
    """The same work for both programs; ``changes`` says that each run needs a copy of its own."""

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    changes: bool = False


WORK = (
    Work("collect", ("collect",), ("gc",), changes=True),
    Work("dry run", ("collect", "--dry-run"), ("gc", "--dry-run")),
    Work("fsck", ("fsck",), ("fsck",)),
)


def make_host(root: Path, cfsctl: str, material: Material, objects: int) -> None:
    """A host with about so many objects, half of which are garbage, at ``root``."""
    host = RecordedHost(root, cfsctl)
    upgraded(host)
    scratch_host(root)
    pull(HostPaths.scratch(root), f"oci:{material.small(objects // 2)}:image")
    with Repository.open(host.repository) as repository, repository.new_stream(ContentType.BLOB) as stream:
        for number in range(objects // 2):
            content = b"garbage %d " % number * 20
            stream.external(repository.store_object(content).id, len(content))
        repository.write_stream("garbage", stream)


def copied(root: Path, to: Path) -> Path:
    """The host at another place: its files are linked, as collections only remove names."""
    if to.exists():
        shutil.rmtree(to)
    subprocess.run(["cp", "-al", root, to], check=True)
    return to


class Table:
    """Measures one size of repository after the other."""

    def __init__(self, cfsctl: str, rounds: int, prefix: list[str]) -> None:
        self._cfsctl = cfsctl
        self._rounds = rounds
        self._prefix = prefix

    def run(self, root: Path, work: Work, objects: int) -> str:
        """One line of the table."""
        results = {"ours": Measured(), "theirs": Measured()}
        removed: set[int] = set()
        for number in range(self._rounds + 1):
            for name in sorted(results, reverse=bool(number % 2)):
                place = copied(root, root.with_name("copy")) if work.changes else root
                argv = self._argv(place, work, name)
                measure.settle(place)
                if number == self._rounds:
                    measure.peak(argv, results[name])
                    continue
                out = measure.run([*self._prefix, *argv], results[name])
                if work.name != "fsck":
                    removed.add(_removed(out))
        if len(removed) > 1:
            raise SystemExit(f"{work.name}: not the same number of objects: {removed}")
        ours, theirs = results.values()
        each = ours.median / objects * 1e6
        return (
            f"{objects:8} {work.name:8} {ours.median:8.2f} {theirs.median:8.2f}"
            f" {ours.median / theirs.median:6.2f} {each:10.1f}"
            f" {ours.peak_kib / 1024:8.0f} {theirs.peak_kib / 1024:8.0f} {max(removed, default=0):8}"
        )

    def _argv(self, root: Path, work: Work, name: str) -> list[str]:
        repository = str(root / "sysroot/composefs")
        if name == "theirs":
            return [self._cfsctl, "--repo", repository, "--insecure", *work.theirs]
        python = [sys.executable, "-P", "-m"]
        if work.name == "fsck":
            return [*python, "hostimaged.composefs", "fsck", repository]
        places = [f"--{key}={root / value}" for key, value in (("sysroot", "sysroot"), ("esp", "efi"))]
        return [*python, "hostimaged", *work.ours, *places]


def _removed(out: str) -> int:
    """How many objects a collection removed, or would."""
    found = re.search(r"objects-removed=(\d+)|(\d+) object", out) or re.search(r"[Oo]bjects\D*(\d+)", out)
    if found is None:
        raise SystemExit(f"no number of objects in: {out}")
    return int(next(group for group in found.groups() if group))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="collections and checks beside cfsctl, by size")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench"), help="keeps the images")
    parser.add_argument("--where", type=Path, help="where repositories are made [the cache]")
    parser.add_argument("--prefix", default="", help="begins each timed command, such as 'chrt -r 1'")
    parser.add_argument("objects", nargs="*", type=int, default=OBJECTS, help="sizes of repositories")
    args = parser.parse_args()
    cfsctl = find("cfsctl")
    if cfsctl is None:
        raise SystemExit("cfsctl is not installed: nothing to compare with")
    args.cache.mkdir(parents=True, exist_ok=True)
    print(f"{'':17} {'seconds':>17} {'':6} {'µs each':>10} {'peak MiB':>17}")
    print(f"{'objects':>8} {'':8} {'ours':>8} {'cfsctl':>8} {'ratio':>6} {'ours':>10}", end="")
    print(f" {'ours':>8} {'cfsctl':>8} {'removed':>8}")
    table = Table(cfsctl, args.rounds, shlex.split(args.prefix))
    for objects in args.objects:
        with tempfile.TemporaryDirectory(dir=args.where or args.cache) as directory:
            root = Path(directory) / "host"
            make_host(root, cfsctl, Material(args.cache.absolute()), objects)
            for work in WORK:
                print(table.run(root, work, objects), flush=True)


if __name__ == "__main__":
    main()
