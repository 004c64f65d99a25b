"""``pulls.json``: which image was pulled from where, and when.

A tag says that an image was pulled, a row here what for. A tag without a row counts as pulled when its link
was made; a row without its tag names nothing. Rows are in the order of pulling, the newest last::

    {"version": 1, "pulls": [
      {"reference": "docker://registry.example/os:v1", "manifest_digest": "sha256:…",
       "source_digest": "sha256:…", "time": 1767225600}
    ]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import InvalidArgs, StorageError, from_os_error
from hostimaged.ids import ManifestDigest, SourceDigest
from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
#: A row has some 300 bytes: 50,000 pulls.
MAX_SIZE: Final = 16 << 20
_MAX_TIME: Final = 1 << 52


class PullsError(StorageError):
    """the list of pulled images ({path}) {detail}"""


class NewerPulls(PullsError):
    """the list of pulled images ({path}) was written by a newer version of this program"""


@dataclass(frozen=True, slots=True)
class PullRow:
    """One pull; ``time`` is its end in seconds since the epoch."""

    reference: str
    manifest_digest: ManifestDigest
    source_digest: SourceDigest
    time: int


def load(path: Path) -> list[PullRow]:
    """The rows of the file, oldest first; [] if there is none. Rows that are not valid are left out.

    Raises ``PullsError`` for a file that cannot be read or is none of ours, ``NewerPulls`` for a newer one.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PullsError(f"cannot be read: {error.strerror}", path=path) from None
    if len(raw) > MAX_SIZE:
        raise PullsError(f"is larger than {MAX_SIZE} bytes", path=path)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise PullsError("is damaged", path=path)
    if version > VERSION:
        # Whatever form that has.
        raise NewerPulls(path=path)
    rows = content.get("pulls")
    if not isinstance(rows, list):
        raise PullsError("is damaged", path=path)
    return [row for row in map(_row, rows) if row is not None]


def record(path: Path, row: PullRow) -> bool:
    """Make ``row`` the newest, durably; says whether anything was written.

    Nothing is when the newest row of the same reference says the same but for the time. An earlier row of the
    same reference and manifest is dropped. A damaged file is replaced. Raises ``NewerPulls``, leaving that
    file alone, and ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    try:
        rows = load(path)
    except NewerPulls:
        raise
    except PullsError:
        rows = []
    newest = next((old for old in reversed(rows) if old.reference == row.reference), None)
    if newest is not None and _same(newest, row) and newest.source_digest == row.source_digest:
        return False
    rows = [old for old in rows if not _same(old, row)]
    document = {"version": VERSION, "pulls": [_document(item) for item in [*rows, row]]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise from_os_error(error, f"cannot write the list of pulled images ({path})") from error
    return True


def _same(one: PullRow, other: PullRow) -> bool:
    return (one.reference, one.manifest_digest) == (other.reference, other.manifest_digest)


def _document(row: PullRow) -> dict[str, Any]:
    return {
        "reference": row.reference,
        "manifest_digest": str(row.manifest_digest),
        "source_digest": str(row.source_digest),
        "time": row.time,
    }


def _row(value: Any) -> PullRow | None:
    try:
        reference, time = value["reference"], value["time"]
        digests = ManifestDigest(value["manifest_digest"]), SourceDigest(value["source_digest"])
    except (TypeError, KeyError, InvalidArgs):
        return None
    if not isinstance(reference, str) or not isinstance(time, int) or not 0 <= time < _MAX_TIME:
        return None
    return PullRow(reference, *digests, time)
