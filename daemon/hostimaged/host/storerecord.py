"""Which images of bootc's store were needed, or put there by us, before: those that go as soon as nothing
needs them. All others may be there for a deployment that bootc is about to make, and get a day.

``store.json``, in no order::

    {"version": 1, "images": ["<64 hex digits>"]}

A lost file costs a day, and no image.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hostimaged.host.statefile import read_document, write_document

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
    document = read_document(path, _MAX_SIZE, _VERSION)
    if document is None:
        return frozenset()
    images = document.get("images")
    found = images if isinstance(images, list) else []
    return frozenset(image for image in found if isinstance(image, str) and _ID.match(image))


def write(path: Path, images: Iterable[str]) -> None:
    """Let these be the ids, durably; nothing is written if they are. Raises what writing raises."""
    wanted = sorted(set(images))[:_MAX_IMAGES]
    if frozenset(wanted) == read(path):
        return
    write_document(path, {"version": _VERSION, "images": wanted})
