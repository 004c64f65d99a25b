"""What is different between two deployments, as lines for people.

The daemon gives a JSON document (``org.hostimage1(5)``, Diff), which is read here with no more trust than
anything that came over the bus.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from hostimagectl.deployments import called
from hostimagectl.output import ABSENT, number_of, size, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: The key of the job's result that has the document.
KEY: Final = "diff"
_SIGNS: Final = {"added": "+", "removed": "-", "changed": "~", "metadata": "m"}


def document_of(result: Mapping[str, object]) -> dict[str, Any] | None:
    """The document in a job's result, None if there is none."""
    try:
        document = json.loads(text_of(result.get(KEY)))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document line by line, none of them ``printable`` yet."""
    yield f"from {_name(document, 'from')} to {_name(document, 'to')}"
    arguments = _section(document, "kernel-arguments")
    yield from _titled(
        "kernel arguments",
        [f"{_SIGNS[kind]} {text}" for kind in ("removed", "added") for text in _texts(arguments.get(kind))],
    )
    yield from _titled("labels", [_change(row) for row in _rows(document, "labels")])
    yield from _titled("packages", [_change(row) for row in _rows(document, "packages")])
    files = _section(document, "files")
    yield from _titled(_files(files), [_sign(row) + " " + row[1] for row in _rows(document, "files")])
    for text in _texts(document.get("problems")):
        yield f"not compared: {text}"
    if document.get("truncated") is True:
        yield "(there is more than fits into the answer)"


def _titled(title: str, rows: list[str]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
        yield from (f"  {row}" for row in rows)


def _files(files: Mapping[str, Any]) -> str:
    counts = {kind: number_of(files.get(kind)) for kind in _SIGNS}
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    grown = [
        f"{size(number_of(files.get(f'{kind}-bytes')))} {kind}"
        for kind in ("added", "removed")
        if number_of(files.get(f"{kind}-bytes"))
    ]
    return f"files ({', '.join(parts + grown)})"


def _change(row: list[str]) -> str:
    """``[kind, name, old, new]``."""
    values = [value or ABSENT for value in row[2:4]]
    return f"{_sign(row)} {row[1]}: {' -> '.join(values)}" if len(values) == 2 else f"{_sign(row)} {row[1]}"


def _sign(row: list[str]) -> str:
    return _SIGNS.get(row[0], "?")


def _name(document: Mapping[str, Any], key: str) -> str:
    row = _section(document, key)
    return called(text_of(row.get("version")), text_of(row.get("id")))


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _rows(document: Mapping[str, Any], key: str) -> list[list[str]]:
    rows = _section(document, key).get("list")
    return [_texts(row) for row in rows if len(_texts(row)) > 1] if isinstance(rows, list) else []


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
