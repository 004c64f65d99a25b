"""Which images of bootc's store were needed, or put there by us, before: those that go as soon as nothing
needs them. All others may be there for a deployment that bootc is about to make, and get a day.

``store.json``, in no order::

    {"version": 1, "images": ["<64 hex digits>"]}

A lost file costs a day, and no image.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from hostimaged.errors import from_os_error
from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_VERSION: Final = 1
#: An id takes 70 bytes: 15,000 images.
_MAX_SIZE: Final = 1 << 20
_MAX_IMAGES: Final = 10_000
_ID: Final = re.compile(r"[0-9a-f]{64}\Z")


def read(path: Path) -> frozenset[str]:
    """The ids; none if the file is missing or damaged."""
    raw = b""
    with suppress(OSError), path.open("rb") as file:
        raw = file.read(_MAX_SIZE + 1)
    try:
        document = json.loads(raw) if len(raw) <= _MAX_SIZE else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        return frozenset()
    images = document.get("images")
    found = images if isinstance(images, list) else []
    return frozenset(image for image in found if isinstance(image, str) and _ID.match(image))


def write(path: Path, images: Iterable[str]) -> None:
    """Let these be the ids, durably; nothing is written if they are. Raises what writing raises."""
    wanted = sorted(set(images))[:_MAX_IMAGES]
    if frozenset(wanted) == read(path):
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps({"version": _VERSION, "images": wanted}, indent=1).encode() + b"\n")
    except OSError as error:
        raise from_os_error(error, f"cannot write {path}") from error
