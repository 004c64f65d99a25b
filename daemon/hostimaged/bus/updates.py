"""What is known of updates of the tracked image: the last check, and what it found.

It is kept in a file of the run directory over restarts of the daemon, and gone with the next boot:

    {"version": 1, "boot_id": …, "image": tracked image, "time": …, "error": …, "message": …, "found": {…}}

One check is remembered. Of an image that is not tracked any more nothing is told.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from hostimage_dbus.errors import ErrorName  # noqa: TC001 (pydantic reads annotations)
from hostimage_dbus.names import JobState
from hostimaged.bus.findings import Hyphened
from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.log import get_logger
from hostimaged.oci.links import is_web_page
from hostimaged.oci.reference import MAX_LENGTH

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.bus.findings import Findings
    from hostimaged.jobs.job import Job

#: One reference, one message and a few short texts.
_MAX_FILE: Final = 64 << 10
#: What of the result of a check is told.
_TOLD: Final = {"version", "timestamp", "download_size", "changelog_url"}

_Line = Annotated[str, Field(max_length=MAX_LENGTH, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Digest = Annotated[str, Field(max_length=128, pattern=r"^[a-z0-9:]*$")]
_Size = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]

_logger = get_logger("hostimaged.bus")


class _Found(Hyphened):
    """The part of the result of a check that is used; None where it says nothing."""

    manifest_digest: _Digest | None = None
    source_digest: _Digest | None = None
    version: _Line | None = None
    timestamp: _Size | None = None
    download_size: _Size | None = None
    changelog_url: _Line | None = None

    @property
    def told(self) -> dict[str, Any]:
        """For the property."""
        told = self.model_dump(by_alias=True, exclude_none=True, include=_TOLD)
        if not is_web_page(told.get("changelog-url", "")):
            told.pop("changelog-url", None)
        return told


class _Check(OfBoot):
    """The last check; ``found`` is what the last one that was not in vain found."""

    image: _Line = ""
    time: _Size = 0
    error: ErrorName | Literal[""] = ""
    message: _Line = ""
    found: _Found | None = None


class Updates:
    """Remembers the last check of the tracked image, in the file ``path``."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = BootFile(path, _Check, boot_id, limit=_MAX_FILE)
        self._check = _Check()
        self._writing = asyncio.Lock()

    def load(self) -> None:
        """Read the file; blocks. One of another boot, or a damaged one, counts as missing."""
        try:
            self._check = self._file.load() or self._check
        except (OSError, ValidationError) as error:
            _logger.warning("update.unreadable", error=type(error).__name__)

    async def save(self) -> None:
        """Write the file; without it only a restart forgets the check, so errors are logged."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._file.save, self._file.encode(self._check))
            except OSError as error:
                _logger.warning("update.save-failed", error=error.strerror)

    def job_ended(self, job: Job, tracked: str) -> bool:
        """A job ended; ``tracked`` is the tracked image in its normal form. Tells whether to save."""
        if job.kind != "check" or not tracked or job.target != tracked or job.state is JobState.CANCELLED:
            return False
        known = self._check.found if self._check.image == tracked else None
        failure = job.failure
        try:
            found = known if failure else _Found.model_validate(job.result)
            self._check = _Check(
                image=tracked,
                time=job.finished,
                error=failure.name if failure else "",
                message=failure.message if failure else "",
                found=found,
            )
        except ValidationError as error:
            _logger.warning("update.invalid", errors=error.error_count())
            return False
        return True

    def last_check(self, tracked: str) -> tuple[int, str, str]:
        """When ``tracked`` was last checked, microseconds since the epoch; error name and message."""
        check = self._check
        return (check.time, str(check.error), check.message) if check.image == tracked else (0, "", "")

    def current(self, tracked: str, findings: Findings) -> dict[str, Any]:
        """The update of the tracked image as plain values; empty if none is known."""
        found = self._check.found
        if not tracked or self._check.image != tracked or found is None:
            return {}
        digests = {found.manifest_digest, found.source_digest} - {None}
        deployed = [row for row in findings.deployments if row.image_digest in digests]
        if any(row.booted for row in deployed):
            return {}
        local = any(row.manifest_digest in digests or row.source_digest in digests for row in findings.images)
        state = "staged" if any(row.staged for row in deployed) else "downloaded" if local else "available"
        told = found.told
        if state != "available":
            told["download-size"] = 0
        return {"image": tracked, "digest": found.manifest_digest or "", "state": state} | told
