"""Which boot this is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

#: Bytes that are read of a boot id, which has 36 characters.
_SIZE: Final = 64
_BOOT_ID: Final = re.compile(r"[0-9a-f-]{32,36}\Z")


def read_boot_id(path: Path | None) -> str:
    """The kernel's id of this boot from the file ``path``; "" where there is none (random(4))."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            text = file.read(_SIZE).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return text if _BOOT_ID.match(text) else ""
