"""Results of jobs as text for people. JSON has them as the daemon gave them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from hostimagectl.output import number_of, printable, size, text_of, timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimagectl.job import Job
    from hostimagectl.output import Console

#: The first line about a job that is done, by kind; ``{}`` is its target.
_DONE: Final = {
    "check": "checked {}",
    "upgrade": "staged {}",
    "stage": "staged {}",
    "switch": "staged {}, which is tracked from now on",
    "rollback": "the next boot is into {}",
    "unstage": "nothing is staged any more",
    "delete": "deleted {}",
    "collect": "collected garbage",
    "verify": "verified the repository",
    "repair": "repaired the repository",
    "pin": "done: {}",
    "kargs": "the kernel arguments are changed from the next boot on",
}
_LABELS: Final = {"manifest-digest": "Manifest", "config-digest": "Config", "image-ids": "Image ids"}
#: Results of a pull that are in its first line, or of no use to a person.
_PULL_SHOWN: Final = ("manifest-digest", "source-digest", "version", "tag")
#: Times in results are microseconds since the epoch, and have this key.
_TIME: Final = "timestamp"
_SIZE_ENDS: Final = ("size", "bytes", "reclaimed", "freed")


def print_result(job: Job, console: Console) -> None:
    """The result of ``job``, which is done."""
    if job.kind in ("pull", ""):
        _print_pull(job, console)
        return
    if text := text_of(job.result.get("text")):
        # Lines of a report, such as a difference; each is one line for a terminal.
        for line in text.splitlines():
            console.line(printable(line))
        return
    line = _DONE.get(job.kind, "done: {}").format(printable(job.target))
    console.line(line.removesuffix(": ").rstrip())
    console.fields([(_label(key), _value(key, value)) for key, value in job.result.items()], indent="  ")


def _print_pull(job: Job, console: Console) -> None:
    console.line(_pulled(job))
    texts = {key: text_of(job.result.get(key)) for key in _PULL_SHOWN}
    if texts["source-digest"] == texts["manifest-digest"]:
        del texts["source-digest"]
    console.fields([(_label(key), text) for key, text in texts.items() if text], indent="  ")


def _pulled(job: Job) -> str:
    name = printable(job.target)
    if job.result.get("changed") is False:
        return f"nothing to do, already there: {name}"
    if not job.bytes_total:
        return f"pulled {name}"
    cached = f", {size(job.bytes_cached)} were there already" if job.bytes_cached else ""
    return f"pulled {name}: {size(job.bytes_done)} transferred{cached}"


def _label(key: str) -> str:
    return _LABELS.get(key) or key.replace("-", " ").capitalize()


def _value(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        count = number_of(value)
        if key == _TIME:
            return timestamp(count)
        return size(count) if key.endswith(_SIZE_ENDS) or key.startswith("bytes-") else str(value)
    if isinstance(value, str):
        return value
    return _structure(value)


def _structure(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=True, default=str)


def fields(properties: Mapping[str, object]) -> list[tuple[str, str]]:
    """Properties for people, those that say nothing left out."""
    return [
        (key, _value(key.lower(), value)) for key, value in properties.items() if value not in ("", [], 0)
    ]
