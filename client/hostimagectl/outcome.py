"""What the end of a job means for a command: text, JSON and exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_CODES, EXIT_OK, ErrorName
from hostimagectl import difference, progress
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.follow import Follower
from hostimagectl.job import Job, job_id
from hostimagectl.output import PROGRAM, text_of
from hostimagectl.results import print_result

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hostimagectl.output import Console
    from hostimagectl.service import Service

#: Parts of results that are JSON lists, by kind of the jobs that look for damage.
_DOCUMENTS: Final = {"verify": ("findings",), "repair": ("images", "left")}


async def carry_out(
    daemon: Service, console: Console, request: Callable[[], Awaitable[str]], *, wait: bool, quiet_key: str
) -> int:
    """Call ``request``, which starts a job and gives its path, and tell how it ended; gives the exit code.

    Without ``wait`` only the job is told. ``quiet_key`` is the key of the result that ``--quiet`` prints.
    """
    if not wait:
        return await _announce(daemon, console, await request())
    display = progress.create(console)
    follower = Follower(daemon, display)
    try:
        job = await follower.run(request, may_join=True)
    except Interrupted as interrupted:
        display.close()
        console.note(_farewell(follower.path))
        return interrupted.code
    finally:
        display.close()
    return report(job, console, cancel_requested=follower.cancel_requested, quiet_key=quiet_key)


def report(job: Job, console: Console, *, cancel_requested: bool, quiet_key: str = "") -> int:
    """Say how ``job`` ended; gives the exit code."""
    failure = failure_of(job)
    if console.as_json:
        _print_json(job, console, failure=failure)
    if failure is not None:
        console.error(failure.message, failure.hint)
        return failure.code
    if cancel_requested:
        console.note("it finished before it could be cancelled")
    if console.quiet and not console.as_json:
        if shown := text_of(job.result.get(quiet_key)):
            console.line(shown)
    elif not console.as_json:
        print_result(job, console)
    return EXIT_CODES[ErrorName.CORRUPT_REPOSITORY] if _tells_of_damage(job) else EXIT_OK


def _tells_of_damage(job: Job) -> bool:
    """Whether something that is needed is damaged, or would be: a job that says so has not failed."""
    return job.kind in _DOCUMENTS and job.result.get("ok") is False


def failure_of(job: Job) -> Failure | None:
    """Why the ended ``job`` did not succeed, None if it did."""
    if job.succeeded:
        return None
    if job.cancelled:
        return Failure.of_error(ErrorName.CANCELLED, f"job {job.id} was cancelled")
    if job.error is None:
        return Failure.of_error(ErrorName.INTERNAL, f"job {job.id} ended as {job.state or 'unknown'}")
    return Failure.of_error(job.error.name, job.error.message)


async def _announce(daemon: Service, console: Console, path: str) -> int:
    number = job_id(path)
    if console.as_json:
        try:
            job = await daemon.job(path)
        except Failure as failure:
            if failure.name != ErrorName.UNKNOWN_OBJECT:
                raise
            job = Job(id=number, path=path)
        _print_json(job, console, failure=None)
    elif console.quiet:
        console.line(str(number))
    else:
        console.line(f"job {number} does it ('{PROGRAM} jobs' shows it)")
    return EXIT_OK


def _print_json(job: Job, console: Console, *, failure: Failure | None) -> None:
    console.json(
        {
            "job": job.as_dict(),
            "result": _result(job) if job.succeeded else None,
            "error": None if failure is None else failure.as_dict(),
        }
    )


def _result(job: Job) -> dict[str, object]:
    """The result as it came, but for a document in it, which is part of ours then."""
    document = difference.document_of(job.result)
    if document is not None:
        return {**job.result, difference.KEY: document}
    lists = {key: parsed for key in _DOCUMENTS.get(job.kind, ()) if (parsed := _list(job.result.get(key)))}
    return {**job.result, **lists}


def _list(value: object) -> list[object]:
    """The list in a JSON text; [] if there is none."""
    try:
        parsed = json.loads(text_of(value))
    except (ValueError, RecursionError):
        return []
    return parsed if isinstance(parsed, list) else []


def _farewell(path: str | None) -> str:
    if path is None:
        return "leaving; hostimaged may still carry out the request"
    number = job_id(path)
    return f"leaving; job {number} goes on ('{PROGRAM} cancel {number}' stops it)"
