"""The marker of a staged deployment (``/run/composefs/staged-deployment``).

Facts: deployments.md 6 (bootc 1.16). It is the last thing that staging writes, and gone after a reboot.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.errors import DamagedState, from_os_error
from hostimaged.host.statefile import read_state_file
from hostimaged.ids import DeploymentId

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "staged-deployment"
#: It has 200 bytes; keys may be added.
MAX_SIZE: Final = 16 << 10
_ID: Final = re.compile(r"[0-9a-f]{128}\Z")


@dataclass(frozen=True, slots=True)
class Marker:
    """Which deployment is staged; ``finalization_locked``: a shutdown must not activate it."""

    depl_id: DeploymentId
    finalization_locked: bool = False

    @classmethod
    def parse(cls, data: bytes, name: str = NAME) -> Marker:
        """The marker in ``data``; raises ``DamagedState``.

        bootc before January 2026 wrote the id alone.
        """
        if len(data) > MAX_SIZE:
            raise DamagedState(f"it is larger than {MAX_SIZE} bytes", file=name)
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise DamagedState("it is not UTF-8", file=name) from None
        if _ID.match(text):
            return cls(DeploymentId(text))
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise DamagedState("it is not JSON", file=name) from None
        if not isinstance(found, dict):
            raise DamagedState("it is not a JSON object", file=name)
        id_, locked = found.get("depl_id"), found.get("finalization_locked")
        if not isinstance(id_, str) or not _ID.match(id_):
            raise DamagedState("depl_id is not 128 hex digits", file=name)
        if not isinstance(locked, bool):
            raise DamagedState("finalization_locked is not true or false", file=name)
        return cls(DeploymentId(id_), locked)

    def serialise(self) -> bytes:
        """The bytes of the file: canonical JSON."""
        content = {"depl_id": str(self.depl_id), "finalization_locked": self.finalization_locked}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_marker(directory: Path | None) -> Marker | None:
    """The marker in ``HostPaths.marker_dir``; None if nothing is staged. Raises ``DamagedState``."""
    if directory is None:
        return None
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, "cannot read the marker of the staged deployment") from error
    try:
        data = read_state_file(fd, NAME, MAX_SIZE)
    finally:
        os.close(fd)
    return None if data is None else Marker.parse(data)
