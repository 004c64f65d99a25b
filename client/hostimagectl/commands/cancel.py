"""``hostimagectl cancel``: stop a job and say what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK, ErrorName
from hostimage_dbus.names import job_path
from hostimagectl import service
from hostimagectl.failure import Failure
from hostimagectl.follow import Follower
from hostimagectl.output import printable
from hostimagectl.progress import Notes

if TYPE_CHECKING:
    import argparse

    from hostimagectl.job import Job
    from hostimagectl.output import Console
    from hostimagectl.service import Service


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Cancel the job and wait for its end."""
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        return await cancel(daemon, arguments.id, console, wait=arguments.wait)


async def cancel(daemon: Service, number: int, console: Console, *, wait: bool) -> int:
    """Cancel over an open connection; gives the exit code."""
    path = job_path(number)
    if not wait:
        await daemon.cancel(path)
        if console.as_json:
            console.json({"job": None, "error": None})
        elif not console.quiet:
            console.line(f"job {number} is being cancelled")
        return EXIT_OK

    async def request() -> str:
        await daemon.cancel(path)
        return path

    return report(await Follower(daemon, Notes(console)).run(request), console)


def report(job: Job, console: Console) -> int:
    """Say how the job ended; success is that it no longer does anything and did not finish its work."""
    failure = None
    if job.succeeded:
        failure = Failure.of_error(
            ErrorName.JOB_NOT_CANCELLABLE, f"job {job.id} finished before it could be cancelled"
        )
    if console.as_json:
        console.json({"job": job.as_dict(), "error": None if failure is None else failure.as_dict()})
    if failure is not None:
        console.error(failure.message, failure.hint)
        return failure.code
    if not console.as_json and not console.quiet:
        console.line(f"job {job.id} {'was cancelled' if job.cancelled else 'failed' + _reason(job)}")
    return EXIT_OK


def _reason(job: Job) -> str:
    return f": {printable(job.error.message)}" if job.error is not None else ""
