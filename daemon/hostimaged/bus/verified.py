"""What the last verification or repair left damaged: a problem of the host until the next one.

It is kept in a file of the run directory over restarts of the daemon, and gone with the next boot:

    {"version": 1, "boot_id": …, "time": …, "damaged": how many, "breaks": [deployments and images]}
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, ValidationError

from hostimage_dbus.names import JobState
from hostimaged.bus.findings import Problem
from hostimaged.errors import printable
from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.jobs.job import Job

#: A few hundred names of images at most.
_MAX_FILE: Final = 1 << 20
#: Names of what is broken that are told.
_TOLD: Final = 8
_SHORT: Final = 12

_logger = get_logger("hostimaged.bus")


class _Outcome(OfBoot):
    """Of the last job that looked at everything."""

    time: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    damaged: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    breaks: list[str] = Field(default_factory=list, max_length=1000)


class Verified:
    """Remembers how the last verification ended, in the file ``path``."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = BootFile(path, _Outcome, boot_id, limit=_MAX_FILE)
        self._outcome = _Outcome()
        self._writing = asyncio.Lock()

    def load(self) -> None:
        """Read the file; blocks. One of another boot, or a damaged one, counts as missing."""
        try:
            self._outcome = self._file.load() or self._outcome
        except (OSError, ValidationError) as error:
            _logger.warning("verification.unreadable", error=type(error).__name__)

    async def save(self) -> None:
        """Write the file; without it only a restart forgets the outcome, so errors are logged."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._file.save, self._file.encode(self._outcome))
            except OSError as error:
                _logger.warning("verification.save-failed", error=error.strerror)

    def job_ended(self, job: Job) -> bool:
        """A job ended; tells whether to save."""
        result = job.result
        if job.state is not JobState.DONE or result.get("dry-run") is True:
            return False
        if job.kind == "verify":
            damaged = 0 if result.get("ok") is True else _count(result, "damaged")
        elif job.kind == "repair":
            damaged = 0 if result.get("ok") is True else max(_count(result, "damaged-still"), 1)
        else:
            return False
        breaks = [f"deployment {name[:_SHORT]}" for name in _names(result, "broken-deployments")]
        breaks += [f"image {name}" for name in _names(result, "broken-images")]
        self._outcome = _Outcome(time=job.finished, damaged=damaged, breaks=breaks[: _TOLD + 1])
        return True

    @property
    def problems(self) -> list[Problem]:
        """One problem if anything is damaged."""
        outcome = self._outcome
        if not outcome.damaged:
            return []
        text = f"the repository is damaged in {outcome.damaged} places"
        if outcome.breaks:
            told = outcome.breaks[:_TOLD] + (["and more"] if len(outcome.breaks) > _TOLD else [])
            text += f", which breaks {', '.join(told)}"
        return [Problem(id="damage", severity="error" if outcome.breaks else "warning", text=text)]


def _count(result: dict[str, Any], key: str) -> int:
    value = result.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _names(result: dict[str, Any], key: str) -> list[str]:
    value = result.get(key)
    return [printable(name) for name in value if isinstance(name, str)] if isinstance(value, list) else []
