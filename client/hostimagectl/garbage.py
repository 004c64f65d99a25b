"""What came of a garbage collection, as lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimagectl.deployments import short
from hostimagectl.output import number_of, printable, size, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimagectl.output import Console

#: Lists of names in a result, and what they are.
_GONE: Final = {
    "states": "State of",
    "entries": "Boot entry of",
    "artifacts": "Kernel of",
    "tags": "Tag",
    "dangling": "Led nowhere",
    "tags-made": "Tag made",
    "store-images": "Container image",
    "store-kept": "No container image is deleted",
}
#: Those that are ids of deployments.
_IDS: Final = ("states", "entries", "artifacts")


def print_garbage(result: Mapping[str, object], console: Console) -> None:
    """The result of a job of kind collect, or of a dry run of one."""
    word = text_of(result.get("result"))
    if word == "kept":
        console.line("nothing is deleted, as it is in doubt what is needed:")
        for reason in _names(result.get("reasons")):
            console.line(f"  {printable(reason)}")
        _print_names(result, console)
        return
    if word == "nothing":
        console.line("nothing to do: there is no garbage")
    else:
        doing = "would delete" if result.get("dry-run") is True else "deleted"
        counts = number_of(result.get("objects-removed")), number_of(result.get("objects-bytes"))
        boot = number_of(result.get("boot-bytes"))
        more = f", and {size(boot)} where the host boots from" if boot else ""
        if space := number_of(result.get("store-bytes")):
            images = len(_names(result.get("store-images")))
            more += f", and container images of {size(space)} ({images})"
        console.line(f"{doing} {counts[0]} objects of {size(counts[1])}{more}")
    _print_names(result, console)


def _print_names(result: Mapping[str, object], console: Console) -> None:
    rows = [
        (label, short(name) if key in _IDS else printable(name))
        for key, label in _GONE.items()
        for name in _names(result.get(key))
    ]
    if problem := text_of(result.get("store-problem")):
        rows.append(("Problem", printable(problem)))
    console.fields(rows, indent="  ")


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
