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


def ours(root: Path, debian: Debian, image: str) -> list[str]:
    """Command that pulls ``image`` as a worker of the daemon would."""
    return [sys.executable, str(PULL), str(root), f"oci:{debian.layout}:{image}"]


def theirs(cfsctl: str, root: Path, debian: Debian, image: str) -> list[str]:
    """Command that makes cfsctl pull ``image``."""
    repository = str(root / "repository")
    return [cfsctl, "--repo", repository, "--insecure", "oci", "pull", f"oci:{debian.layout}:{image}", image]


def run_scenario(scenario: Scenario, debian: Debian, cfsctl: str, rounds: int, work: Path) -> str:
    """One line of results."""
    results = {"hostimaged": Measured(), "cfsctl": Measured()}
    for number in range(rounds):
        for program in results if number % 2 else reversed(list(results)):
            root = work / f"{program}-{number}"
            command: Callable[[str], list[str]]
            if program == "hostimaged":
                scratch_host(root)
                command = lambda image, at=root: ours(at, debian, image)  # noqa: E731
            else:
                root.mkdir()
                subprocess.run(
                    [cfsctl, "init", "--insecure", str(root / "repository")],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                command = lambda image, at=root: theirs(cfsctl, at, debian, image)  # noqa: E731
            for image in scenario.before:
                timed(command(image), None)
            timed(command(scenario.image), results[program])
            shutil.rmtree(root)
    our, their = results["hostimaged"], results["cfsctl"]
    ratio = statistics.median(our.seconds) / statistics.median(their.seconds)
    return (
        f"{scenario.name:28} {statistics.median(our.seconds):8.2f} s {statistics.median(their.seconds):8.2f} s"
        f" {ratio:8.2f} {max(our.peak_kib) / 1024:8.0f} MiB {max(their.peak_kib) / 1024:6.0f} MiB"
    )


def main() -> None:
    """Run the chosen scenarios and print a table."""
    parser = argparse.ArgumentParser(description="pull benchmarks beside cfsctl")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program per scenario")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/bench"), help="where the Debian image is kept"
    )
    parser.add_argument("scenario", nargs="*", help="only scenarios whose name contains one of these words")
    args = parser.parse_args()
    cfsctl = find("cfsctl")
    if cfsctl is None:
        raise SystemExit("cfsctl is not installed: nothing to compare with")
    debian = prepare(args.cache.absolute() / "debian")
    print(f"{'pull':28} {'hostimaged':>10} {'cfsctl':>10} {'ratio':>8} {'peak memory (ours, theirs)':>24}")
    with tempfile.TemporaryDirectory(dir=args.cache) as work:
        for scenario in SCENARIOS:
            if not args.scenario or any(word in scenario.name for word in args.scenario):
                print(run_scenario(scenario, debian, cfsctl, args.rounds, Path(work)), flush=True)


if __name__ == "__main__":
    main()
