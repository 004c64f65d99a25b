"""Benchmarks beside cfsctl: both do the same work alternately, and ratios of medians are printed.

usage: run.py [--rounds N] [--cache DIR] [SCENARIO …]

Each run is a process of its own; time is wall time from start to exit, memory the peak resident size of the
process and its waited-for children. Absolute times mean little on shared machines: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hostimage_testing.debian import Debian, prepare
from hostimage_testing.host import scratch_host
from hostimage_testing.tools import find

PULL = Path(__file__).with_name("pull_once.py")


@dataclass
class Measured:
    """Seconds and peak KiB of every run of one program."""

    seconds: list[float] = field(default_factory=list)
    peak_kib: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    """One kind of pull: ``before`` are images that the repository already holds."""

    name: str
    image: str
    before: tuple[str, ...] = ()


SCENARIOS = (
    Scenario("fresh, one layer, gzip", "one-gzip"),
    Scenario("fresh, one layer, zstd", "one-zstd"),
    Scenario("fresh, eight layers, gzip", "eight-gzip"),
    Scenario("fresh, eight layers, zstd", "eight-zstd"),
    Scenario("again, nothing to do", "eight-gzip", ("eight-gzip",)),
)


def timed(argv: list[str], into: Measured | None) -> None:
    """Run ``argv`` and record it; a failure ends the benchmark."""
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} exited {process.returncode}")
    if into is not None:
        into.seconds.append(time.monotonic() - start)
        into.peak_kib.append(usage.ru_maxrss)


@dataclass(frozen=True)
class Contestant:
    """One of the two programs: how it makes an empty repository below a directory, and pulls into it."""

    prepare: Callable[[Path], None]
    pull: Callable[[Path, str], list[str]]


def contestants(cfsctl: str, debian: Debian) -> dict[str, Contestant]:
    """Both programs, set up to pull images of the same layout."""

    def prepare_theirs(root: Path) -> None:
        root.mkdir()
        init = [cfsctl, "init", "--insecure", str(root / "repository")]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)

    def pull_theirs(root: Path, image: str) -> list[str]:
        source = f"oci:{debian.layout}:{image}"
        return [cfsctl, "--repo", str(root / "repository"), "--insecure", "oci", "pull", source, image]

    def prepare_ours(root: Path) -> None:
        scratch_host(root)

    def pull_ours(root: Path, image: str) -> list[str]:
        return [sys.executable, str(PULL), str(root), f"oci:{debian.layout}:{image}"]

    return {
        "hostimaged": Contestant(prepare_ours, pull_ours),
        "cfsctl": Contestant(prepare_theirs, pull_theirs),
    }


def run_scenario(scenario: Scenario, programs: dict[str, Contestant], rounds: int, work: Path) -> str:
    """One line of results; the programs take turns at being first."""
    results = {name: Measured() for name in programs}
    for number in range(rounds):
        for name in programs if number % 2 else reversed(programs):
            root = work / f"{name}-{number}"
            programs[name].prepare(root)
            for image in scenario.before:
                timed(programs[name].pull(root, image), None)
            timed(programs[name].pull(root, scenario.image), results[name])
            shutil.rmtree(root)
    our, their = (statistics.median(measured.seconds) for measured in results.values())
    peaks = (max(measured.peak_kib) / 1024 for measured in results.values())
    memory = " ".join(f"{peak:7.0f} MiB" for peak in peaks)
    return f"{scenario.name:28} {our:8.2f} s {their:8.2f} s {our / their:8.2f} {memory}"


def main() -> None:
    """Run the chosen scenarios and print a table."""
    parser = argparse.ArgumentParser(description="pull benchmarks beside cfsctl")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program per scenario")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench"), help="keeps the Debian image")
    parser.add_argument("scenario", nargs="*", help="only scenarios whose name contains one of these words")
    args = parser.parse_args()
    cfsctl = find("cfsctl")
    if cfsctl is None:
        raise SystemExit("cfsctl is not installed: nothing to compare with")
    programs = contestants(cfsctl, prepare(args.cache.absolute() / "debian"))
    print(f"{'pull':28} {'hostimaged':>10} {'cfsctl':>10} {'ratio':>8} {'peak memory (ours, theirs)':>24}")
    with tempfile.TemporaryDirectory(dir=args.cache) as work:
        for scenario in SCENARIOS:
            if not args.scenario or any(word in scenario.name for word in args.scenario):
                print(run_scenario(scenario, programs, args.rounds, Path(work)), flush=True)


if __name__ == "__main__":
    main()
