"""How work tells what it is doing: events, cancellation and named fault points in one Protocol.

The code that does the work calls a ``Reporter``; the worker process sends the calls to the daemon, tests
record them or raise at a named point, offline tools ignore them. No code here does any I/O.
"""

from __future__ import annotations

from typing import Protocol

from hostimage_dbus.names import Phase

__all__ = ["Phase", "Reporter", "Silent"]


class Reporter(Protocol):
    """Receives what a job does. Every method may be called from any thread of the job."""

    def phase(self, phase: Phase) -> None:
        """The job enters ``phase``."""

    def totals(self, total: int, cached: int) -> None:
        """``total`` bytes of config and layers are named by the manifest, ``cached`` of them are stored.

        Called once, before the first ``advance``.
        """

    def advance(self, count: int) -> None:
        """``count`` more (compressed) bytes were read from the source, since the last call."""

    def importing(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes that were fetched into containers-storage are in the repository too.

        Called before the first ``totals`` where that is still to come.
        """

    def generating(self, done: int, total: int) -> None:
        """``done`` of ``total`` EROFS images are made."""

    def message(self, text: str) -> None:
        """One line for people."""

    def at(self, point: str) -> None:
        """The work stands at the named step ``point``, between two of its effects.

        Raises ``Cancelled`` if the job is to stop. Tests hook it to kill or fail at each step. Also called in
        loops over bulk data, so an implementation must be cheap.
        """


class Silent:
    """A ``Reporter`` that ignores everything."""

    def phase(self, phase: Phase) -> None:
        """Ignore."""

    def totals(self, total: int, cached: int) -> None:
        """Ignore."""

    def advance(self, count: int) -> None:
        """Ignore."""

    def importing(self, done: int, total: int) -> None:
        """Ignore."""

    def generating(self, done: int, total: int) -> None:
        """Ignore."""

    def message(self, text: str) -> None:
        """Ignore."""

    def at(self, point: str) -> None:
        """Ignore."""
