"""Files of the run directory that outlive the daemon, but not the boot: one JSON object each.

{"version": 1, "boot_id": …, …}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from pathlib import Path


class OfBoot(BaseModel):
    """What is in such a file; the boot id is set when it is written."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    boot_id: str = ""


_Content = TypeVar("_Content", bound=OfBoot)


class BootFile(Generic[_Content]):
    """The file at ``path``, a ``model`` of the boot ``boot_id``; ``limit``: bytes that it may have."""

    def __init__(
        self, path: Path, model: type[_Content], boot_id: str, *, limit: int, mode: int = 0o644
    ) -> None:
        self.path = path
        self._model = model
        self._boot_id = boot_id
        self._limit = limit
        self._mode = mode

    def load(self) -> _Content | None:
        """Read the file; None if it is missing, or of another boot. Blocks.

        Raises ``OSError``, and ``ValidationError`` for one that is damaged or too long.
        """
        try:
            with self.path.open("rb") as stream:
                content = self._model.model_validate_json(stream.read(self._limit))
        except FileNotFoundError:
            return None
        return content if content.boot_id == self._boot_id else None

    def encode(self, content: _Content) -> bytes:
        """The file with ``content``."""
        stamped = content.model_copy(update={"boot_id": self._boot_id})
        return stamped.model_dump_json(by_alias=True, indent=1).encode() + b"\n"

    def save(self, encoded: bytes) -> None:
        """Replace the file. Blocks; may be done in any thread. Raises ``OSError``."""
        replace_file(self.path, encoded, self._mode)
