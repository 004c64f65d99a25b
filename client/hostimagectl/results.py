"""Results of jobs as text for people. JSON has them as the daemon gave them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from hostimagectl import difference
from hostimagectl.deployments import called, short
from hostimagectl.garbage import print_garbage
from hostimagectl.output import PROGRAM, number_of, printable, size, text_of, timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimagectl.job import Job
    from hostimagectl.output import Console

#: The first line about a job that is done, by kind, if its result has no word for it; ``{}`` is its target.
_DONE: Final = {
    "check": "checked {}",
    "verify": "verified the repository",
    "repair": "repaired the repository",
}
#: The first line about what came of a job on deployments, by the word for it in its result; ``{}`` is the
#: deployment, with its version where the result tells it, ``{id}`` as much of its id as the commands need.
_WORDS: Final = {
    "staged": "staged {}: the next reboot starts it",
    "already-staged": "nothing to do, staged already: {}",
    "already-current": "nothing to do, it is what runs: {}",
    "same-as-rollback": f"nothing staged: {{}} is there to go back to, which '{PROGRAM} rollback' does",
    "same-as-other": f"nothing staged: {{}} is deployed already, '{PROGRAM} make-default {{id}}' boots it",
    "queued": "the next reboot goes back to {}",
    "already-queued": "nothing to do, the next reboot already goes back to {}",
    "cancelled": "the rollback is taken back: the next reboot starts {} again",
    "not-queued": "nothing to do, no rollback waits for the next reboot",
    "default": "the next reboot starts {}",
    "already-default": "nothing to do, the next reboot already starts {}",
    "deleted": "deleted {}",
    "unstaged": "nothing is staged any more; it was {}",
    "pinned": "pinned {}: it is kept until it is unpinned",
    "unpinned": "unpinned {}: it is no longer kept for its own sake",
    "changed": "the kernel arguments of {} are changed from the next boot on",
    "unchanged": "nothing to do, it was so before: {}",
}
_LOCKED: Final = f"downloaded {{}}: it waits for '{PROGRAM} upgrade --from-downloaded'"
#: What a person is told of such a result besides; JSON has all of it.
_SHOWN: Final = ("image", "manifest-digest", "kernel-arguments", "soft-reboot")
#: Changes of the host's own that the shutdown carries over to what is staged, as they are now.
_ETC: Final = ("etc-added", "etc-modified", "etc-removed")
#: Container images that a deployment is bound to.
_BOUND: Final = {"bound-images": "Bound to", "bound-fetched": "Fetched for it"}
_LABELS: Final = {"manifest-digest": "Manifest", "config-digest": "Config", "image-ids": "Image ids"}
#: Results of a pull that are in its first line, or of no use to a person.
_PULL_SHOWN: Final = ("manifest-digest", "source-digest", "version", "tag", "stored-as", "not-unified")
#: Ways in which files of containers-storage come into the repository.
_HOW: Final = ("reflinked", "linked", "copied")
#: Times in results are microseconds since the epoch, and have this key.
_TIME: Final = "timestamp"
_SIZE_ENDS: Final = ("size", "bytes", "reclaimed", "freed")


def print_result(job: Job, console: Console) -> None:
    """The result of ``job``, which is done."""
    if job.kind in ("pull", ""):
        _print_pull(job, console)
        return
    if job.kind == "unify":
        _print_unified(job, console)
        return
    if _print_words(job, console):
        return
    if job.kind == "collect":
        print_garbage(job.result, console)
        return
    if (document := difference.document_of(job.result)) is not None:
        for line in difference.lines(document):
            console.line(printable(line))
        return
    if text := text_of(job.result.get("text")):
        # Lines of a report, such as a difference; each is one line for a terminal.
        for line in text.splitlines():
            console.line(printable(line))
        return
    line = _DONE.get(job.kind, "done: {}").format(printable(job.target))
    console.line(line.removesuffix(": ").rstrip())
    console.fields([(_label(key), _value(key, value)) for key, value in job.result.items()], indent="  ")


def _print_words(job: Job, console: Console) -> bool:
    """What came of a job on deployments; False for other results."""
    result = job.result
    identifier = text_of(result.get("deployment"))
    line = _WORDS.get(text_of(result.get("result")))
    if line is None:
        return False
    if result.get("download-only") is True and result["result"] in ("staged", "already-staged"):
        line = _LOCKED
    name = called(text_of(result.get("version")), identifier)
    console.line(printable(line.format(name, id=short(identifier))))
    fetched = job.bytes_total and "bytes-fetched" in result
    rows = [("Transfer", _transferred(job))] if fetched else []
    rows += [(_label(key), text) for key in _SHOWN if (text := text_of(result.get(key)))]
    if counts := [f"{number_of(result[key])} {key[4:]}" for key in _ETC if number_of(result.get(key))]:
        rows.append(("Kept of /etc", ", ".join(counts)))
    rows += [(label, _structure(result[key])) for key, label in _BOUND.items() if result.get(key)]
    console.fields(rows, indent="  ")
    return True


def _print_pull(job: Job, console: Console) -> None:
    console.line(_pulled(job))
    texts = {key: text_of(job.result.get(key)) for key in _PULL_SHOWN}
    if texts["source-digest"] == texts["manifest-digest"]:
        del texts["source-digest"]
    rows = [(_label(key), text) for key, text in texts.items() if text]
    if parts := [
        f"{size(count)} {how}" for how in _HOW if (count := number_of(job.result.get(f"bytes-{how}")))
    ]:
        rows.append(("From storage", ", ".join(parts)))
    console.fields(rows, indent="  ")


def _print_unified(job: Job, console: Console) -> None:
    result = job.result
    if result.get("unified") is False:
        removed = result.get("removed")
        names = removed if isinstance(removed, list) else []
        console.line("images are no longer kept in containers-storage")
        console.fields([("Removed", printable(name)) for name in names], indent="  ")
        return
    name = printable(text_of(result.get("stored-as")))
    done = "is" if result.get("changed") is True else "was already"
    console.line(f"images are kept in containers-storage: {name} {done} there")


def _pulled(job: Job) -> str:
    name = printable(job.target)
    if job.result.get("changed") is False:
        return f"nothing to do, already there: {name}"
    if not job.bytes_total:
        return f"pulled {name}"
    return f"pulled {name}: {_transferred(job)}"


def _transferred(job: Job) -> str:
    cached = f", {size(job.bytes_cached)} were there already" if job.bytes_cached else ""
    return f"{size(job.bytes_done)} transferred{cached}"


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
