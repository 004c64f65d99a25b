"""The shared lock of the repository, held by a job that reads for a long time: in slices, with pauses.

Between two slices anybody may remove what is not referenced any more, so what was listed before may be gone.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hostimaged.composefs.repository import Repository
    from hostimaged.jobs.channel import Channel

#: Seconds after which the lock is given up for a moment, wherever the reader is.
SLICE: Final = 1.0
#: Seconds between two slices: whoever waits for the lock tries again within a tenth of a second.
GAP: Final = 0.15

_Taken = TypeVar("_Taken")


class _Interrupted(Exception):
    """The lock is not to be waited for any longer now."""


class Slices:
    """Gives up the lock that ``repository`` was opened with when it is time to; a ``fsck.Breaks``.

    ``lock_timeout``: seconds to wait for the lock after a break, not counted while the job pauses.
    """

    def __init__(
        self,
        repository: Repository,
        channel: Channel,
        *,
        lock_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository = repository
        self._channel = channel
        self._lock_timeout = lock_timeout
        self._clock = clock
        self._began = clock()

    def due(self) -> bool:
        """Whether ``take`` should be called now. Raises ``Cancelled`` if the job is to stop."""
        self._channel.check()
        return self._channel.pausing or self._clock() - self._began >= SLICE

    def take(self) -> None:
        """Give the lock up, until the job may go on; nothing is read meanwhile.

        Raises ``Cancelled`` and ``LockTimeout``; then there is no lock, and the repository is to be closed.
        """
        self._repository.unlock()
        if not self._channel.pausing:
            time.sleep(GAP)
        _unless_pausing(
            self._channel, partial(self._repository.relock, exclusive=False, lock_timeout=self._lock_timeout)
        )
        self._began = self._clock()


@contextmanager
def reading(
    path: Path, channel: Channel, *, lock_timeout: float, insecure: bool = False
) -> Iterator[tuple[Repository, Slices]]:
    """The repository at ``path`` with its shared lock, and what gives that up now and then.

    As after a break, ``lock_timeout`` does not count while the job pauses. Raises as ``Repository.open``
    does, and ``Cancelled``.
    """
    from hostimaged.composefs.repository import Repository

    opened = _unless_pausing(
        channel, partial(Repository.open, path, lock_timeout=lock_timeout, insecure=insecure)
    )
    with opened as repository:
        yield repository, Slices(repository, channel, lock_timeout=lock_timeout)


def _unless_pausing(channel: Channel, take: Callable[..., _Taken]) -> _Taken:
    """What ``take``, which waits for the lock, gives; it is given up as long as the job is to pause."""

    def check() -> None:
        channel.check()
        if channel.pausing:
            raise _Interrupted

    while True:
        channel.rest()
        with suppress(_Interrupted):
            return take(check=check)
