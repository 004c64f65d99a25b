"""How much of the daemon one user may occupy."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hostimaged.errors import LimitsExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator


class Slots:
    """Places that users hold while something of theirs is under way.

    Each user gets ``per_uid`` places, all together ``total``; root is not counted per user and has
    ``reserve`` places more, so that no number of users keeps root out. ``what`` names the things for people,
    for example "authorisations".
    """

    def __init__(self, what: str, *, per_uid: int, total: int, reserve: int = 0) -> None:
        self._what = what
        self._per_uid = per_uid
        self._total = total
        self._reserve = reserve
        self._taken: Counter[int] = Counter()

    @property
    def taken(self) -> int:
        """How many places are held."""
        return self._taken.total()

    def take(self, uid: int) -> None:
        """Take a place for ``uid``, to be given back by ``free``; raises ``LimitsExceeded``."""
        if uid != 0 and self._taken[uid] >= self._per_uid:
            raise LimitsExceeded(
                f"too many {self._what} of this user are waiting (the limit is {self._per_uid})"
            )
        if self.taken >= self._total + (self._reserve if uid == 0 else 0):
            raise LimitsExceeded(f"too many {self._what} are waiting")
        self._taken[uid] += 1

    def free(self, uid: int) -> None:
        """Give back a place of ``uid``."""
        self._taken[uid] -= 1
        if not self._taken[uid]:
            # Uids are chosen by who calls; a counter that only grows would be theirs to fill.
            del self._taken[uid]

    @contextmanager
    def held(self, uid: int) -> Iterator[None]:
        """Hold a place for ``uid``; raises ``LimitsExceeded``."""
        self.take(uid)
        try:
            yield
        finally:
            self.free(uid)
