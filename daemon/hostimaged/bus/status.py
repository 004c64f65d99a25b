"""The status cache: what the last scan found, and the status document made of it.

Reading it does no work: scans are done by workers, and their findings are checked when they come in.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from hostimage_dbus.names import API_VERSION
from hostimage_dbus.transport import Encoded, Variant
from hostimaged.bus.findings import Findings, Problem, take_findings
from hostimaged.jobs.events import SizesEvent, StatusEvent
from hostimaged.jobs.operations import Scan
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hostimaged.bus.sizes import Sizes
    from hostimaged.jobs.events import Event
    from hostimaged.jobs.history import JobRecord
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.operations import Operation
    from hostimaged.jobs.process import Worker

SCHEMA: Final = 1
#: Seconds that callers wait for the scan at start: it takes well under one on a host that is in order, and
#: one that hangs must not keep them for long.
FIRST_SCAN: Final = 5.0
#: Nothing is said of deployments and images before the first scan came back.
STILL_LOOKING: Final = "what is installed on this host is still being looked for"

_logger = get_logger("hostimaged.bus")

_SIGNATURES: Final[dict[type, str]] = {str: "s", bool: "b", int: "t", list: "as"}


def to_variants(values: dict[str, Any]) -> dict[str, Variant]:
    """A dictionary for the bus; strings, booleans, sizes and lists of strings, None left out."""
    return {key: Variant(_SIGNATURES[type(v)], v) for key, v in values.items() if v is not None}


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Findings, and the answers of which they are the large part: images can be thousands."""

    findings: Findings
    image_list: Encoded
    image_documents: str
    bootc_document: Encoded


def _prepare(status: dict[str, Any]) -> _Prepared:
    """Check what a scan found, and make the answers. Takes a while for many images, so not in the loop."""
    findings = take_findings(status)
    rows = [row.model_dump(by_alias=True, exclude_none=True) for row in findings.images]
    return _Prepared(
        findings,
        Encoded.of("aa{sv}", [[to_variants(row) for row in rows]]),
        json.dumps(rows, ensure_ascii=False),
        # As bootc writes it: canonical JSON.
        Encoded.of(
            "s", [json.dumps(findings.bootc, ensure_ascii=False, sort_keys=True, separators=(",", ":"))]
        ),
    )


class StatusCache:
    """Findings of the newest scan; ``changed`` is called when they were replaced. ``sizes`` are loaded."""

    def __init__(
        self, start_worker: Callable[[Operation], Worker], changed: Callable[[], None], sizes: Sizes
    ) -> None:
        self._start_worker = start_worker
        self._changed = changed
        self._sizes = sizes
        self._last_place = 0
        self._taken_place = 0
        self._prepared = _prepare({})
        self._findings = self._prepared.findings
        self._known = asyncio.Event()

    @property
    def is_known(self) -> bool:
        """Whether a scan came back."""
        return self._known.is_set()

    async def known(self, patience: float | None = None) -> bool:
        """Whether the first scan came back; waits for it, ``patience`` or ``FIRST_SCAN`` seconds.

        If it did not, a problem says so: nothing found and nothing known yet would look the same otherwise.
        """
        try:
            async with asyncio.timeout(FIRST_SCAN if patience is None else patience):
                await self._known.wait()
        except TimeoutError:
            if not self.is_known:
                self._tell("warning", STILL_LOOKING)
        return self.is_known

    @property
    def findings(self) -> Findings:
        """What the newest scan found."""
        return self._findings

    @property
    def image_list(self) -> Encoded:
        """The images, as ListImages returns them."""
        return self._prepared.image_list

    @property
    def bootc_document(self) -> Encoded:
        """The host document of bootc, as GetStatus returns it."""
        return self._prepared.bootc_document

    def begin(self) -> int:
        """A scan begins; gives its place in the order of scans."""
        self._last_place += 1
        return self._last_place

    async def take(self, place: int, status: dict[str, Any]) -> None:
        """A scan found ``status``; it is ignored if a later one came in before."""
        try:
            prepared = await asyncio.to_thread(_prepare, status)
        except ValueError as error:
            # From the model, or from what cannot be said on the bus.
            _logger.warning("scan.invalid", error=type(error).__name__)
            self._failed(place, "the state of the repository could not be read")
            return
        self._sizes.take_findings(prepared.findings)
        self._set(place, prepared)

    async def refresh(self) -> None:
        """Scan now, in a worker of its own; never raises."""
        place = self.begin()
        async with asyncio.TaskGroup() as tasks:

            def on_event(event: Event) -> None:
                # At once: measuring, which comes next, may take long.
                if isinstance(event, StatusEvent):
                    tasks.create_task(self.take(place, event.status))
                elif isinstance(event, SizesEvent):
                    tasks.create_task(self._take_sizes(place, event))

            outcome = await self._start_worker(Scan(known=self._sizes.contents)).run(on_event)
        if outcome.failure is not None:
            self._failed(place, f"the state of the repository could not be read: {outcome.failure.message}")

    async def _take_sizes(self, place: int, event: SizesEvent) -> None:
        self._sizes.take(event)
        if self._taken_place:
            # Else they are applied with what the scan found.
            self._set(place, self._prepared)
        await self._sizes.save()

    @property
    def is_measured(self) -> bool:
        """Whether the sizes of deployments are those of now."""
        return self._sizes.contents == self.findings.contents

    def _failed(self, place: int, text: str) -> None:
        """Keep what was known, and say that it may be old."""
        self._set(place, self._with_problem("error", text))

    def _tell(self, severity: Literal["error", "warning"], text: str) -> None:
        """Say something of the scan that has not come back."""
        self._prepared = self._with_problem(severity, text)
        self._findings = self._sizes.applied(self._prepared.findings)
        self._changed()

    def _with_problem(self, severity: Literal["error", "warning"], text: str) -> _Prepared:
        findings = self._prepared.findings
        known = [problem for problem in findings.problems if problem.id != "scan"]
        problems = [*known, Problem(id="scan", severity=severity, text=text)]
        return replace(self._prepared, findings=findings.model_copy(update={"problems": problems}))

    def _set(self, place: int, prepared: _Prepared) -> None:
        if place < self._taken_place:
            return
        self._taken_place = place
        prepared = replace(prepared, findings=self._with_known_sizes(prepared.findings))
        self._prepared = prepared
        self._findings = self._sizes.applied(prepared.findings)
        self._known.set()
        self._changed()

    def _with_known_sizes(self, findings: Findings) -> Findings:
        """With what could be reclaimed when it was last looked at: few scans do, as it takes long."""
        new, old = findings.repository, self.findings.repository
        if new is None or old is None or new.reclaimable is not None:
            return findings
        known = new.model_copy(update={"reclaimable": old.reclaimable})
        return findings.model_copy(update={"repository": known})

    def document(
        self,
        *,
        daemon: dict[str, str],
        tracked_image: str,
        jobs: Iterable[Job],
        results: Iterable[JobRecord],
        problems: Sequence[Problem],
        update: dict[str, Any],
        holds: Sequence[dict[str, Any]],
        unified: bool = False,
    ) -> str:
        """The native status document (``status.schema.json``)."""
        repository, host = self.findings.repository, self.findings.host
        document = json.dumps(
            {
                "schema": SCHEMA,
                "daemon": {**daemon, "apiVersion": API_VERSION},
                "repository": repository.model_dump() if repository else None,
                "trackedImage": tracked_image,
                "unified": unified,
                "host": host.model_dump(by_alias=True) if host else None,
                "rollbackQueued": self.findings.rollback_queued,
                "deployments": [row.model_dump(by_alias=True) for row in self.findings.deployments],
                "update": update or None,
                "holds": list(holds),
                "jobs": [job_document(job) for job in jobs],
                "results": [result_document(record) for record in results],
                "problems": [problem.model_dump() for problem in problems],
            },
            ensure_ascii=False,
        )
        return f'{document[:-1]}, "images": {self._prepared.image_documents}}}'


def job_document(job: Job) -> dict[str, Any]:
    """A job that waits or runs."""
    progress = job.progress
    return {
        "id": job.id,
        "kind": job.kind,
        "state": str(job.state),
        "target": job.target,
        "background": job.terms.background,
        "holdReasons": list(job.hold_reasons),
        "phase": str(job.phase or ""),
        "progress": progress.fraction if progress.fraction >= 0 else None,
        "bytesDone": progress.done,
        "bytesTotal": progress.total,
        "bytesCached": progress.cached,
        "created": job.created,
        "started": job.started,
    }


def result_document(record: JobRecord) -> dict[str, Any]:
    """A job that ended."""
    return {
        "id": record.id,
        "kind": record.kind,
        "state": str(record.state),
        "target": record.target,
        "created": record.created,
        "started": record.started,
        "finished": record.finished,
        "error": {"name": record.error, "message": record.message} if record.error else None,
    }
