"""``hostimagectl status``: the daemon, the repository and its images, jobs, problems and last results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import EXIT_OK
from hostimage_dbus.names import JobState
from hostimagectl import deployments, service
from hostimagectl.commands import images
from hostimagectl.output import ABSENT, number_of, printable, size, text_of, timestamp

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from hostimagectl.output import Console

#: Results shown to a person; JSON has all that the daemon remembers.
_RESULTS: Final = 5


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Show the status."""
    async with service.connect() as daemon:
        if arguments.format != "native":
            # Made for other programs; what they parse is not ours to change.
            console.line(await daemon.status_text(arguments.format))
            return EXIT_OK
        document = await daemon.status()
    show(document, console)
    return EXIT_OK


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print the native status document: as it is for JSON, the daemon's state alone when quiet."""
    if console.as_json:
        console.json(document)
        return
    daemon = _section(document, "daemon")
    if console.quiet:
        console.line(printable(text_of(daemon.get("state"))))
        return
    console.fields(
        [
            ("State", text_of(daemon.get("state")) or ABSENT),
            ("Tracked image", text_of(document.get("trackedImage")) or "none"),
            *_update(document),
            *_reboot(document),
            *_holds(document),
            ("Repository", _repository(document.get("repository"))),
            *([("Storage", "shared with containers")] if document.get("unified") is True else []),
            ("Daemon", f"hostimaged {text_of(daemon.get('version')) or ABSENT}"),
        ]
    )
    _deployments(document, console)
    _images(document, console)
    _jobs(document, console)
    _results(document, console)
    _problems(document, console)


def _update(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    update = _section(document, "update")
    if not update:
        return []
    name = text_of(update.get("version")) or text_of(update.get("digest")) or ABSENT
    amount = number_of(update.get("download-size"))
    download = f", {size(amount)} to download" if amount else ""
    return [("Update", f"{name} ({text_of(update.get('state')) or ABSENT}{download})")]


def _holds(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for row in _rows(document, "holds"):
        until = number_of(row.get("until"))
        details = [f"until {timestamp(until)}"] if until else []
        details += filter(None, [text_of(row.get("reason"))])
        rows.append(("Held", f"{text_of(row.get('kind')) or ABSENT} {', '.join(details)}".rstrip()))
    return rows


def _reboot(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reboot will do, and what is unusual."""
    host = _section(document, "host")
    sentence = deployments.reboot(host, _rows(document, "deployments"))
    rows = [("Reboot", sentence)] if sentence else []
    return rows + [("Note", text) for text in deployments.notes(host)]


def _deployments(document: Mapping[str, Any], console: Console) -> None:
    rows = _rows(document, "deployments")
    if rows:
        console.line("\nDeployments:")
        deployments.table(rows, console)


def _images(document: Mapping[str, Any], console: Console) -> None:
    rows = _rows(document, "images")
    if rows:
        console.line("\nImages:")
        images.table(rows, console)
    else:
        console.line("\nNo images.")


def _jobs(document: Mapping[str, Any], console: Console) -> None:
    rows = _rows(document, "jobs")
    if not rows:
        return
    console.line("\nJobs:")
    keys = ("kind", "state", "target")
    cells = [
        (str(number_of(row.get("id"))), *(text_of(row.get(key)) or ABSENT for key in keys)) for row in rows
    ]
    console.table(("id", "kind", "state", "target"), cells)


def _results(document: Mapping[str, Any], console: Console) -> None:
    rows = _rows(document, "results")[-_RESULTS:]
    if not rows:
        return
    console.line("\nLast results:")
    console.table(("id", "kind", "result", "ended", "target"), [_result_cells(row) for row in reversed(rows)])
    for row in reversed(rows):
        error = _section(row, "error")
        if row.get("state") == JobState.FAILED:
            console.fields([(f"job {number_of(row.get('id'))}", text_of(error.get("message")))])


def _result_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    return (
        str(number_of(row.get("id"))),
        text_of(row.get("kind")) or ABSENT,
        text_of(row.get("state")) or ABSENT,
        timestamp(number_of(row.get("finished"))),
        text_of(row.get("target")) or ABSENT,
    )


def _problems(document: Mapping[str, Any], console: Console) -> None:
    rows = _rows(document, "problems")
    if not rows:
        return
    console.line("\nProblems:")
    for row in rows:
        console.fields([(text_of(row.get("severity")) or "problem", text_of(row.get("text")))], indent="  ")


def _repository(value: object) -> str:
    if not isinstance(value, dict):
        return "none yet; the first pull makes it"
    formats = value.get("formats")
    names = [text_of(name) for name in formats] if isinstance(formats, list) else []
    parts = [
        text_of(value.get("algorithm")),
        "+".join(filter(None, names)),
        "fs-verity required" if value.get("secure") is True else "fs-verity not required",
        f"{size(number_of(value.get('used')))} used",
    ]
    if reclaimable := number_of(value.get("reclaimable")):
        parts.append(f"{size(reclaimable)} garbage")
    return ", ".join(part for part in parts if part)


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def _rows(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = document.get(name)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
