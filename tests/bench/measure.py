"""Runs programs and measures them: wall time, processor time, peak memory of all their processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from hostimaged.system.durable import sync_filesystem

_INTERVAL = 0.02


@dataclass
class Measured:
    """Every run of one program: wall and processor seconds, and the highest peak in KiB seen."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak_kib: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_processor(self) -> float:
        return statistics.median(self.processor)


def settle(directory: Path) -> None:
    """Let what was written to the file system of ``directory`` reach its device before anything is timed."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_filesystem(descriptor)
    finally:
        os.close(descriptor)


def run(argv: list[str], into: Measured | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run ``argv``, record it, and give its output; a failure ends the benchmark."""
    start = monotonic()
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=dict(environment or os.environ)
    )
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} exited {process.returncode}")
    if into is not None:
        into.seconds.append(monotonic() - start)
        into.processor.append(usage.ru_utime + usage.ru_stime)
    return output.decode()


def peak(argv: list[str], into: Measured, environment: Mapping[str, str] | None = None) -> None:
    """Run ``argv`` once more, not timed, and record the most memory its processes had together.

    Memory that they share counts once. Programs of others, such as skopeo, do not count.
    """
    process = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=dict(environment or os.environ)
    )
    program = os.readlink(f"/proc/{process.pid}/exe")
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            into.peak_kib = max(into.peak_kib, _tree_kib(process.pid, program))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()


def _tree_kib(pid: int, program: str) -> int:
    total = 0
    pending = [pid]
    while pending:
        entry = Path(f"/proc/{pending.pop()}")
        try:
            if (entry / "exe").readlink() == Path(program):
                rollup = (entry / "smaps_rollup").read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            for task in (entry / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
    return total
