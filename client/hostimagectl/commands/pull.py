"""``hostimagectl pull``: have an image pulled and watch it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_OK, ErrorName
from hostimagectl import progress, service
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.follow import Follower
from hostimagectl.job import job_id
from hostimagectl.output import PROGRAM, printable, size, text_of

if TYPE_CHECKING:
    import argparse

    from hostimagectl.job import Job
    from hostimagectl.output import Console
    from hostimagectl.service import Service

#: Transports that name a file or directory; a colon ends the path (containers-transports(5)).
_PATH_TRANSPORTS: Final = frozenset({"oci", "oci-archive", "dir", "docker-archive"})


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Pull; the result on standard output, everything else on standard error."""
    image = absolute(arguments.image)
    async with service.connect() as daemon:
        return await pull(daemon, image, arguments, console)


async def pull(daemon: Service, image: str, arguments: argparse.Namespace, console: Console) -> int:
    """Pull over an open connection; gives the exit code."""
    display = progress.create(console)
    follower = Follower(daemon, display)
    try:
        job = await follower.run(
            lambda: daemon.pull(image, expect_digest=arguments.expect_digest, queue=not arguments.no_queue)
        )
    except Interrupted as interrupted:
        display.close()
        console.note(_farewell(follower.path))
        return interrupted.code
    finally:
        display.close()
    return report(job, console, cancel_requested=follower.cancel_requested)


def report(job: Job, console: Console, *, cancel_requested: bool) -> int:
    """Say how ``job`` ended; gives the exit code."""
    failure = failure_of(job)
    if console.as_json:
        console.json(
            {
                "job": job.as_dict(),
                "result": dict(job.result) if failure is None else None,
                "error": None if failure is None else failure.as_dict(),
            }
        )
    if failure is not None:
        console.error(failure.message, failure.hint)
        return failure.code
    if cancel_requested:
        console.note("it finished before it could be cancelled")
    if not console.as_json:
        _print_result(job, console)
    return EXIT_OK


def failure_of(job: Job) -> Failure | None:
    """Why the ended ``job`` did not succeed, None if it did."""
    if job.succeeded:
        return None
    if job.cancelled:
        return Failure.of_error(ErrorName.CANCELLED, f"job {job.id} was cancelled")
    if job.error is None:
        return Failure.of_error(ErrorName.INTERNAL, f"job {job.id} ended as {job.state or 'unknown'}")
    return Failure.of_error(job.error.name, job.error.message)


def absolute(image: str) -> str:
    """``image`` with a relative path made absolute: the daemon works in another directory than the user.

    Anything that is not ``transport:path`` of a transport that takes paths is left for the daemon to judge.
    Raises ``Failure`` where the absolute path cannot be written in the transport's syntax.
    """
    transport, _, name = image.partition(":")
    path, colon, inner = name.partition(":")
    if transport not in _PATH_TRANSPORTS or not path or os.path.isabs(path):
        return image
    try:
        directory = os.getcwd()
    except OSError:
        raise Failure.usage("the current directory is gone, so a relative path means nothing") from None
    if ":" in directory:
        raise Failure.usage(
            f"{transport}: cannot name a path with a colon, and the current directory's has one",
            hint="call it from another directory, with a path that has none",
        )
    # Without "..", which the daemon refuses.
    return f"{transport}:{os.path.normpath(os.path.join(directory, path))}{colon}{inner}"


def _print_result(job: Job, console: Console) -> None:
    result = job.result
    digest = text_of(result.get("manifest-digest"))
    if console.quiet:
        console.line(digest)
        return
    console.line(_summary(job))
    rows = [("Manifest", digest)]
    source = text_of(result.get("source-digest"))
    if source != digest:
        rows.append(("Source digest", source))
    rows += [("Version", text_of(result.get("version"))), ("Tag", text_of(result.get("tag")))]
    console.fields([(label, value) for label, value in rows if value], indent="  ")


def _summary(job: Job) -> str:
    name = printable(job.target)
    if job.result.get("changed") is False:
        return f"nothing to do, already there: {name}"
    if not job.bytes_total:
        return f"pulled {name}"
    cached = f", {size(job.bytes_cached)} were there already" if job.bytes_cached else ""
    return f"pulled {name}: {size(job.bytes_done)} transferred{cached}"


def _farewell(path: str | None) -> str:
    if path is None:
        return "leaving; hostimaged may still carry out the request"
    number = job_id(path)
    return f"leaving; job {number} goes on ('{PROGRAM} cancel {number}' stops it)"
