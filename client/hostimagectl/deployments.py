"""Deployments as text for people: what there is, and what a reboot will do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hostimagectl.output import ABSENT, PROGRAM, number_of, size, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hostimagectl.output import Console

#: Digits of a deployment's id that are shown; the commands take as few as tell it apart.
SHOWN_DIGITS: Final = 12
_STATES: Final = {
    "booted": "booted",
    "staged": "staged",
    "is-rollback": "rollback",
    "pinned": "pinned",
    "locked": "download only",
}
#: Whether a bound image is in the store.
_PRESENCE: Final = {True: "present", False: "missing"}
_HEADINGS: Final = ("deployment", "state", "version", "made", "frees", "digest", "image")
#: What is unusual about a host, by the key in the status document that says so.
_NOTES: Final = {
    "soft-rebooted": "the kernel was started for another deployment: this one came by a soft reboot",
    "transient-root": "changes to the root file system vanish at the next reboot",
    "read-only": "the physical root cannot be written",
}


def short(identifier: str) -> str:
    """Enough of an id to tell deployments apart."""
    return identifier[:SHOWN_DIGITS] or ABSENT


def called(version: str, identifier: str) -> str:
    """A deployment in a sentence: its version if it has one, and its id."""
    return f"version {version} ({short(identifier)})" if version else f"deployment {short(identifier)}"


def short_digest(digest: str) -> str:
    """Enough of a digest to tell images apart."""
    algorithm, colon, value = digest.partition(":")
    return algorithm + colon + value[:SHOWN_DIGITS]


def table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The deployments as a table, with bound images and problems below it."""
    console.table(_HEADINGS, [_cells(row) for row in rows])
    for row in rows:
        bound = row.get("bound-images")
        for image in bound if isinstance(bound, list) else []:
            if isinstance(image, dict):
                present = image.get("present")
                state = _PRESENCE[present] if isinstance(present, bool) else "unknown"
                label = f"bound to {short(text_of(row.get('id')))}"
                console.fields([(label, f"{text_of(image.get('image'))} ({state})")])
    for row in rows:
        problems = row.get("problems")
        for problem in problems if isinstance(problems, list) else []:
            if isinstance(problem, dict):
                label = f"{text_of(problem.get('severity')) or 'problem'} of {short(text_of(row.get('id')))}"
                console.fields([(label, text_of(problem.get("text")))])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    states = [word for key, word in _STATES.items() if row.get(key) is True]
    if row.get("verity") == "broken":
        states.append("damaged")
    return (
        short(text_of(row.get("id"))),
        ", ".join(states) or ABSENT,
        text_of(row.get("version")) or ABSENT,
        _date(number_of(row.get("timestamp"))),
        size(freed) if (freed := number_of(row.get("size-exclusive"))) else ABSENT,
        short_digest(text_of(row.get("image-digest"))) or ABSENT,
        text_of(row.get("image")) or ABSENT,
    )


def _date(microseconds: int) -> str:
    """Day, in UTC as images are made everywhere, of a moment in microseconds since the epoch."""
    if not microseconds:
        return ABSENT
    try:
        return datetime.fromtimestamp(microseconds / 1_000_000, UTC).date().isoformat()
    except (OverflowError, OSError, ValueError):
        return ABSENT


def notes(host: Mapping[str, Any]) -> list[str]:
    """What is unusual about the host."""
    found = [text for key, text in _NOTES.items() if host.get(key) is True]
    if host.get("usr-overlay") in ("readOnly", "readWrite"):
        found.append("/usr is covered by an overlay until the next reboot")
    return found


def reboot(host: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a reboot will do, in one sentence; "" if the daemon tells nothing about it."""
    if not rows or "next" not in host:
        return ""
    following = next((row for row in rows if text_of(row.get("id")) == text_of(host.get("next"))), None)
    locked = next((row for row in rows if row.get("staged") is True and row.get("locked") is True), None)
    if following is None:
        sentence = "nobody knows what it starts"
    elif following.get("booted") is True:
        sentence = f"starts {_called(following)} again"
    elif following.get("staged") is True:
        sentence = f"starts {_called(following)}, which is staged"
    elif following.get("is-rollback") is True:
        sentence = f"goes back to {_called(following)}"
    else:
        sentence = f"starts {_called(following)}"
    if locked is None:
        return sentence
    unlock = f"'{PROGRAM} upgrade --from-downloaded' releases it"
    return f"{sentence}; {_called(locked)} is only downloaded ({unlock})"


def _called(row: Mapping[str, Any]) -> str:
    return called(text_of(row.get("version")), text_of(row.get("id")))
