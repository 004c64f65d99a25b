"""Who has the repository alone: one job at a time, when no reader of ours holds its lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.errors import Internal
from hostimaged.jobs.kinds import KINDS, Access
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.jobs.job import Job
    from hostimaged.jobs.lanes import Lanes
    from hostimaged.jobs.process import Worker

_logger = get_logger("hostimaged.jobs")


class Turns:
    """Has the readers among ``lanes`` pause while a job needs the repository alone.

    ``workers`` are those of the running jobs, by job id. ``settle`` is to be called after every change of
    what runs. Stopping background readers is the queue's business (``Lanes.in_the_way``).
    """

    def __init__(self, lanes: Lanes, workers: Mapping[int, Worker]) -> None:
        self._lanes = lanes
        self._workers = workers
        self._asking: Job | None = None
        self._granted = False
        self._told: set[int] = set()
        self._paused: set[int] = set()

    def ask(self, job: Job, *, wanted: bool) -> None:
        """The job asks for the repository alone, or gives it back; ``Internal`` for a kind that may not."""
        if wanted and (KINDS[job.kind].access is not Access.ALONE or self._asking is not None):
            raise Internal
        if wanted:
            _logger.info("alone.ask", id=job.id)
            self._asking = job
            self._lanes.alone = True
        else:
            self._release(job)

    def paused(self, job: Job, *, paused: bool) -> None:
        """A reader holds no lock any more, or goes on."""
        if paused and job.id in self._told:
            self._paused.add(job.id)
        else:
            self._paused.discard(job.id)
        self.settle()

    def ended(self, job: Job) -> None:
        """The worker of the job is gone."""
        self._told.discard(job.id)
        self._paused.discard(job.id)
        self._release(job)
        self.settle()

    def settle(self) -> None:
        """Ask readers to pause that do not know it yet; grant what was asked for when all have."""
        if self._asking is None:
            return
        readers = [job.id for job in self._lanes.readers if job.id in self._workers]
        for number in readers:
            if number not in self._told:
                self._told.add(number)
                self._workers[number].pause()
        if not self._granted and self._paused.issuperset(readers):
            self._granted = True
            _logger.info("alone.grant", id=self._asking.id)
            self._workers[self._asking.id].grant()

    def _release(self, job: Job) -> None:
        if self._asking is not job:
            return
        _logger.info("alone.end", id=job.id)
        self._asking, self._granted, self._lanes.alone = None, False, False
        for number in self._told:
            self._workers[number].resume()
        self._told.clear()
        self._paused.clear()
