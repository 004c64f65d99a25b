"""Operations on recorded hosts, without a daemon: sessions, and reporters that stop them at a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import RecordedHost
from hostimaged.errors import Cancelled
from hostimaged.host.session import Session, open_session
from hostimaged.progress import Reporter, Silent
from hostimaged.system.paths import HostPaths


@contextmanager
def session(host: RecordedHost, reporter: Reporter | None = None) -> Iterator[Session]:
    """A session on ``host``."""
    with open_session(HostPaths.scratch(host.root), reporter or Silent()) as opened:
        yield opened


class At(Silent):
    """Raises ``error`` at the step ``number``, counted from 0; remembers the steps.

    ``Crash`` is a process that is gone: it cleans nothing up. Who is told to stop is told at every step.
    """

    def __init__(self, number: int, error: type[BaseException] = Crash) -> None:
        self._number = number
        self._error = error
        self.points: list[str] = []

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        self.points.append(point)
        reached = len(self.points) - 1
        if reached == self._number or (self._error is Cancelled and 0 <= self._number < reached):
            raise self._error
