"""Operations as a worker does them, without worker and daemon, interrupted by what a test does at a step."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hostimaged.jobs.channel import Channel
from hostimaged.jobs.events import Event
from hostimaged.jobs.operations import Operation
from hostimaged.jobs.worker import perform
from hostimaged.system.paths import HostPaths


class Steps(Channel):
    """Calls ``hook`` with number and name of each point that the work comes to, from whatever thread."""

    def __init__(self, hook: Callable[[int, str], object]) -> None:
        self._ours, theirs = socket.socketpair()
        theirs.close()
        super().__init__(self._ours)
        self._hook = hook
        self.points: list[str] = []
        self.messages: list[str] = []

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        self.points.append(point)
        self._hook(len(self.points) - 1, point)

    def message(self, text: str) -> None:
        """See ``Reporter``."""
        self.messages.append(text)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """There is nobody else."""
        yield

    def advance(self, count: int) -> None:
        """Ignore."""

    def _send(self, event: Event) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Close the socket."""
        self._input.close()
        self._ours.close()


def do(paths: HostPaths, operation: Operation, channel: Channel) -> dict[str, Any] | None:
    """Do an operation with all that comes before and after it in a worker; raises what that raises."""
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    return perform(paths, operation, channel)
