"""What is remembered of jobs over restarts of the daemon: ``jobs.json`` in the run directory.

    {"version": 1, "boot_id": …, "next_id": N, "active": [record…], "results": [record…], "untold": [id…]}

``active`` are jobs that wait or run, ``results`` the last ones that ended, the newest last, and ``untold``
those of them whose end was not announced yet: it is written down first, so that no crash loses it. The file
belongs to one boot: ids start again with the next one. Everything here that touches the file blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.errors import Internal
from hostimaged.jobs.boot_file import BootFile, OfBoot
from hostimaged.jobs.job import Failure, now_usec

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.jobs.job import Job

KEPT_RESULTS: Final = 20
#: 20 results and a few dozen waiting jobs, each with a message and a reference of a few KiB at most.
_MAX_FILE: Final = 2 << 20
_INTERRUPTED: Final = "the daemon ended while the job was not done"

_Usec = Annotated[int, Field(ge=0, lt=1 << 63)]


class JobRecord(BaseModel):
    """A job as it is written to the file and to the status document."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: int = Field(ge=1, lt=1 << 63)
    kind: str
    target: str
    uid: int
    unit: str = Field(default="", max_length=255)
    client_id: str = Field(default="", max_length=1024)
    state: JobState
    error: str = ""
    message: str = ""
    created: _Usec
    started: _Usec = 0
    finished: _Usec = 0

    @classmethod
    def of(cls, job: Job) -> JobRecord:
        """The record of ``job`` as it is now."""
        return cls(
            id=job.id,
            kind=job.kind,
            target=job.target,
            uid=job.initiator.uid,
            unit=job.initiator.unit,
            client_id=job.initiator.client_id,
            state=job.state,
            error=str(job.failure.name) if job.failure else "",
            message=job.failure.message if job.failure else job.message,
            created=job.created,
            started=job.started,
            finished=job.finished,
        )

    def interrupted(self) -> JobRecord:
        """This job, failed because the daemon ended."""
        return self.model_copy(
            update={
                "state": JobState.FAILED,
                "error": str(ErrorName.INTERNAL),
                "message": _INTERRUPTED,
                "finished": now_usec(),
            }
        )

    @property
    def failure(self) -> Failure | None:
        """Why it failed."""
        try:
            return Failure(ErrorName(self.error), self.message) if self.error else None
        except ValueError:
            return Failure(ErrorName.INTERNAL, self.message)


class _File(OfBoot):
    next_id: int = Field(default=1, ge=1, lt=1 << 62)
    active: list[JobRecord] = Field(default_factory=list, max_length=1000)
    results: list[JobRecord] = Field(default_factory=list, max_length=1000)
    untold: list[int] = Field(default_factory=list, max_length=1000)


class History:
    """The content of the file in memory.

    ``orphans`` are jobs of an earlier daemon whose end is still to be announced: those that ended and it
    could not say so any more, and those that failed with it.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = BootFile(path, _File, boot_id, limit=_MAX_FILE, mode=0o600)
        self._next_id = 1
        self.results: list[JobRecord] = []
        self.orphans: list[JobRecord] = []
        self.problem = ""
        self._untold: set[int] = set()

    def load(self) -> None:
        """Read the file; one of another boot counts as missing, a damaged one is told in ``problem``."""
        try:
            content = self._file.load()
        except (OSError, ValidationError) as error:
            self.problem = (
                f"{self._file.path.name} cannot be read ({type(error).__name__}): job ids start again"
            )
            return
        if content is None:
            return
        self._next_id = content.next_id
        interrupted = [record.interrupted() for record in content.active]
        for record in (*content.results, *interrupted):
            self._remember(record)
        self.orphans = [r for r in content.results if r.id in content.untold] + interrupted

    def allot(self) -> int:
        """A new job id. It is used only after a ``save`` of what ``snapshot`` gave afterwards."""
        number, self._next_id = self._next_id, self._next_id + 1
        return number

    def add_result(self, job: Job) -> None:
        """Remember how ``job`` ended, and that nobody was told, until ``told``."""
        if not job.state.finished:
            raise Internal
        self._remember(JobRecord.of(job))
        self._untold.add(job.id)

    def told(self, job: Job) -> None:
        """The end of ``job`` was announced."""
        self._untold.discard(job.id)

    def snapshot(self, active: list[Job]) -> bytes:
        """The file's content with ``active`` as the jobs that wait or run."""
        content = _File(
            next_id=self._next_id,
            active=[JobRecord.of(job) for job in active],
            results=self.results,
            untold=[record.id for record in self.results if record.id in self._untold],
        )
        return self._file.encode(content)

    def save(self, content: bytes) -> None:
        """Replace the file. May run in any thread. Raises ``OSError``."""
        self._file.save(content)

    def _remember(self, record: JobRecord) -> None:
        self.results = [*self.results, record][-KEPT_RESULTS:]
