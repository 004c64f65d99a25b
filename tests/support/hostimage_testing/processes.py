"""What other processes are given, and what /proc says about them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


def python_environment() -> dict[str, str]:
    """The environment of a Python that finds what this one finds, the helpers of the tests included."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


@dataclass(frozen=True)
class Process:
    """The process ``pid``; what is asked of one that is gone raises ``OSError``."""

    pid: int

    @property
    def _directory(self) -> Path:
        return Path("/proc") / str(self.pid)

    def status(self) -> dict[str, str]:
        """The fields of ``/proc/PID/status``."""
        lines = (self._directory / "status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def _stat(self) -> list[str]:
        """The fields of ``/proc/PID/stat`` after the name, which may hold anything: state, parent, group…"""
        return (self._directory / "stat").read_text().rpartition(")")[2].split()

    @property
    def name(self) -> str:
        """The name of its program."""
        return (self._directory / "comm").read_text().strip()

    @property
    def command(self) -> str:
        """Its command line."""
        return (self._directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    @property
    def state(self) -> str:
        """One letter; Z is dead and not yet reaped."""
        return self._stat()[0]

    @property
    def parent(self) -> int:
        """Its parent's id."""
        return int(self._stat()[1])

    @property
    def session(self) -> int:
        """Its session's id."""
        return int(self._stat()[3])

    @property
    def nice(self) -> int:
        """Its nice value."""
        return int(self._stat()[16])


def processes() -> list[Process]:
    """All there are."""
    return [Process(int(name)) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(pid: int) -> list[Process]:
    """Children of ``pid``, their children and so on; without those that only wait to be reaped."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        try:
            if process.state != "Z":
                children.setdefault(process.parent, []).append(process)
        except OSError:
            continue
    found, pending = [], [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child.pid)
    return found


def members(sessions: set[int]) -> list[Process]:
    """Processes of these sessions."""
    found = []
    for process in processes():
        try:
            if process.session in sessions and process.state != "Z":
                found.append(process)
        except OSError:
            continue
    return found
