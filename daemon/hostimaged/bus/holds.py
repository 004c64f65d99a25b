"""Holds: why background jobs do not start: conditions of the host, and a hold set by hand.

The latter is kept in a file of the run directory over restarts of the daemon, and gone with the next boot:

    {"version": 1, "boot_id": …, "until": microseconds since the epoch, "reason": …}
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, ValidationError

from hostimaged.errors import InvalidArgs
from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.jobs.job import now_usec
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MAX_FILE: Final = 64 << 10
#: The clock may be set and the machine may sleep, so the end is looked for this often, in seconds.
_CHECK_INTERVAL: Final = 30.0

#: The conditions, in the order in which they are told, and what people are told.
_REASONS: Final = {
    "metered": "the network connection is metered",
    "battery": "the host runs on battery",
}

_logger = get_logger("hostimaged.bus")


class _Hold(OfBoot):
    until: int = Field(default=0, ge=0, lt=1 << 64)
    reason: str = Field(default="", max_length=4096)


class Holds:
    """The holds on background jobs; ``changed`` is called when one begins or ends."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = BootFile(path, _Hold, boot_id, limit=_MAX_FILE)
        self._hold = _Hold()
        self._held = False
        self._conditions: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writing = asyncio.Lock()
        self.changed: Callable[[], None] = lambda: None

    def load(self) -> None:
        """Read the file; blocks. One of another boot, or a damaged one, counts as missing."""
        try:
            hold = self._file.load()
        except (OSError, ValidationError) as error:
            _logger.warning("hold.unreadable", error=type(error).__name__)
            return
        if hold is not None:
            self._hold = hold
            self._held = hold.until > now_usec()

    @property
    def reasons(self) -> list[str]:
        """Kinds of the holds that are in force."""
        return [*self._conditions, *(["manual"] if self._held else [])]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The holds for the status document."""
        documents: list[dict[str, Any]] = [
            {"kind": kind, "until": 0, "reason": _REASONS[kind]} for kind in self._conditions
        ]
        if self._held:
            documents.append({"kind": "manual", "until": self._hold.until, "reason": self._hold.reason})
        return documents

    def set_condition(self, kind: str, holds: bool) -> None:
        """A condition of the host begins or ends: "metered" or "battery"."""
        kept = {*self._conditions, kind} if holds else {*self._conditions} - {kind}
        self._conditions = [known for known in _REASONS if known in kept]
        self.changed()

    def start(self) -> None:
        """Let a hold that was loaded end in time."""
        self._watch()

    def close(self) -> None:
        """Forget what was to happen later."""
        if self._timer is not None:
            self._timer.cancel()

    async def set(self, until: int, reason: str) -> None:
        """Hold until ``until`` (microseconds since the epoch), or release for 0.

        Raises ``InvalidArgs`` for a time that is over.
        """
        if until and until <= now_usec():
            raise InvalidArgs("the end of the hold is in the past")
        async with self._writing:
            hold = _Hold(until=until, reason=reason if until else "")
            try:
                await asyncio.to_thread(self._file.save, self._file.encode(hold))
            except OSError as error:
                # It holds all the same, as long as this daemon runs.
                _logger.warning("hold.save-failed", error=error.strerror)
            self._hold = hold
        _logger.info("hold.set", until=until)
        self._watch()
        self.changed()

    def _watch(self) -> None:
        self.close()
        remaining = (self._hold.until - now_usec()) / 1e6
        was, self._held = self._held, remaining > 0
        if self._held:
            self._timer = asyncio.get_running_loop().call_later(
                min(remaining, _CHECK_INTERVAL) + 0.001, self._watch
            )
        elif was:
            self.changed()
