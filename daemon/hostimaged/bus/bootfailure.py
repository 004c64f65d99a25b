"""What was wrong with this boot, as ``hostimaged boot-check`` (``host.bootcheck``) wrote it down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, ValidationError

from hostimage_dbus.errors import ErrorName
from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

_MAX_FILE: Final = 4096

_logger = get_logger("hostimaged.bus")


class BootFailure(OfBoot):
    """The deployment that should run, and what happened; ``time`` is in seconds since the epoch."""

    deployment: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    message: Annotated[str, Field(max_length=2048, pattern=r"^[^\x00]+$")]
    time: int = Field(default=0, ge=0, lt=1 << 40)

    @property
    def failure(self) -> dict[str, Any]:
        """As the property LastFailure has it: no job failed, but what jobs had prepared."""
        return {
            "job": 0,
            "kind": "boot",
            "target": self.deployment,
            "error": str(ErrorName.BOOT_LOADER),
            "message": self.message,
            "time": self.time * 1_000_000,
        }


def read_boot_failure(path: Path, boot_id: str) -> BootFailure | None:
    """What is written down of the boot ``boot_id``; blocks. A damaged file counts as missing."""
    try:
        return BootFile(path, BootFailure, boot_id, limit=_MAX_FILE).load()
    except (OSError, ValidationError) as error:
        _logger.warning("boot-failure.unreadable", error=type(error).__name__)
        return None
