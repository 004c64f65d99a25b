"""``hostimagectl images``: what is in the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_OK
from hostimagectl import service
from hostimagectl.deployments import short_digest
from hostimagectl.output import ABSENT, number_of, size, text_of, timestamp

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from hostimagectl.output import Console

#: Keys of a row in JSON, always present; null where the daemon does not know.
KEYS: Final = (
    "tag",
    "manifest-digest",
    "config-digest",
    "reference",
    "source-digest",
    "pulled",
    "version",
    "size",
    "image-ids",
    "artifact",
    "deployed",
    "problem",
)
_MICRO: Final = 1_000_000


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """List the images."""
    del arguments
    async with service.connect() as daemon:
        rows = await daemon.images()
    show(rows, console)
    return EXIT_OK


def show(rows: Sequence[Mapping[str, object]], console: Console) -> None:
    """Print the rows of ``ListImages``."""
    if console.as_json:
        console.json({"images": [{key: row.get(key) for key in KEYS} for row in rows]})
    elif console.quiet:
        digests = (text_of(row.get("manifest-digest")) for row in rows)
        # One image may have several tags.
        for digest in dict.fromkeys(filter(None, digests)):
            console.line(digest)
    elif rows:
        table(rows, console)
    else:
        console.note("no images")


def table(rows: Sequence[Mapping[str, object]], console: Console) -> None:
    """The rows as a table, with problems below it; an image that several tags name is shown once."""
    rows = _distinct(rows)
    console.table(("image", "version", "size", "pulled", "digest"), [_cells(row) for row in rows])
    for row in rows:
        problem = text_of(row.get("problem"))
        if problem:
            console.fields([(f"problem of {_name(row)}", problem)])


def _distinct(rows: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """For each manifest the row that tells where it came from, if there is one; in their order."""
    best: dict[object, Mapping[str, object]] = {}
    for row in rows:
        digest = text_of(row.get("manifest-digest")) or id(row)
        if digest not in best or (not best[digest].get("reference") and row.get("reference")):
            best[digest] = row
    chosen = {id(row) for row in best.values()}
    return [row for row in rows if id(row) in chosen]


def _cells(row: Mapping[str, object]) -> tuple[str, str, str, str, str]:
    amount = number_of(row.get("size"))
    kind = (
        " (artifact)" if row.get("artifact") is True else " (deployed)" if row.get("deployed") is True else ""
    )
    return (
        _name(row) + kind,
        text_of(row.get("version")) or ABSENT,
        size(amount) if amount else ABSENT,
        timestamp(number_of(row.get("pulled")) * _MICRO),
        short_digest(text_of(row.get("manifest-digest"))) or ABSENT,
    )


def _name(row: Mapping[str, object]) -> str:
    """What a person calls the image: where it came from, else its tag."""
    return text_of(row.get("reference")) or text_of(row.get("tag")) or ABSENT
