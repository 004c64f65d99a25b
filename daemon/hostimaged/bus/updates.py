"""What is known of updates of the tracked image: the last check, and what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hostimage_dbus.names import JobState

if TYPE_CHECKING:
    from hostimaged.bus.findings import Findings
    from hostimaged.jobs.job import Job

#: What of the result of a check is told.
_TOLD = ("version", "timestamp", "download-size", "changelog-url")


class Updates:
    """Remembers checks of the tracked image since the start of the daemon."""

    def __init__(self) -> None:
        #: When the last check ended in microseconds since the epoch, and its error name and message.
        self.last_check: tuple[int, str, str] = (0, "", "")
        self._found: dict[str, Any] = {}

    def job_ended(self, job: Job, tracked: str) -> None:
        """A job ended; ``tracked`` is the tracked image in its normal form."""
        if job.kind != "check" or not tracked or job.target != tracked or job.state is JobState.CANCELLED:
            return
        failure = job.failure
        self.last_check = (
            job.finished,
            str(failure.name) if failure else "",
            failure.message if failure else "",
        )
        if failure is None:
            self._found = job.result

    def current(self, tracked: str, findings: Findings) -> dict[str, Any]:
        """The update of the tracked image as plain values; empty if none is known."""
        found = self._found
        if not found or found.get("reference") != tracked:
            return {}
        digests = {found.get("manifest-digest"), found.get("source-digest")}
        deployed = [row for row in findings.deployments if row.image_digest in digests]
        if any(row.booted for row in deployed):
            return {}
        local = any(row.manifest_digest in digests or row.source_digest in digests for row in findings.images)
        state = "staged" if any(row.staged for row in deployed) else "downloaded" if local else "available"
        told = {key: found[key] for key in _TOLD if key in found}
        if state != "available":
            told["download-size"] = 0
        return {"image": tracked, "digest": found.get("manifest-digest", ""), "state": state} | told
