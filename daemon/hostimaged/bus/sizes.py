"""How much space is taken, as it was last measured.

Measuring takes longer than a scan, so it comes after it, and only if what was measured before does not hold
any more. It is kept in a file of the run directory over restarts of the daemon, and gone with the next boot:

    {"version": 1, "boot_id": …, "contents": …, "used": bytes, "exclusive": {deployment: bytes}}
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, ValidationError

from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.bus.findings import Findings
    from hostimaged.jobs.events import SizesEvent

#: A deployment has 150 bytes.
_MAX_FILE: Final = 256 << 10

_logger = get_logger("hostimaged.bus")


class _Measured(OfBoot):
    """The last measurement."""

    contents: str = ""
    used: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    exclusive: dict[str, Annotated[int, Field(ge=0, lt=1 << 53)]] = Field(default_factory=dict)


class Sizes:
    """Remembers the last measurement, in the file ``path``."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = BootFile(path, _Measured, boot_id, limit=_MAX_FILE)
        self._measured = _Measured()
        self._writing = asyncio.Lock()

    def load(self) -> None:
        """Read the file; blocks. One of another boot, or a damaged one, counts as missing."""
        try:
            self._measured = self._file.load() or self._measured
        except (OSError, ValidationError) as error:
            _logger.warning("sizes.unreadable", error=type(error).__name__)

    @property
    def contents(self) -> str:
        """What the sizes of deployments were measured for."""
        return self._measured.contents

    def take(self, event: SizesEvent) -> None:
        """Something was measured; of contents that were known only how much all takes."""
        exclusive = event.exclusive
        if event.contents and event.contents == self._measured.contents and not exclusive:
            exclusive = self._measured.exclusive
        self._measured = _Measured(contents=event.contents, used=event.used, exclusive=exclusive)

    def take_findings(self, findings: Findings) -> None:
        """A scan looked how much all takes, if it did."""
        if findings.repository is not None and findings.repository.used is not None:
            self._measured = self._measured.model_copy(update={"used": findings.repository.used})

    async def save(self) -> None:
        """Write the file; without it a restart measures again, so errors are logged."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._file.save, self._file.encode(self._measured))
            except OSError as error:
                _logger.warning("sizes.save-failed", error=error.strerror)

    def applied(self, findings: Findings) -> Findings:
        """The findings with sizes as far as they are known; 0 where they are not, or hold no more."""
        changes: dict[str, object] = {}
        if findings.repository is not None:
            changes["repository"] = findings.repository.model_copy(update={"used": self._measured.used})
        if findings.contents and findings.contents == self._measured.contents:
            known = self._measured.exclusive
            changes["deployments"] = [
                row.model_copy(update={"size_exclusive": known.get(row.id, 0)})
                for row in findings.deployments
            ]
        return findings.model_copy(update=changes)
