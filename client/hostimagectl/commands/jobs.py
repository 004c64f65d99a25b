"""``hostimagectl jobs``: what the daemon does and what waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK, ErrorName
from hostimagectl import service
from hostimagectl.failure import Failure
from hostimagectl.output import ABSENT, timestamp
from hostimagectl.progress import figures, percent, title

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from hostimagectl.job import Job
    from hostimagectl.output import Console
    from hostimagectl.service import Service


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """List the jobs that wait or run."""
    del arguments
    async with service.connect() as daemon:
        jobs = await collect(daemon)
    show(jobs, console)
    return EXIT_OK


async def collect(daemon: Service) -> list[Job]:
    """The jobs with their properties; one that ends meanwhile is left out."""
    jobs = []
    for row in await daemon.jobs():
        try:
            jobs.append(await daemon.job(row.path))
        except Failure as failure:
            if failure.name != ErrorName.UNKNOWN_OBJECT:
                raise
    return jobs


def show(jobs: Sequence[Job], console: Console) -> None:
    """Print the jobs."""
    if console.as_json:
        console.json({"jobs": [job.as_dict() for job in jobs]})
    elif console.quiet:
        for job in jobs:
            console.line(str(job.id))
    elif jobs:
        table(jobs, console)
    else:
        console.note("no jobs")


def table(jobs: Sequence[Job], console: Console) -> None:
    """The jobs as a table."""
    console.table(("id", "kind", "state", "target", "since", "progress"), [_cells(job) for job in jobs])


def _cells(job: Job) -> tuple[str, str, str, str, str, str]:
    progress = ", ".join(part for part in (percent(job), figures(job)) if part)
    return (
        str(job.id),
        job.kind,
        title(job),
        job.target or ABSENT,
        timestamp(job.started or job.created),
        progress or ABSENT,
    )
